"""``python -m train evaluate``: several scorers, what fails, what is kept, and the page."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from data_specs.io.errors import UserError
from tests.train.test_report import WholePage
from tests.train_helpers import needs_shared, write_dataset
from train.__main__ import main
from train.evaluation import external_scorers, page, scorers
from train.evaluation.external_scorers import EXTERNAL
from train.files import csv_rows, csv_text
from train.scoring.base import Score

RATE = 16_000
CLIPS, PER_CONDITION = 24, 4


class Fake:
    """Says the rating plus noise of its own; keeps what it scored."""

    def __init__(self, name, noise, broken=()):
        self.name, self.noise, self.broken = name, noise, broken
        self.weights_sha256 = hashlib.sha256(name.encode()).hexdigest()
        self.parameters, self.version, self.precision = 10_010, "1.0", "fp32"
        self.padding = "zero"
        self.scored = []

    def score_files(self, paths, padding="zero", batch=8):
        for path in paths:
            self.scored.append(path.name)
            if path.name in self.broken:
                yield Score(path, None, None, f"{path}: cannot be read as audio: made so")
                continue
            draw = np.random.default_rng([ord(c) for c in self.name + path.stem + padding])
            level = float(np.abs(soundfile.read(path)[0]).max()) * 5
            yield Score(path, float(np.clip(level + draw.normal(0, self.noise), 1, 5)), 1.0)

    def score_windows(self, waves):
        return [float(np.clip(1 + 9 * np.abs(wave).max(), 1, 5)) for wave in waves]


def write_labels(folder, name="toy"):
    folder.mkdir(parents=True, exist_ok=True)
    draw, rows = np.random.default_rng(0), []
    for number in range(CLIPS):
        condition = number // PER_CONDITION
        mos = 1.2 + 3.6 * condition / (CLIPS // PER_CONDITION)
        tone_T = np.sin(np.arange(RATE // 2) * (0.05 + number / 200)) * mos / 5
        tone_T += draw.normal(0, 1e-4, len(tone_T))
        soundfile.write(folder / f"{number:02d}.flac", tone_T, RATE)
        about = {"dataset": name, "path": f"{number:02d}.flac", "mos": f"{mos:.3f}"}
        rows.append(about | {"condition": f"c{condition}"})
    (folder / "labels.csv").write_text(csv_text(rows))
    return folder / "labels.csv"


@pytest.fixture
def fakes(monkeypatch):
    made = {name: Fake(name, noise) for name, noise in (("v7", 0.2), ("run", 0.9))}

    def load(model, device="cpu"):
        if str(model) not in made:
            raise UserError(f"{model}: no such model")
        return made[str(model)]

    def refuse(options):
        raise OSError("Name or service not known")

    def loud(options):
        return lambda wave_T, rate: {"mos": 1 + float(np.abs(wave_T).max())}, "e" * 64, None

    monkeypatch.setattr(scorers, "load", load)
    for name, change in (("utmos", refuse), ("nisqa", loud)):
        monkeypatch.setitem(EXTERNAL, name, replace(EXTERNAL[name], load=change))
    monkeypatch.setattr(external_scorers.importlib.metadata, "version", lambda package: "1.0")
    return made


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments), "--device", "cpu"])


def models(*names):
    return [part for name in names for part in ("--model", name)]


def test_scorers_are_compared_and_one_that_cannot_be_had_is_named(fakes, tmp_path, capsys):
    labels, out = write_labels(tmp_path / "rated"), tmp_path / "out"
    assert evaluate(*models("v7", "run", "nisqa", "utmos"), "--rated", labels, "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert [(row["model"], row["padding"], row["clips"]) for row in results["sets"]] == [
        *(("v7", "zero", 24), ("run", "zero", 24), ("nisqa", "own", 24))
    ]
    assert [row["level"] for row in results["levels"]] == ["condition"] * 3
    by_model = {row["model"]: row for row in results["sets"]}
    assert by_model["v7"]["pcc"] > by_model["run"]["pcc"] > 0.4
    assert by_model["v7"]["pcc_low"] < by_model["v7"]["pcc"] < by_model["v7"]["pcc_high"]
    assert by_model["v7"]["parameters"] == 10_010
    assert len(results["pairs"]) == 3 and results["pairs"][0]["resampled"] == "condition"
    (gone,) = results["unavailable"]
    assert gone["model"] == "utmos" and "not known" in gone["reason"]
    assert gone["command"] == EXTERNAL["utmos"].get
    said = capsys.readouterr()
    assert "not available: utmos" in said.out and "pip install utmos-pytorch" in said.out
    text = (out / "results.md").read_text()
    for part in ("| v7 |", "## Not available here", "published, not measured here", "Holm"):
        assert part in text
    assert len(csv_rows(out / "results.csv")) == 6 and len(csv_rows(out / "pairs.csv")) == 3
    assert results["table1"]["mark"] == "published, not measured here"


def test_only_what_is_new_is_scored(fakes, tmp_path):
    labels, out = write_labels(tmp_path / "rated"), tmp_path / "out"
    run = ["--rated", labels, "--out", out]
    assert evaluate(*models("v7"), *run) == 0
    before = csv_rows(out / "scores.csv")
    shutil.move(labels.parent, tmp_path / "moved")  # other paths, the same bytes
    run[1] = tmp_path / "moved" / "labels.csv"
    clip, rate = soundfile.read(tmp_path / "moved" / "07.flac")
    soundfile.write(tmp_path / "moved" / "07.flac", clip / 2, rate)
    fakes["v7"].scored.clear()
    assert evaluate(*models("v7", "run"), *run) == 0
    assert fakes["v7"].scored == ["07.flac"] and len(fakes["run"].scored) == CLIPS
    after = [row for row in csv_rows(out / "scores.csv") if row["model"] == "v7"]
    changed = [a["score"] != b["score"] for a, b in zip(before, after, strict=True)]
    assert [n for n, was in enumerate(changed) if was] == [7]
    assert evaluate(*models("v7"), *run, "--fresh") == 0
    assert len(fakes["v7"].scored) == 1 + CLIPS
    for name, value in (("version", "other code, or device"), ("precision", "bf16")):
        fakes["v7"].scored.clear()
        setattr(fakes["v7"], name, value)
        assert evaluate(*models("v7"), *run) == 0 and len(fakes["v7"].scored) == CLIPS


def test_a_clip_that_fails_is_left_out_for_all_and_named(fakes, tmp_path, capsys):
    labels, out = write_labels(tmp_path / "rated"), tmp_path / "out"
    fakes["run"].broken = ("03.flac",)
    assert evaluate(*models("v7", "run"), "--rated", labels, "--out", out) == 1
    results = json.loads((out / "results.json").read_text())
    assert {row["clips"] for row in results["sets"]} == {CLIPS - 1}
    assert [one["model"] for one in results["failures"]] == ["run"]
    assert "03.flac" in results["notes"][0] and "03.flac" in capsys.readouterr().out
    rows = {(row["model"], row["path_or_key"][-7:]): row for row in csv_rows(out / "scores.csv")}
    assert ("run", "03.flac") not in rows and rows["v7", "03.flac"]["compared"] == "0"
    assert rows["v7", "04.flac"]["compared"] == "1" and rows["v7", "04.flac"]["condition"] == "c1"
    fakes["run"].broken = ()  # what failed is tried again
    fakes["run"].scored.clear()
    assert evaluate(*models("v7", "run"), "--rated", labels, "--out", out) == 0
    assert fakes["run"].scored == ["03.flac"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("utmos",), "none of the scorers can be had here"),
        (("v7", "tpyo"), "tpyo: no such model"),
        (("dnsmos", "dnsmos-p808"), "'dnsmos-p808' is asked for twice"),
        (("run",), "nothing to compare"),  # none of its clips can be scored
    ],
)
def test_what_cannot_be_compared_is_an_error(fakes, tmp_path, capsys, monkeypatch, names, said):
    empty = EXTERNAL["dnsmos"]
    nothing = replace(empty, load=lambda options: (lambda wave_T, rate: {}, "0", None))
    monkeypatch.setitem(EXTERNAL, "dnsmos", nothing)
    fakes["run"].broken = tuple(f"{n:02d}.flac" for n in range(CLIPS))
    labels = write_labels(tmp_path / "rated")
    assert evaluate(*models(*names), "--rated", labels, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err


def test_a_teacher_without_its_weights_is_not_available(fakes, tmp_path, monkeypatch, capsys):
    def load(model, device="cpu"):
        if model == "xlsr-2b-l10":
            raise UserError("teacher 'xlsr-2b-l10': no weights 'x' in /c: run make weights NAMES=x")
        return fakes["v7"]

    monkeypatch.setattr(scorers, "load", load)
    labels, out = write_labels(tmp_path / "rated"), tmp_path / "out"
    assert evaluate(*models("v7", "xlsr-2b-l10"), "--rated", labels, "--out", out) == 0
    (gone,) = json.loads((out / "results.json").read_text())["unavailable"]
    assert gone["command"] == "make weights NAMES=x" and "no weights" in gone["reason"]


def test_ctrl_c_keeps_what_was_scored(fakes, tmp_path, monkeypatch, capsys):
    labels, out = write_labels(tmp_path / "rated"), tmp_path / "out"
    whole = Fake.score_files

    def pressed(self, paths, padding="zero", batch=8):
        for number, score in enumerate(whole(self, paths, padding)):
            if number == 5:
                raise KeyboardInterrupt
            yield score

    monkeypatch.setattr(Fake, "score_files", pressed)
    assert evaluate(*models("v7"), "--rated", labels, "--out", out) == 130
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch.setattr(Fake, "score_files", whole)
    fakes["v7"].scored.clear()
    assert evaluate(*models("v7"), "--rated", labels, "--out", out) == 0
    assert len(fakes["v7"].scored) == CLIPS - 5


def test_one_clip_twice_in_a_set_is_refused(fakes, tmp_path, capsys):
    labels = write_labels(tmp_path / "rated")
    labels.write_text(labels.read_text() + "toy,00.flac,3,c0\n")
    assert evaluate(*models("v7"), "--rated", labels, "--out", tmp_path / "out") == 2
    assert "rated twice" in capsys.readouterr().err


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture
def html(fakes, tmp_path):
    labels = write_labels(tmp_path / "rated", name="nisqa_p501")
    shards = write_dataset(tmp_path / "made<b>", 1, 4)
    fakes["run"].broken = ("03.flac",)
    asked = [*models("v7", "run", "nisqa", "utmos"), "--padding", "both"]
    asked += ["--rated", labels, "--shards", shards]
    assert evaluate(*asked, "--out", tmp_path / "out") == 1
    return (tmp_path / "out" / "evaluation.html").read_text("utf-8")


def test_the_page_shows_everything_and_asks_nothing_of_the_network(html):
    WholePage(html)
    outside = [part for part in re.findall(r"https?://[^\s\"'<]+", html) if "w3.org" not in part]
    assert not outside and "default-src 'none'" in html
    assert set(re.findall(r'<td(?: class="([^"]*)")? title=', html)) <= {"", "above", "below"}
    assert "made<b>" not in html and "made&lt;b&gt;" in html
    sets = json.loads(re.search(r'id="clips">(.*?)</script>', html, re.DOTALL)[1])
    sound = json.loads(re.search(r'id="sound">(.*?)</script>', html, re.DOTALL)[1])
    assert len(sets) == CLIPS - 1 + 4 and len(sound) == CLIPS - 1
    names = {f"{model} ({padding})" for model in ("v7", "run") for padding in ("zero", "repeat")}
    assert sets[0]["scores"].keys() == names | {"nisqa"}
    assert html.count('<tr class="published">') == 11 + 11  # of the set, and the whole table
    for text in ("published, not measured here", "pip install utmos-pytorch", "03.flac", "Holm"):
        assert text in html
    # Figure 3 and Table I; scatters, residuals; the shards
    assert html.count("<figure>") == 2 + (5 + 5) + 3
    assert html.count('data-c="0"') == 5 + 5  # a clip's dots in all charts of its set


def test_audio_from_outside_a_tables_folder_is_not_in_the_page(fakes, tmp_path, capsys):
    rows = csv_rows(write_labels(tmp_path / "elsewhere"))
    (tmp_path / "rated").mkdir()
    labels, out = tmp_path / "rated/labels.csv", tmp_path / "out"
    paths = [f"{tmp_path}/elsewhere/{row['path']}" for row in rows]
    labels.write_text(csv_text([row | {"path": p} for row, p in zip(rows, paths, strict=True)]))
    assert evaluate(*models("v7"), "--rated", labels, "--out", out) == 0
    assert "24 rated clips lie outside" in capsys.readouterr().out
    html = (out / "evaluation.html").read_text("utf-8")
    assert json.loads(re.search(r'id="sound">(.*?)</script>', html, re.DOTALL)[1]) == {}


def test_audio_in_the_page_is_spread_over_the_ratings_and_limited(tmp_path):
    labels = write_labels(tmp_path / "rated")
    paths = {n: labels.parent / f"{n:02d}.flac" for n in range(CLIPS)}
    truths = {n: float(n) for n in paths}
    whole = page.embedded(paths, truths, 5)
    assert len(whole.clips) == CLIPS and "24 of 24" in whole.said
    part = page.embedded(paths, truths, sum(map(len, whole.clips.values())) / 4e6)
    assert 3 <= len(part.clips) <= 8 and "left out" in part.said
    assert min(part.clips) < 6 and max(part.clips) > 17
    assert page.embedded(paths, truths, 0).clips == {}
    soundfile.write(tmp_path / "long.wav", np.zeros(RATE * 20), RATE)
    cut = page.embedded({0: tmp_path / "long.wav"}, {0: 3.0}, 5)
    assert "1 of them cut after 12 s" in cut.said


@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
@pytest.mark.slow
def test_a_person_sorts_points_and_listens(html, tmp_path):
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.html").write_text(html, "utf-8")
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"],
        )
        try:
            _try_page(browser, (tmp_path / "page.html").as_uri())
        finally:
            browser.close()


def _try_page(browser, address):
    wide = browser.new_page(viewport={"width": 1400, "height": 900})
    faults, asked = [], []
    wide.on("pageerror", lambda error: faults.append(str(error)))
    wide.on("console", lambda one: faults.append(one.text) if one.type == "error" else None)
    wide.on("request", lambda one: asked.append(one.url))
    wide.goto(address)
    table = wide.locator("table.sort").first

    def column(number):
        cells = table.locator(f"tbody tr td:nth-child({number})").all()
        return [cell.get_attribute("data-v") for cell in cells]

    table.locator("thead th").nth(1).locator("button").click()  # PCC, the highest first
    values = [float(value) for value in column(2)]
    assert values == sorted(values, reverse=True)
    table.locator("thead th").nth(2).locator("button").click()  # Spearman: Table I's are last
    values = column(3)
    assert values.index("") > 0 and set(values[values.index("") :]) == {""}
    dot = wide.locator("svg.live use[data-c]").nth(2)
    dot.scroll_into_view_if_needed()
    dot.hover(force=True)
    tip = wide.locator("#tip").inner_text()
    assert ".flac" in tip and "v7 (zero)" in tip
    clip = wide.locator("use.hot").first.get_attribute("data-c")
    assert wide.locator(f'use[data-c="{clip}"]').count() == wide.locator("use.hot").count() > 5
    dot.click(force=True)
    for _ in range(100):  # the page's policy forbids Playwright's own way to wait
        if wide.locator("#player audio").evaluate("audio => audio.currentTime") > 0.05:
            break
        wide.wait_for_timeout(100)
    else:
        pytest.fail("the clip does not play")
    assert "rated" in wide.locator("#player span").inner_text()
    assert not faults and all(one.startswith(("file:", "data:")) for one in asked)
    phone = browser.new_page(viewport={"width": 390, "height": 844})
    phone.goto(address)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390


# --- the published numbers ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_shared
def test_published_scorers_give_what_is_known_of_them(shared, tmp_path):
    pytest.importorskip("speechmos")
    asked = [*models("distillmos", "dnsmos-p808"), "--audio-mb", "0"]
    labels = shared / "data/mos/labels.csv"
    assert evaluate(*asked, "--rated", labels, "--out", tmp_path) == 0
    found = {
        (row["model"], row["set"]): round(row["pcc"], 3)
        for row in json.loads((tmp_path / "results.json").read_text())["sets"]
    }
    assert found == {
        ("distillmos", "p835ref_wb16"): 0.906,
        ("distillmos", "p835ref_nb"): 0.925,
        ("dnsmos-p808", "p835ref_wb16"): 0.826,
        ("dnsmos-p808", "p835ref_nb"): 0.851,
    }
