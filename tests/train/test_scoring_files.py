"""Scoring and evaluation: windows, files, tables, exit codes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import soundfile

from data_specs.io.waves import filled
from tests.tolerance import STUDENT
from tests.train_helpers import tone, write_dataset, write_rated
from train.__main__ import main
from train.audio import clip_of, read_mono, to_16k
from train.evaluation import scorers
from train.metrics import agreement
from train.scoring.files import choose_files
from train.scoring.score import load
from train.scoring.windows import window_count


@pytest.mark.parametrize(
    ("samples", "count"),
    [(1, 1), (122_880, 1), (122_881, 2), (138_880, 2), (138_881, 3), (480_000, 24)],
)
def test_windows_are_the_published_ones(small, samples, count):
    clip = clip_of(np.arange(samples, dtype=np.float32), 16_000)
    cut = [part.wave_T for part in small.parts(clip, "repeat", "exact")]
    assert len(cut) == count == window_count(samples)
    assert all(len(part) == 122_880 for part in cut)
    if samples > 122_880:
        assert cut[-1][-1] == samples - 1
        assert np.diff([part[0] for part in cut]).max() <= 16_000


def test_short_clips():
    wave_T = np.arange(1, 1001, dtype=np.float32)
    zeros, repeated = filled(wave_T, "zero"), filled(wave_T, "repeat")
    assert not zeros[1000:].any()
    kept = len(wave_T) - 500  # half of so short a clip goes over into its beginning
    assert np.array_equal(repeated[:kept], wave_T[:kept])
    assert len(repeated) == 122_880


def test_files_and_waves_agree(small, tmp_path):
    paths = []
    for number, seconds in enumerate([1, 12, 7.68, 20]):
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], tone(number, int(seconds * 16_000)), 16_000, subtype="FLOAT")
    paths.insert(2, tmp_path / "missing.wav")
    scores = list(small.score_files(paths, batch=5))
    assert [score.path for score in scores] == paths
    assert scores[2].mos is None
    assert "missing.wav" in scores[2].error
    for score in scores[:2] + scores[3:]:
        expected = small.score(*read_mono(score.path))
        assert score.mos == pytest.approx(expected, abs=STUDENT)


def test_odd_rates_are_resampled():
    assert len(to_16k(tone(0, 16_000), 15_999)) == pytest.approx(16_001, abs=2)


@pytest.mark.parametrize("name", ["nothing", "empty", "junk.pt", "junk.safetensors"])
def test_bad_models(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.json").write_text("{}")
    with pytest.raises(ValueError, match=name):
        load(tmp_path / name)


def test_find_files(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.wav", "a.FLAC", "deep/c.ogg", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("b.wav\n\ndeep/c.ogg\n")
    names = [str(path.relative_to(tmp_path)) for path in choose_files([tmp_path]).files]
    assert names == ["a.FLAC", "b.wav", "deep/c.ogg"]
    assert list(choose_files([tmp_path / "list.txt"]).files) == [
        tmp_path / "b.wav",
        tmp_path / "deep/c.ogg",
    ]


@pytest.mark.parametrize(
    ("truth", "predicted", "reason"),
    [([], [], "no clips"), ([1], [2], "two"), ([1, 1], [2, 3], "true"), ([1, 2], [3, 3], "pred")],
)
def test_undefined_correlation_has_a_reason(truth, predicted, reason):
    result = agreement(truth, predicted)
    assert result.pcc is None
    assert reason in result.reason


def test_evaluate_command(small, tmp_path, monkeypatch):
    monkeypatch.setattr(scorers, "load", lambda *_: small)
    labels, shards = write_rated(tmp_path / "rated"), write_dataset(tmp_path / "shards", 1, 3)
    out = tmp_path / "out"
    arguments = ["--model", "v7", "--rated", str(labels), "--shards", str(shards)]
    assert main(["evaluate", *arguments, "--out", str(out), "--padding", "both"]) == 0
    results = json.loads((out / "results.json").read_text())
    found = [(row["set"], row["padding"], row["clips"]) for row in results["sets"]]
    assert found == [
        *(("set0", "zero", 3), ("set1", "zero", 3)),
        *(("set0", "repeat", 3), ("set1", "repeat", 3)),
        ("shards", "none", 3),
    ]
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert list(rows[0])[:7] == [
        "model",
        "set",
        "path_or_key",
        "truth",
        "score",
        "padding",
        "weights_sha256",
    ]
    assert main(["evaluate", "--model", "v7", "--out", str(out)]) == 2


def test_variants_command(capsys):
    assert main(["variants"]) == 0
    assert "4,133,226" in capsys.readouterr().out
