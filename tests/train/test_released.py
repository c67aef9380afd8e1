"""The released students: whole, small, called by name, and as good as their cards say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import yaml

from data_specs.rated import read_rated
from tests.tolerance import STUDENT
from tests.train_helpers import tone_pcm
from train.__main__ import main
from train.export.clips import read_clips
from train.metrics import agreement
from train.models.loading import RELEASED, released
from train.models.student import count
from train.scoring import bundle
from train.scoring.score import load

MOST_BYTES = 2_000_000
"""Of all weights and ONNX files together."""


def test_there_are_two_and_they_are_small():
    assert {"small", "tiny"} <= set(released())
    files = [
        RELEASED / name / file for name in released() for file in (bundle.WEIGHTS, bundle.ONNX)
    ]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    assert count(load("tiny").network.config)[0] < count(load("small").network.config)[0] < 400_000


@pytest.mark.parametrize("name", released())
def test_a_card_names_data_licence_and_maker(name):
    bundle.verify(RELEASED / name)
    text = (RELEASED / name / bundle.CARD).read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    about = json.loads((RELEASED / name / bundle.DESCRIPTION).read_text())
    for known in (about["recipe_hash"], about["made_from"]["weights_sha256"], "LibriSpeech"):
        assert known in text
    assert "fill in" not in text and "not trained on" in text


@pytest.mark.parametrize("name", released())
def test_it_scores_by_its_name(name, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone_pcm(0, 30_000), 16_000)
    options = ["--model", name, "--out", str(tmp_path / "s.jsonl")]
    assert main(["score", str(tmp_path / "a.wav"), *options]) == 0
    (row,) = map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())
    assert row["model"] == name and 1 < row["mos"] < 5


@pytest.mark.shared
@pytest.mark.parametrize("name", released())
def test_the_onnx_file_says_the_same(name, shared):
    pytest.importorskip("onnxruntime")
    waves = read_clips(shared / "data" / "mos" / "labels.csv", 20)
    ours, exported = load(name), load(RELEASED / name / bundle.ONNX)
    assert (
        np.abs(np.subtract(*(one.score_windows(waves) for one in (ours, exported)))).max() < STUDENT
    )


@pytest.mark.shared
@pytest.mark.parametrize("name", released())
def test_the_results_on_its_card_come_out_again(name, shared):
    clips = read_rated(shared / "data" / "mos" / "labels.csv")
    results = json.loads((RELEASED / name / bundle.DESCRIPTION).read_text())["results"]
    stated = {
        (row["set"], row["padding"]): float(row["pcc"].split()[0])
        for row in results
        if row["model"] == name and row["kind"] == "rated"
    }
    assert len(stated) == 4
    for (of, padding), pcc in stated.items():
        rated = [clip for clip in clips if clip.dataset == of]
        scores = load(name).score_files([clip.path for clip in rated], padding)
        found = agreement([clip.mos for clip in rated], [score.mos for score in scores])
        # Printed to .001; weights were rounded to 16 bits after that: scores by some 2^-11.
        assert found.pcc == pytest.approx(pcc, abs=0.002)
