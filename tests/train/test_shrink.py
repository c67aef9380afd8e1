"""Encoders that lose units while they learn tasks, and layers that follow a teacher's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from data_specs.labelled import LabelledClip
from tests.train.test_conformer import conformer
from tests.train.test_encoders import write_checkpoint
from tests.train.test_finetune import command, write_clips
from tests.train.test_gates import CUT
from tests.train.test_pruned_models import TINY, random_student
from tests.train_helpers import dies_at, killed, logged, require_same_states, tones
from train.__main__ import main
from train.finetune.clips import Batch
from train.finetune.finetune import Finetuning
from train.finetune.saved import load_model
from train.finetune.terms import Distilling
from train.models.encoders.interface import SpeechEncoder
from train.models.encoders.loading import load_encoder, save_encoder
from train.models.encoders.student_encoder import StudentEncoder
from train.pruning.encoder_units import counted_macs, encoder_layout, split_encoder
from train.pruning.gates import by_group, cut, gated


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("shrink") / "clips")


def encoder_of(kind: str, folder: Path) -> SpeechEncoder:
    if kind == "student":
        return StudentEncoder(random_student(TINY))
    if kind == "conformer":
        return conformer()
    write_checkpoint(folder / kind, kind)
    return load_encoder(folder / kind)


@pytest.mark.parametrize("low_rank", [False, True], ids=["units", "ranks"])
@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "wavlm", "conformer", "student"])
def test_a_gated_encoder_is_the_cut_one_and_is_counted(kind: str, low_rank: bool, tmp_path: Path):
    encoder = encoder_of(kind, tmp_path)
    if low_rank and kind != "wavlm":
        split_encoder(encoder)
    layout = encoder_layout(encoder)
    assert any("heads" in name for name in layout.counts) == (not low_rank and kind != "wavlm")
    torch.manual_seed(0)
    gates_N = torch.rand(sum(layout.counts.values()))
    for _, gates_U in by_group(layout, gates_N):
        gates_U[len(gates_U) // 2 :] = 0
    given = (tones(2, 6000), torch.tensor([6000, 5000]))
    smaller = cut(encoder, layout, gates_N)
    with torch.inference_mode():
        before = functional_call(encoder, gated(encoder, layout, gates_N), given)
        after = smaller(*given)
    torch.testing.assert_close(after.layers, before.layers, rtol=0, atol=CUT)
    counts = {name: int(gates_U.count_nonzero()) for name, gates_U in by_group(layout, gates_N)}
    left, whole = layout.macs(counts), layout.macs(layout.counts)
    assert left < whole
    for model, macs in ((smaller, left), (encoder, whole)):
        assert counted_macs(model) == pytest.approx(
            macs, rel=0.005
        )  # wav2vec 2.0's last frame is half one
    save_encoder(tmp_path / "saved", smaller)
    with torch.inference_mode():
        again = load_encoder(tmp_path / "saved")(*given)
    torch.testing.assert_close(again.layers, after.layers, rtol=0, atol=CUT)


@pytest.mark.parametrize("by", ["l0", "low-rank", "importance"])
def test_what_is_left_has_the_size_and_the_figures_are_its_own(
    by: str, clips: Path, tmp_path: Path
):
    write_checkpoint(tmp_path / "whisper", "whisper")
    more = ["--tasks", "keywords", "--keep", 0.9, "--by", by, "--distil-from", "self"]
    assert main(command(tmp_path / "whisper", clips, tmp_path / "out", *more)) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    encoder, _, about = load_model(tmp_path / "out")
    whole = load_encoder(tmp_path / "whisper").sizes()
    left = encoder.sizes()
    assert results["parameters"] == left["parameters"] < whole["parameters"]
    # A rank costs some hundred multiply-adds a frame of 50 000, a unit of 64 less.
    assert 0.89 < left["macs_per_second"] / whole["macs_per_second"] <= 0.9
    assert about["results"]["step"] == 8
    lines = [line["macs"] for line in logged(tmp_path / "out") if "macs" in line]
    assert lines[-1] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("by", ["l0", "importance"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(by: str, clips: Path, tmp_path: Path):
    """Before and after the choice: gates, importance and multipliers are part of the state."""
    write_checkpoint(tmp_path / "whisper", "whisper")
    more = ["--tasks", "keywords", "--keep", 0.9, "--by", by, "--distil-from", "self"]
    more += ["--steps", 20, "--validate-every", 20, "--checkpoint-every", 1]
    runs = [tmp_path / name for name in ("whole", "parts")]
    words = [command(tmp_path / "whisper", clips, run, *more) for run in runs]
    assert main(words[0]) == 0
    for step in (1, 16):
        works = (lambda run, at=step: run.step == at, lambda: main(words[1]))
        killed(lambda given=works: dies_at(Finetuning, "update", *given))
    assert main(words[1]) == 0
    require_same_states(*runs, "encoder", "tasks", "terms")
    weights = [(run / "encoder.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def test_the_teacher_hears_the_clean_twin():
    encoder = StudentEncoder(random_student(TINY))
    clip = LabelledClip.model_construct(where="a.csv:2", path=Path("a.wav"))
    waves_BT, lengths_B = tones(2, 8000)[1:], torch.tensor([8000])
    states = encoder(waves_BT, lengths_B)
    clean = Batch("quality", [clip], waves_BT, lengths_B, tones(1, 8000))
    same, robust = (
        Distilling(encoder, encoder, 1.0, "cosine", hears).loss(clean, states, 0).item()
        for hears in ("same", "clean")
    )
    assert same == pytest.approx(0, abs=1e-5) and robust > 0.01
    with pytest.raises(ValueError, match="the teacher hears clean clips"):
        Distilling(encoder, encoder, 1.0, "cosine", "clean").loss(
            clean._replace(clean_BT=None), states, 0
        )


def test_a_teacher_of_more_layers_is_followed_from_the_top():
    encoder, teacher = (
        StudentEncoder(random_student(TINY.model_copy(update=change)))
        for change in ({}, {"layers": 5, "dim": 24})
    )
    term = Distilling(encoder, teacher, 0.5)
    assert term.depths == [(2, 5), (1, 3), (0, 2)]
    assert not any("teacher" in name for name in term.state_dict())
    batch = Batch("quality", [], tones(1, 8000), torch.tensor([8000]))
    term.loss(batch, encoder(*batch[2:4]), 0).backward()
    assert encoder.student.convolutions[0].weight.grad is not None
    assert teacher.student.convolutions[0].weight.grad is None
