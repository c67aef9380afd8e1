"""The grid: what it judges, what it adds up, that it goes on, and its page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from tests.train_helpers import kill, killed, tone, tone_pcm, write_rated
from train.__main__ import main
from train.bootstrap import draws
from train.evaluation.score_cache import ScoreCache
from train.files import csv_rows, write_model
from train.finetune.saved import save_model
from train.finetune.tasks.words import WordsByCtc
from train.metrics import agreement
from train.models.encoders.mel import MelEncoder
from train.models.student import Student, StudentConfig
from train.robustness.clips import read_judged, some_of
from train.robustness.compress import Compressor
from train.robustness.grid import cells_of
from train.robustness.interface import DENSE, Cell, Clip
from train.robustness.quality import Quality
from train.robustness.results import ALL, Judgement, rows_of
from train.robustness.words import WordsJudged
from train.scoring.score import load
from train.word_errors import word_errors

TINY = StudentConfig(channels=(4, 4), strides=((8, 8), (8, 4)), dim=8, heads=2, layers=1)
CELLS = ["--bits", "fp32", "2", "--sparsity", "0", "50"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    torch.manual_seed(0)
    network = Student(TINY)
    folder = tmp_path_factory.mktemp("student")
    config = TINY.model_dump(mode="json")
    write_model(folder / "model.safetensors", network.state_dict(), {"config": config})
    return folder


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    return write_rated(tmp_path_factory.mktemp("rated"), clips=12, seconds=0.5, conditions=3)


def command(student, rated, out, *more):
    words = ["robustness", "--model", student, "--data", rated, "--out", out, "--device", "cpu"]
    return main([str(word) for word in (*words, "--calibrate", rated.parent, *CELLS, *more)])


@pytest.fixture(scope="module")
def whole(student, rated, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert command(student, rated, out, "--calibration-clips", "3") == 0
    return out


def test_every_cell_is_in_the_table_and_on_the_page(whole, student):
    rows = csv_rows(whole / "robustness.csv")
    compressed = [("fp32", "0.0", ""), ("2", "0.0", ""), ("int8", "0.0", "")]
    compressed += [(b, "50.0", by) for b in ("fp32", "2") for by in ("magnitude", "importance")]
    conditions = ["0", "1", "2", ALL]
    wanted = {
        (metric, *cell, condition)
        for metric in ("PCC", "RMSE") for cell in compressed for condition in conditions
    }  # fmt: skip
    names = ("metric", "bits", "sparsity", "by", "condition")
    found = [tuple(row[name] for name in names) for row in rows]
    assert set(found) == wanted and len(found) == len(wanted)
    text = (whole / "robustness.html").read_text()
    lines = re.findall(r"<tr><th scope=\"row\">[^<]*</th><td>([^<]*)</td><td>(\w+)</td>", text)
    for metric, bits, sparsity, by, condition in wanted:
        cell = Cell(bits, float(sparsity), by)
        assert lines.count((cell.label, condition)) == 2, metric  # in each metric's table
    content = json.loads((whole / "robustness.json").read_text())
    (speed,) = content["speeds"]
    assert min(value for name, value in speed.items() if name != "model") > 0
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert text.count("<svg") == 8  # four conditions, two ways to choose zeros


def test_the_worst_cell_comes_first(whole):
    rows = json.loads((whole / "robustness.json").read_text())["rows"]
    added = [row["added"] for row in rows if row["metric"] == "PCC" and row["added"] is not None]
    text = (whole / "robustness.html").read_text()
    first = text.index('id="cells1"')
    shown = re.findall(
        r'<td class="n">([+-]\d\.\d{3})(?: \[[^<]*)?</td><td class="n">', text[first:]
    )
    assert float(shown[0]) == pytest.approx(max(added), abs=0.0005)


def test_the_dense_cell_is_what_scoring_says(whole, student, rated):
    scorer, clips = load(student), read_judged(rated, "condition")
    scores = [found.mos for found in scorer.score_files([clip.path for clip in clips])]
    pcc = agreement([clip.mos for clip in clips], scores).pcc
    rows = json.loads((whole / "robustness.json").read_text())["rows"]
    (row,) = [
        row for row in rows
        if (row["metric"], row["condition"]) == ("PCC", ALL) and row["bits"] == "fp32"
        and not row["sparsity"]
    ]  # fmt: skip
    assert row["value"] == pytest.approx(pcc, abs=1e-9) and row["added"] is None


def test_a_killed_grid_goes_on_and_judges_nothing_twice(whole, student, rated, tmp_path):
    out, put, count = tmp_path / "out", ScoreCache.put, 0

    def dies(self, key, scores):
        nonlocal count
        count += 1
        if count == 29:  # in the middle of the third cell
            self._file.write('{"weights": "torn')
            self._file.flush()
            kill()
        put(self, key, scores)

    def work():
        ScoreCache.put = dies
        command(student, rated, out, "--calibration-clips", "3")

    killed(work)
    assert (out / "judged.jsonl").read_text().count("\n") == 28
    assert not (out / "robustness.csv").exists()
    assert command(student, rated, out, "--calibration-clips", "3") == 0
    lines = (out / "judged.jsonl").read_text().splitlines()
    assert len(lines) == 7 * 12 + 1  # and the torn one
    assert (out / "robustness.csv").read_bytes() == (whole / "robustness.csv").read_bytes()


def test_weights_come_back_and_zeros_are_as_many_as_asked(student):
    model = Quality(str(student), "cpu")
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    compressor = Compressor(model, [tone(1), tone(3)])
    for by in ("magnitude", "importance"):
        compressor.apply(Cell("4", 60, by))
        weights = torch.cat([model.network.get_parameter(n).flatten() for n in model.names])
        zeros = float((weights == 0).float().mean())
        assert zeros >= 0.6
        compressor.apply(Cell("fp32", 60, by))
        weights = torch.cat([model.network.get_parameter(n).flatten() for n in model.names])
        zeros = float((weights == 0).float().mean())
        # By magnitude fewer by less than a unit a tensor are left; by importance the exact count.
        assert zeros == pytest.approx(0.6, abs=0.02 if by == "magnitude" else 1e-3)
    compressor.apply(DENSE)
    after = model.network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


class Line:
    """A linear model: w changes what it says of x by w x, exactly."""

    def __init__(self):
        self.network, self.names = nn.Linear(6, 1, bias=False), ["weight"]

    def influence(self, wave_T):
        return self.network(torch.from_numpy(wave_T)).sum()


def test_importance_is_the_mean_squared_change():
    torch.manual_seed(3)
    model = Line()
    waves = list(np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32))
    weight = model.network.weight.detach().clone()
    squares = (weight * torch.from_numpy(np.stack(waves))).square().mean(0)
    Compressor(model, waves).apply(Cell("fp32", 50, "importance"))
    kept = model.network.weight.detach()[0] != 0
    assert set(kept.nonzero().flatten().tolist()) == set(squares.argsort()[3:].tolist())


def clips_of(*conditions, mos=None):
    return [Clip(None, "", name, str(n), mos and mos[n]) for n, name in enumerate(conditions)]


def test_interactions_are_differences_of_differences():
    rng = np.random.default_rng(0)
    clips = clips_of(*["a"] * 30, *["b"] * 30, mos=rng.uniform(1, 5, 60).tolist())
    truth = np.array([clip.mos for clip in clips])
    dense = truth + rng.normal(0, 0.2, 60)
    small = truth + np.where(np.arange(60) < 30, 1, 3) * rng.normal(0, 0.3, 60)
    judged = [Judgement("m", DENSE, {"mos": dense}), Judgement("m", Cell("2"), {"mos": small})]
    rows = {(r.metric, r.bits, r.condition): r for r in rows_of(Quality, clips, judged, "a", 0)}

    def pcc(scores, part):
        return float(np.corrcoef(truth[part], scores[part])[0, 1])

    a, b = slice(0, 30), slice(30, 60)
    added = {name: pcc(dense, part) - pcc(small, part) for name, part in (("a", a), ("b", b))}
    for name in "ab":
        assert rows["PCC", "2", name].added == pytest.approx(added[name])
    row = rows["PCC", "2", "b"]
    assert row.interaction == pytest.approx(added["b"] - added["a"])
    assert row.interaction_low < row.interaction < row.interaction_high
    assert row.interaction_p_holm == row.interaction_p < 0.05
    assert rows["PCC", "2", "a"].interaction is None and rows["PCC", "fp32", "b"].added is None
    # By hand, over the same resamples: RMSE added.
    counts = draws([clip.group for clip in clips], 0)
    rmse = [np.sqrt(counts @ (truth - s) ** 2 / counts.sum(1)) for s in (small, dense)]
    ends = np.percentile(rmse[0] - rmse[1], [2.5, 97.5])
    found = rows["RMSE", "2", ALL]
    assert [found.added_low, found.added_high] == pytest.approx(ends.tolist())


def test_without_ratings_the_dense_model_is_the_truth():
    clips = clips_of(*"aaaabbbb")
    dense, small = np.arange(8.0), np.array([0, 1, 2, 4, 4, 5, 7, 6.0])
    judged = [Judgement("m", DENSE, {"mos": dense}), Judgement("m", Cell("2"), {"mos": small})]
    rows = {(r.metric, r.bits, r.condition): r for r in rows_of(Quality, clips, judged, "a", 0)}
    assert rows["PCC", "fp32", "a"].value == pytest.approx(1)
    assert rows["RMSE", "2", "b"].added == pytest.approx(np.sqrt(2 / 4))


def test_cells_and_clips_are_chosen_evenly():
    cells = cells_of(["2", "fp32"], [50, 0, 50], ["importance"])
    zeros = {"sparsity": 50, "by": "importance"}
    assert cells == [DENSE, Cell("2"), Cell("fp32", **zeros), Cell("2", **zeros)]
    assert cells_of(["4"], [30], ["magnitude"]) == [DENSE, Cell("4", 30, "magnitude")]
    chosen = some_of(clips_of(*"aaaabbbbb"), 3)
    assert [clip.group for clip in chosen] == ["0", "2", "3", "4", "6", "8"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sparsity", "100"], "--sparsity 100"),
        (["--sparsity", "nan"], "--sparsity nan"),
        (["--clips", "0"], "--clips 0"),
        (["--matched", "x"], "--matched x"),
        (["--model", "none"], "none: no such model"),
        (["--data", "none.csv"], "none.csv: no such file"),
        (["--calibrate", "none"], "none: give a folder"),
    ],
)
def test_bad_input_is_named(student, rated, tmp_path, capsys, words, said):
    assert command(student, rated, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_importance_needs_clips(student, rated, tmp_path, capsys):
    words = ["robustness", "--model", student, "--data", rated, "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert "give --calibrate" in capsys.readouterr().err
    (rated.parent / "broken.wav").write_bytes(b"RIFF")
    table = rated.with_name("broken.csv")
    table.write_text("path,mos,condition\nbroken.wav,3,a\n0.wav,2,a\n")
    try:
        only = ["--bits", "fp32", "--sparsity", "0", "--clips", "9"]
        words = ["robustness", "--model", student, "--data", table, "--out", tmp_path / "out"]
        assert main([str(word) for word in (*words, *only)]) == 2
        assert "broken.wav" in capsys.readouterr().err
    finally:
        (rated.parent / "broken.wav").unlink()


# --- words ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Three clips in two conditions, without a text: each is held against its clean twin."""
    folder = tmp_path_factory.mktemp("spoken")
    lines = ["path,split,speaker,text,condition,clean"]
    for number in range(3):
        for name, seed in (("clean", number), ("noise", number + 4)):
            path = folder / f"{name}{number}.wav"
            soundfile.write(path, tone_pcm(seed, 12_000), 16_000)
            lines.append(f"{path.name},test,s{number},,{name},clean{number}.wav")
    soundfile.write(folder / "other.wav", tone_pcm(9, 12_000), 16_000)
    lines.append("other.wav,train,s9,,none,")
    table = folder / "labelled.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    """Log-mels under CTC whose weights are drawn: it hears something, and always the same."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("hearing")
    head = WordsByCtc(80)
    head.ctc.weight.data *= 20
    save_model(folder, MelEncoder(), {"words-ctc": head})
    return folder


