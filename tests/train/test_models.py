"""The networks: v7 is the published one, the family has the shapes it says."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from tests.tolerance import HALF_PRECISION, STUDENT, spectrum_rounding
from tests.train_helpers import SHARED, needs_shared, tone, tones
from train.models.distil import outputs_of
from train.models.features import FREQUENCIES, compressed_spectrum, frames, peak_normalise
from train.models.head import TransformerHead
from train.models.student import (
    VARIANTS,
    Student,
    StudentConfig,
    count,
    load_v7,
    training_layout,
    variant,
)
from train.models.teacher import load_teacher


@torch.inference_mode()
def published_score(published, wave_T: np.ndarray, rate: int) -> float:
    waves_BT = torch.from_numpy(wave_T)[None]
    if rate != 16_000:
        waves_BT = torchaudio.transforms.Resample(rate, 16_000)(waves_BT)
    return published(waves_BT).item()


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_v7_at_other_rates(published, v7, rate):
    wave_T = tone(4, 2 * rate)
    expected = published_score(published, wave_T, rate)
    assert v7.score(wave_T, rate) == pytest.approx(expected, abs=STUDENT)


@needs_shared
@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_v7_on_all_rated_recordings(published, v7):
    with (SHARED / "data/mos/labels.csv").open() as file:
        paths = [SHARED / "data/mos" / row["path"] for row in csv.DictReader(file)]
    paths += sorted((SHARED / "data/mos/xlsr_sqa_samples").glob("*.flac"))
    differences = []
    for result in v7.score_files(paths):
        wave_TC, rate = soundfile.read(result.path, dtype="float32", always_2d=True)
        expected = published_score(published, np.ascontiguousarray(wave_TC[:, 0]), rate)
        differences.append(abs(result.mos - expected))
    assert len(differences) == len(paths)
    assert max(differences) < STUDENT


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install distillmos"):
        load_v7()


def test_spectrum_shape_and_compression():
    waves_BT = torch.randn(2, 122_880)
    spectrum = compressed_spectrum(waves_BT)
    assert spectrum.shape == (2, 2, FREQUENCIES, frames(122_880)) == (2, 2, 161, 768)
    louder = compressed_spectrum(waves_BT * 10)
    assert ((louder - spectrum * 10**0.3).abs() <= spectrum_rounding(louder)).all()


def test_spectrum_stays_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert compressed_spectrum(torch.randn(1, 1600)).dtype == torch.float32


def test_silence_is_finite():
    silence_BT = torch.zeros(1, 122_880)
    assert torch.isfinite(compressed_spectrum(peak_normalise(silence_BT))).all()


@pytest.mark.parametrize("name", ["v1", "v2", "v3", "v4"])
def test_student_answers_one_score_a_clip(name):
    student = Student(variant(name)).eval()
    mos_B = student(torch.randn(2, 122_880))
    assert mos_B.shape == (2,)
    assert ((mos_B >= 1) & (mos_B <= 5)).all()


def test_the_layout_in_memory_changes_no_score_and_wide_students_learn_with_channels_first():
    student = Student(variant("v1")).eval()
    waves_BT = torch.randn(2, 122_880)
    last_B = student(waves_BT)
    student.lay_out(torch.contiguous_format)
    with outputs_of([student.convolutions[0]]) as maps:
        first_B = student(waves_BT)
    assert maps[0].is_contiguous()
    torch.testing.assert_close(first_B, last_B, rtol=0, atol=STUDENT)
    taken = {
        name: training_layout(config, torch.device("cpu")) for name, config in VARIANTS.items()
    }
    wide = [name for name, layout in taken.items() if layout == torch.contiguous_format]
    assert wide == ["v5", "v6", "v7", "v8", "v9", "v10"]


def test_level_does_not_matter():
    student = Student(variant("v1")).eval()
    waves_BT = torch.randn(1, 122_880)
    torch.testing.assert_close(student(waves_BT), student(waves_BT * 0.01), rtol=0, atol=STUDENT)


def test_sizes():
    sizes = {name: count(config)[0] for name, config in VARIANTS.items()}
    assert list(sizes) == [f"v{k}" for k in range(1, 11)]
    assert sorted(sizes.values()) == list(sizes.values())
    assert sizes["v7"] == 4_133_226
    assert 180_000 <= sizes["v2"] <= 300_000
    assert 20_000 < sizes["v1"] < 60_000
    assert 25e6 < sizes["v10"] < 35e6
    assert VARIANTS["v7"].tokens == 384
    assert VARIANTS["v7"].features == 1024


@pytest.mark.parametrize("shape", [(122_880,), (1, 122_879)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="122880"):
        Student(variant("v1"))(torch.zeros(shape))


def test_head_takes_shorter_sequences_only():
    head = TransformerHead(features=8, tokens=10, dim=4, heads=2, layers=1).eval()
    assert head(torch.randn(3, 6, 8)).shape == (3,)
    with pytest.raises(ValueError, match="at most 10"):
        head(torch.randn(3, 11, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": ((1, 1),)}, "strides"),
        ({"heads": 3}, "heads"),
        ({"channels": (8,) * 9, "strides": ((2, 1),) * 9}, "no frequency bin"),
        ({"kernel": 5}, "kernel"),
    ],
)
def test_bad_configurations(change, message):
    good = {"channels": (8, 8), "strides": ((2, 2), (2, 2)), "dim": 8, "heads": 2, "layers": 1}
    with pytest.raises(ValueError, match=message):
        StudentConfig.model_validate(good | change)


def test_unknown_names():
    with pytest.raises(ValueError, match="known are v1"):
        variant("v11")
    with pytest.raises(ValueError, match="distillmos, dnsmos"):
        load_teacher("nisqa")
    with pytest.raises(ValueError, match="auto, bf16, fp16, fp32"):
        load_teacher("distillmos", precision="fp8")


def test_teacher_does_not_depend_on_the_batch():
    waves_BT = tones(3)
    teacher = load_teacher("distillmos", precision="fp32")
    mos_B, logit_B = teacher.score(waves_BT)
    assert mos_B.dtype == logit_B.dtype == np.float32
    for k in range(3):
        assert teacher.score(waves_BT[k : k + 1])[0][0] == mos_B[k]
    with torch.inference_mode():
        expected = load_v7()(waves_BT).numpy()
    np.testing.assert_allclose(mos_B, expected, atol=STUDENT)


def test_teacher_in_bf16_is_close():
    waves_BT = tones(2)
    exact = load_teacher("distillmos", precision="fp32").score(waves_BT)[0]
    rounded = load_teacher("distillmos", precision="bf16").score(waves_BT)[0]
    assert np.abs(exact - rounded).max() < HALF_PRECISION


def test_teacher_refuses_bad_waves():
    teacher = load_teacher("distillmos", precision="fp32")
    with pytest.raises(ValueError, match="not finite"):
        teacher.score(np.full((1, 122_880), np.nan, np.float32))
    with pytest.raises(ValueError, match="shape"):
        teacher.score(np.zeros((1, 5), np.float32))
    assert teacher.score(np.zeros((0, 122_880), np.float32))[0].shape == (0,)


@pytest.mark.parametrize(("name", "scale"), [("dnsmos", "ovrl_mos"), ("dnsmos-p808", "p808_mos")])
def test_dnsmos_is_the_package(name: str, scale: str):
    dnsmos = pytest.importorskip("speechmos.dnsmos")
    wave_T = tone(1)
    mos_B, logit_B = load_teacher(name).score(wave_T[None])
    assert logit_B is None
    assert mos_B[0] == pytest.approx(dnsmos.run(wave_T, 16_000)[scale], abs=STUDENT)
