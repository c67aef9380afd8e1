"""The training report: complete, self-contained, and plain about what is missing."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_specs.io.listen import in_words, quantity, spectrogram_png
from tests.fake_dataset import write_dataset
from tests.train_helpers import write_tar
from train import charts
from train.__main__ import main
from train.files import csv_text
from train.report import draws, reading, report

VOID = {"meta", "img", "br", "link"}


class WholePage(HTMLParser):
    """Asserts that elements close in order, ids differ, and nothing is asked of the network."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)
        assert not self.open and len(self.ids) == len(set(self.ids))
        assert all(one.startswith("data:") or one[1:] in self.ids for one in self.addresses)
        assert "url(" not in html and "@import" not in html and "<script src" not in html

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.addresses += [str(values[name]) for name in ("src", "href") if values.get(name)]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


OWN = "a" * 64


def write_run(run: Path) -> Path:
    run.mkdir()
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 1 / step, "lr": 1e-3, "samples_per_s": 300, "data_wait_share": 0.1}
        for step in range(50, 501, 50)
    ]
    held_out = {"loss": 0.2, "pcc": 0.9, "rmse": 0.4}
    lines.append({"step": 500} | {f"validation_{name}": v for name, v in held_out.items()})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "log.jsonl").write_text(text + '{"step": 550, "lo')  # cut by a crash
    about = {"student": "v2", "parameters": 287_361, "metrics": {"pcc": 0.9, "rmse": 0.4}}
    about["weights_sha256"] = OWN
    (run / "model.json").write_text(json.dumps(about))
    return run


def write_evaluation(folder: Path, model: str, shards: str) -> Path:
    folder.mkdir()
    common = {"clips": 10, "pcc": 0.876, "spearman": None, "rmse": 0.4}
    sets = [
        {"model": f"runs/{model}", "set": "wb", "padding": "zero", "kind": "rated", **common},
        {"model": "v7", "set": "wb", "padding": "zero", "kind": "rated", **common},
        {"model": f"runs/{model}", "set": shards, "padding": "none", "kind": "shards", **common},
    ]
    for row in sets:
        row["weights_sha256"] = "b" * 64 if row["model"] == "v7" else OWN
    (folder / "results.json").write_text(json.dumps({"sets": sets}))
    rows = [
        {name: row[name] for name in ("model", "set", "padding")}
        | {"path_or_key": f"{index:09d}", "truth": 3, "score": 2 + index / 10}
        for row in sets
        for index in range(10)
    ]
    (folder / "scores.csv").write_text(csv_text(rows))
    return folder


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    top = tmp_path_factory.mktemp("report")
    run, shards = write_run(top / "run-v2"), write_dataset(top / "shards")
    evaluation = write_evaluation(top / "evaluation", run.name, shards.name)
    out = top / "page" / "report.html"
    argv = ["--run", str(run), "--shards", str(shards), "--evaluation", str(evaluation)]
    assert main(["report", *argv, "--out", str(out)]) == 0
    return out.read_text("utf-8")


def test_the_page_is_whole_and_asks_nothing_of_the_network(html: str) -> None:
    WholePage(html)
    assert "<script" not in html


def test_every_section_has_its_content(html: str) -> None:
    assert 'class="gap"' not in html
    for text in ("0.876", "287,361", "0123abcd" * 8, "std. errors", "enhance: spectral gating"):
        assert text in html
    assert html.count("<audio") == report.PLAYERS
    assert "student <strong>" in html and "people's mean opinion score" in html
    assert "python -m train report --run" in html


def test_text_from_outside_is_escaped(html: str) -> None:
    assert "slt &lt;b&gt;" in html and "slt <b>" not in html