def test_a_recogniser_is_held_against_what_it_heard_in_clean_speech(hearing, spoken, tmp_path):
    words = ["robustness", "--task", "words", "--model", hearing, "--data", spoken, *CELLS]
    words += ["--calibrate", spoken.parent, "--out", tmp_path, "--device", "cpu"]
    assert main([str(word) for word in words]) == 0
    rows = {
        (row["condition"], row["bits"], row["sparsity"], row["by"]): row
        for row in json.loads((tmp_path / "robustness.json").read_text())["rows"]
    }
    assert {row["metric"] for row in rows.values()} == {"WER"} and len(rows) == 7 * 3
    clean, noise = (rows[name, "fp32", 0, ""] for name in ("clean", "noise"))
    assert clean["value"] == 0 and noise["value"] > 0 and clean["clips"] == 3
    two = rows["clean", "2", 0, ""]
    assert two["value"] == two["added"] > 0
    again = rows["noise", "2", 0, ""]
    assert again["interaction"] == pytest.approx(again["value"] - noise["value"] - two["value"])

    model = WordsJudged(str(hearing), "cpu")
    clips = read_judged(spoken, "condition")
    assert [clip.group for clip in clips] == ["s0", "s0", "s1", "s1", "s2", "s2"]
    text = model.recogniser.hear([tone(0, 12_000)])[0]
    model.prepare(clips)
    found = list(model.judge(clips[:2]))
    assert found[0] == {"errors": 0, "words": len(text.split())}
    heard = model.recogniser.hear([tone(4, 12_000)])[0]
    assert found[1]["errors"] == word_errors(text, heard).errors
    model.recogniser.longest_s = 0.7
    with pytest.raises(ValueError, match=r"clean0.wav: 0.8 s, but .* hears 0.7 s"):
        next(model.judge(clips))


def test_a_model_without_words_is_named(student, spoken, tmp_path, capsys):
    words = ["robustness", "--task", "words", "--model", student, "--data", spoken]
    words += ["--by", "magnitude", "--out", tmp_path / "out", "--device", "cpu"]
    assert main([str(word) for word in words]) == 2
    assert f"{student}: no recogniser of words can be loaded" in capsys.readouterr().err


def test_two_clips_have_no_correlation():
    truth_N, values = np.array([1.0, 2.0, 4.0]), {"mos": np.array([1.0, 3.0, 4.0])}
    found_R = Quality.metrics["PCC"].of(np.array([[1.0, 1, 1], [2, 1, 0]]), truth_N, values)
    assert found_R[0] == pytest.approx(np.corrcoef(truth_N, values["mos"])[0, 1])
    assert np.isnan(found_R[1])
