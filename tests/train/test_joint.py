"""Training and structured pruning in one run: ``prune-structured --shards``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from tests.export_helpers import write_run
from tests.train.test_gates import CUT, FINE, some_gates
from tests.train.test_pruned_models import TINY, random_student
from tests.train_helpers import (
    dies_writing,
    interrupted,
    killed,
    logged,
    require_same_states,
    tones,
    write_dataset,
)
from train.models.student import StudentConfig, count, macs_of
from train.pruning import prune_structured
from train.pruning.gates import cut, gated
from train.pruning.joint import Joint, of_low_rank
from train.scoring.score import load


def test_a_student_of_low_rank_is_near_is_counted_and_goes_through_json():
    student = random_student(TINY)
    low = of_low_rank(student)
    parameters, macs = count(low.config)
    assert parameters == sum(p.numel() for p in low.parameters())
    assert 0.9 * macs_of(TINY) < macs <= macs_of(TINY)
    config = StudentConfig.model_validate_json(low.config.model_dump_json())
    assert config == low.config
    with pytest.raises(ValueError, match="low rank already"):
        of_low_rank(low)
    gates, values_N = some_gates(low)
    with torch.inference_mode():
        gated_B = functional_call(low, gated(low, gates.layout, values_N), (tones(1),))
        left = cut(low, gates.layout, values_N)
        torch.testing.assert_close(left(tones(1)), gated_B, rtol=0, atol=CUT)
    assert left.config.ranks is not None and left.config.ranks < low.config.ranks
    assert macs_of(left.config) < macs


def joint(model: Path, shards: Path, out: Path, *more: object) -> Path:
    parser = argparse.ArgumentParser()
    prune_structured.add_arguments(parser)
    words = ["--model", model, "--shards", shards, "--out", out, "--keep-macs", 0.6]
    words += ["--steps", 8, "--batch", 2, "--validate-every", 4, "--lr", 1e-3, "--warmup", 1]
    words += ["--importance-clips", 2, "--clips", 2, "--repeats", 1, "--workers", 0]
    words += ["--device", "cpu", "--log-every", 1, "--checkpoint-every", 1, "--logger", "none"]
    assert prune_structured.run(parser.parse_args([str(word) for word in (*words, *more)])) == 0
    return out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_run(tmp_path / "model", random_student(FINE))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "shards", shards=2, samples=4, validation=3)


@pytest.mark.parametrize("by", ["importance", "l0", "low-rank"])
def test_what_is_left_is_a_student_of_the_size_asked_for(
    tmp_path: Path, model: Path, shards: Path, by: str
):
    out = joint(model, shards, tmp_path / "out", "--by", by, "--gates-lr", 0.5)
    about = json.loads((out / "model.json").read_text())
    left = load(out).network
    assert sum(p.numel() for p in left.parameters()) == about["parameters"]
    share = about["macs_per_clip"] / macs_of(FINE)
    assert (0.58 if by == "importance" else 0.594) < share <= 0.6  # gates: within 1 %
    assert (left.config.ranks is not None) == (by == "low-rank")
    report = json.loads((out / "structured.json").read_text())
    assert report["multiply-adds a clip"]["after"] == about["macs_per_clip"]
    lines = [line for line in logged(out) if "loss" in line]
    assert len(lines) == 8 and all(math.isfinite(line["loss"]) for line in lines)
    assert json.loads((out / "config.json").read_text())["by"] == by


def test_importance_trains_the_student_that_is_cut(tmp_path: Path, model: Path, shards: Path):
    out = tmp_path / "out"
    with interrupted(Joint, 1):
        joint(model, shards, out, "--by", "importance", "--keep-macs", 0.9)
    (out / "last.pt").unlink()  # as if killed before the first one: another budget counts
    joint(model, shards, out, "--by", "importance")
    start = json.loads((out / "start" / "model.json").read_text())
    left = json.loads((out / "model.json").read_text())
    assert start["config"] == left["config"] and start["macs_per_clip"] <= 0.6 * macs_of(FINE)
    trained = torch.load(out / "last.pt", weights_only=True)["student"]
    assert sum(tensor.numel() for tensor in trained.values()) < 0.9 * count(FINE)[0]


@pytest.mark.parametrize(
    ("by", "step"),
    [("l0", 3), ("l0", 6), ("importance", 3)],
    ids=["while gates are open", "after the choice", "importance"],
)
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(
    tmp_path: Path, model: Path, shards: Path, by: str, step: int
):
    whole = joint(model, shards, tmp_path / "whole", "--by", by)
    with interrupted(Joint, step):
        joint(model, shards, tmp_path / "parts", "--by", by)
    parts = joint(model, shards, tmp_path / "parts", "--by", by)
    own = [] if by == "importance" else ["budget"]
    require_same_states(whole, parts, "student", "average", "distil", *own)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert logged(whole) == logged(parts)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, model: Path, shards: Path):
    whole = joint(model, shards, tmp_path / "whole", "--by", "low-rank")
    again = tmp_path / "parts"
    arguments = (model, shards, again, "--by", "low-rank")
    for number in (2, 5):
        killed(lambda n=number: dies_writing("last.pt", n, True, lambda: joint(*arguments)))
    joint(*arguments)
    require_same_states(whole, again, "student", "average", "budget", "distil")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "l0"], "give --shards"),
        (["--steps", "5"], "--steps: of a training"),
        (["--shards", "none"], "Give --keep-macs"),
        (["--model", "mfcc", "--shards", "none"], "--shards is for students"),
    ],
)
def test_wrong_usage_is_told(tmp_path: Path, words: list[str], message: str):
    parser = argparse.ArgumentParser()
    prune_structured.add_arguments(parser)
    words = ["--model", "v7", "--out", str(tmp_path / "out"), *words]
    with pytest.raises(ValueError, match=message):
        prune_structured.run(parser.parse_args(words))
