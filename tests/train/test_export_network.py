"""The network as ONNX has it, against the student that it was made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.export_helpers import TINY, lively
from tests.tolerance import STUDENT, spectrum_rounding
from train.export.network import PlainSpectrum, PlainStudent
from train.models.features import compressed_spectrum, peak_normalise
from train.models.student import VARIANTS, Student, StudentConfig

CROP = 122_880


def noise(seed: int, batch: int = 2) -> torch.Tensor:
    return 0.1 * torch.randn(batch, CROP, generator=torch.Generator().manual_seed(seed))


def test_the_spectrum_is_the_models_own() -> None:
    waves = noise(0)
    own, found = compressed_spectrum(peak_normalise(waves)), PlainSpectrum()(waves)
    assert own.abs().max() > 1
    allowed = spectrum_rounding(own)
    assert allowed.median() < 2e-5
    assert ((found - own).abs() <= allowed).all()


@settings(max_examples=4, deadline=None)
@example(seed=364, gain=1.0, end=101039)  # a bin at -131 dB is off by .0016
@given(st.integers(0, 1000), st.floats(1e-6, 1e3), st.integers(0, CROP))
def test_of_any_level_with_silence_anywhere(seed: int, gain: float, end: int) -> None:
    waves = gain * noise(seed, 1)
    waves[:, end:] = 0
    own = compressed_spectrum(peak_normalise(waves))
    found = PlainSpectrum()(waves)
    assert torch.isfinite(found).all()
    assert ((found - own).abs() <= spectrum_rounding(own)).all()
    assert torch.equal(found[own == 0], own[own == 0])


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        VARIANTS["v1"],
        TINY.model_copy(update={"heads": (1, 2), "head_dim": 4, "feedforward": (5, 9)}),
        TINY.model_copy(update={"norm_width": 12, "head_dim": 4, "pool": 3}),
    ],
    ids=["tiny", "v1", "slim", "slim-norm"],
)
def test_the_plain_network_scores_as_the_student(config: StudentConfig) -> None:
    student = lively(Student(StudentConfig.model_validate(config.model_dump())))
    waves = torch.cat((noise(1), torch.zeros(1, CROP)))
    with torch.inference_mode():
        own, found = student(waves), PlainStudent(student).eval()(waves)
    assert own.std() > 1e-3
    assert (own - found).abs().max() < STUDENT


def test_v7_scores_as_published(shared: Path) -> None:
    from train.export.clips import read_clips
    from train.models.student import load_v7

    waves = torch.from_numpy(np.stack(read_clips(shared / "data" / "mos" / "labels.csv", 2)))
    student = load_v7()
    with torch.inference_mode():
        difference = student(waves) - PlainStudent(student).eval()(waves)
    assert difference.abs().max() < STUDENT