def test_what_is_missing_is_said_with_its_command(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    main(["report", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")])
    html = (tmp_path / "r.html").read_text("utf-8")
    WholePage(html)
    assert html.count('class="gap"') == 5
    for command in ("python -m train fit", "python -m train evaluate", "python -m pipeline shards"):
        assert command in html


def test_damaged_input_is_an_error_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    (run / "model.json").write_text("{")
    assert main(["report", "--run", str(run), "--out", str(tmp_path / "r.html")]) == 2
    assert "model.json: not JSON" in capsys.readouterr().err


def test_decisions_are_counted_against_the_recipe(tmp_path: Path) -> None:
    dataset = reading.read_dataset(write_dataset(tmp_path, shards=2, samples=100))
    rows = {row["name"]: row for row in draws.decisions(dataset)}
    assert rows["room"]["asked"] == pytest.approx(33)
    assert abs(rows["room"]["errors"]) < 4 and abs(rows["noise"]["errors"]) < 4
    assert rows["enhance"]["drawn"] == 100 and rows["enhance: none"]["of"] == 200
    assert rows["capture"]["drawn"] == 0 and rows["capture"]["errors"] < -4


def test_an_equalisers_points_are_one_distribution(tmp_path: Path) -> None:
    dataset = reading.read_dataset(write_dataset(tmp_path))
    charts_by_title = {chart["title"]: chart for chart in draws.parameters(dataset)}
    coloured = sum(
        len(r.plan["steps"]) and r.plan["speech_steps"] for r in dataset.records.values()
    )
    assert charts_by_title["colour, equalise: gain"]["n"] == 5 * coloured


def test_a_plan_in_words() -> None:
    plan = {
        "speech": {"path": "de/eva/1.flac", "start_sample": 24_000, "speaker": "eva"},
        "speed": 1.034,
        "level_dbfs": -22.14,
        "speech_steps": 0,
        "room": None,
        "noise": {"path": "hum.flac", "snr_db": 12.34},
        "steps": [{"stage": "codec", "kind": "opus", "params": {"bitrate_bps": 24_000.0}}],
    }
    assert in_words(plan) == [
        "speech de/eva/1.flac from 1.5 s (eva)",
        "speed x 1.03",
        "noise hum.flac at 12.3 dB SNR",
        "codec: opus (bitrate 24000 bit/s)",
        "level -22.1 dBFS",
    ]
    assert quantity("reduction", 0.91234) == "reduction 0.912"


@pytest.mark.parametrize("samples", [100, 122_880])
def test_a_spectrogram_is_a_png_for_any_length(samples: int) -> None:
    png = spectrogram_png(np.zeros(samples, np.int16), width=64, height=32)
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")


def test_a_chart_survives_flat_and_single_values() -> None:
    for values in ([3.0], [0.0, 0.0], [1e-9, 1e9], [1e308, -1e308]):
        svg = charts.lines("t", "x (s)", "y", {"a": (values, values)})
        assert "nan" not in svg.lower() and re.search(r'viewBox="0 0 \d+ \d+"', svg)


def test_a_chart_takes_the_pages_colours_and_marks_its_dots() -> None:
    x, y = [1.0, 2.5, 4.0], [1.5, 9.0, -3.0]
    svg = charts.scatter("a & <b>", ("$\\x$", "y"), (x, y), first=7)
    assert "$\\x$" in svg  # not taken for a formula
    assert re.findall(r'data-c="(\d+)"', svg) == ["7", "8", "9"] and "var(--one)" in svg
    assert "url(" not in svg and "#1f5fa8" not in svg and 'aria-label="a &amp; &lt;b&gt;"' in svg
    small = charts.lines("t", "x", "y", {"a": ((1, 2), (0.0012, 0.0016))})
    assert re.search(r">1\.2\d*<", small) and "1e−3<" in small  # places are rounded, ticks are not
    assert svg == charts.scatter("a & <b>", ("$\\x$", "y"), (x, y), first=7)


# --- damaged input --------------------------------------------------------------------------------


def page_of(top: Path) -> int:
    argv = ["--run", str(top / "run"), "--shards", str(top / "shards")]
    argv += ["--evaluation", str(top / "evaluation"), "--out", str(top / "r.html")]
    return main(["report", *argv])


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, shards and an evaluation; of what is read no chart is drawn, which would take long."""
    for name in ("lines", "scatter", "histogram", "columns"):
        monkeypatch.setattr(charts, name, lambda *_, **__: "")
    write_run(tmp_path / "run")
    shards = write_dataset(tmp_path / "shards", shards=2, samples=2)
    for tar in shards.glob("*.tar"):
        record = json.loads(tar.with_suffix(".json").read_text())
        record["tar_sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
        tar.with_suffix(".json").write_text(json.dumps(record))
    write_evaluation(tmp_path / "evaluation", "run", "shards")
    return tmp_path


def test_no_damaged_shard_is_taken_for_good(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = inputs / "shards" / "shard-000001.tar"
    whole, rng = tar.read_bytes(), np.random.default_rng(0)
    assert page_of(inputs) == 0
    for place in rng.integers(0, len(whole), 20):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        tar.write_bytes(broken)
        assert page_of(inputs) == 2
        assert "shard-000001.tar: content differs" in capsys.readouterr().err


def test_damage_that_no_hash_tells_is_one_sentence(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_dataset(inputs / "shards", shards=1, samples=2)  # its records have no hashes
    tar = folder / "shard-000000.tar"
    whole, rng = tar.read_bytes(), np.random.default_rng(1)
    for _ in range(16):
        broken = bytearray(whole)
        # Headers and records: where a changed byte changes what the page is made of.
        places = [m.start() for m in re.finditer(rb"[0-9a-z]{3,}\.json|\{", whole)]
        start = int(rng.choice(places))
        broken[start + int(rng.integers(0, 300))] ^= 1 << int(rng.integers(8))
        tar.write_bytes(broken)
        status, error = page_of(inputs), capsys.readouterr().err
        assert status == 0 or ((status == 2 and "shard-000000.tar" in error) or "sample 0" in error)


def change_plan(folder: Path, change: Any) -> None:
    """Write a shard whose first sample's plan is another; its record fits."""
    tar = folder / "shard-000000.tar"
    with tarfile.open(tar) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    record = json.loads(members[1][1])
    change(record["plan"])
    members[1] = (members[1][0], json.dumps(record).encode())
    write_tar(tar, members, samples=2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda plan: plan.clear(), "speech"),
        (lambda plan: plan.update(speech=3), "speech"),
        (lambda plan: plan.update(speed="fast"), "speed"),
        (lambda plan: plan.update(level_dbfs="1.5"), "level_dbfs"),
        (lambda plan: plan.update(noise={"path": "a"}), "noise.snr_db"),
        (lambda plan: plan.update(steps=[{"stage": "a"}]), "steps[0].kind"),
        (
            lambda plan: plan.update(steps=[{"stage": "a", "kind": "b", "params": {"x": None}}]),
            "steps[0].params.x",
        ),
    ],
)
def test_another_programs_plan_is_named(
    inputs: Path, change: Any, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_plan(inputs / "shards", change)
    assert page_of(inputs) == 2
    assert f"sample 000000000: plan: {field}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run/log.jsonl", '{"step": 1}\n{"step": "x"}\n'),
        ("run/log.jsonl", '{"step": 1, "loss": []}\n'),
        ("run/log.jsonl", "{nothing}\n"),
        ("run/model.json", '{"parameters": "many"}'),
        ("run/model.json", "[" * 100_000),
        ("shards/dataset.json", "{}"),
        ("shards/dataset.json", '{"recipe": {"name": 3}, "recipe_hash": "0"}'),
        ("shards/shard-000000.json", '{"samples": 2, "tar_bytes": 1}'),
        ("evaluation/results.json", '{"sets": [{}]}'),
        ("evaluation/scores.csv", "model,set\nv7,wb\n"),
        ("evaluation/scores.csv", "model,set,path_or_key,truth,score\nv7,wb,a,3,good\n"),
    ],
)
def test_every_damaged_file_is_named_in_one_sentence(
    inputs: Path, file: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (inputs / file).write_text(text)
    assert page_of(inputs) == 2
    error = capsys.readouterr().err
    named = file.replace("shard-000000.json", "shard-000000")
    assert error.startswith("error: ") and named in error


def test_of_a_large_dataset_some_shards_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_RECORDS", 4)
    dataset = reading.read_dataset(write_dataset(tmp_path, shards=5, samples=2))
    assert list(dataset.records) == [f"{i:09d}" for i in (0, 1, 6, 7)]
    assert dataset.total == 10 and dataset.which == "4 of 10 samples"
    assert len(report.players(dataset, None, "run")) == 4
