"""Scores of arrays and files: inputs, properties, the published package, fast mode."""

from __future__ import annotations

import functools
import math
import shutil
import threading

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_specs.io.errors import UserError
from tests.export_helpers import tiny, write_run
from tests.tolerance import HALF_PRECISION, STUDENT, rounding
from tests.train_helpers import SHARED, needs_shared, tone
from train.audio import FILTERS, clip_of, open_clip, read_mono, to_16k
from train.data.loading import ahead
from train.models import loading
from train.models.features import compressed_spectrum
from train.models.loading import find_student
from train.models.student import Student, load_v7, variant
from train.scoring import code
from train.scoring import score as score_module
from train.scoring import scorer as scorer_module
from train.scoring import windows as cutting
from train.scoring.base import Scorer
from train.scoring.engine import Engine
from train.scoring.score import load
from train.scoring.scorer import StudentScorer
from train.scoring.windows import window_count, window_starts

CROP = 122_880


def wave(seconds: float, number: int = 0, rate: int = 16_000) -> np.ndarray:
    return tone(number, int(seconds * rate))


def uneven(seconds: float) -> np.ndarray:
    """Noise whose level changes: windows have peaks of their own."""
    rng = np.random.default_rng(1)
    samples = int(seconds * 16_000)
    level = 0.2 * (1.2 + np.sin(np.arange(samples) / 16_000))
    return (wave(seconds, 3) * 0.3 + level * 0.1 * rng.standard_normal(samples)).astype(np.float32)


def write(path, samples, rate=16_000):
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


# --- the published package -----------------------------------------------------------------------


def test_v7_is_the_published_package_for_every_length(v7, published):
    for samples in (500, 63_999, 100_000, CROP - 1, CROP, CROP + 1, 150_001):
        wave_T = uneven(10)[:samples]
        with torch.inference_mode():
            expected = float(published(torch.from_numpy(wave_T)[None]))
        assert v7.score(wave_T, 16_000) == pytest.approx(expected, abs=STUDENT)


@pytest.mark.slow
@needs_shared
@pytest.mark.shared
def test_bf16_and_fast_are_near_the_published_scores_of_speech(v7, published):
    path = sorted((SHARED / "data/speech/test-other").rglob("*.flac"))[0]
    speech_T = np.tile(read_mono(path)[0], 3)[: 12 * 16_000]
    with torch.inference_mode():
        expected = float(published(torch.from_numpy(speech_T)[None]))
    low = load("v7", precision="bf16")
    assert v7.score(speech_T, 16_000) == pytest.approx(expected, abs=STUDENT)
    assert low.score(speech_T, 16_000) == pytest.approx(expected, abs=HALF_PRECISION)
    assert low.score(speech_T, 16_000, mode="fast") == pytest.approx(expected, abs=0.25)


# --- the engine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v1", "v4"])
@given(samples=st.integers(1, CROP))
@settings(max_examples=12, deadline=None)
def test_the_engine_is_the_network_whatever_is_silent(name, samples):
    student = _student(name)
    wave_T = uneven(7.68)[:samples]
    padded_1T = torch.from_numpy(np.pad(wave_T, (0, CROP - samples)))[None]
    with torch.inference_mode():
        expected = float(student(padded_1T))
    engine = Engine(student, torch.float32, torch.device("cpu"))
    assert engine.scores([wave_T]) == [pytest.approx(expected, abs=STUDENT)]


def _student(name):
    """A student whose batch norms do something, as after training."""
    torch.manual_seed(2)
    student = Student(variant(name)).eval()
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for tensor in (module.running_mean, module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2)
    return student


def test_convolutions_of_short_clips_stop_after_them():
    engine = Engine(load_v7(), torch.float32, torch.device("cpu"))
    assert engine.frames_needed(4 * 16_000) == 448
    assert engine.frames_needed(CROP) == 768
    with pytest.raises(ValueError, match="at most 122880"):
        engine.frames_needed(CROP + 1)


def test_a_mixed_batch_is_its_clips_one_by_one(small):
    clips = [uneven(seconds) for seconds in (0.1, 7.68, 3, 3, 5.5)]
    together = small.score_windows(clips)
    alone = [small.score_windows([clip])[0] for clip in clips]
    assert together == pytest.approx(alone, abs=STUDENT)


def test_changed_weights_are_noticed():
    scorer = StudentScorer(_student("v1"), "changing", "0" * 64)
    before = scorer.score(uneven(2), 16_000)
    with torch.no_grad():
        scorer.network.head.pool.output.bias += 1
    assert scorer.score(uneven(2), 16_000) > before + 0.01


def test_shared_convolutions_are_those_of_the_stretch():
    # Away from a window's edges, and at one level, shared tokens are the window's own.
    engine = Engine(_student("v1"), torch.float32, torch.device("cpu"))
    stretch_T = torch.from_numpy(uneven(40))[None, : 40 * 16_000 // 1280 * 1280]
    with torch.inference_mode():
        spectrum = compressed_spectrum(stretch_T)
        pieces = engine._tokens_in_chunks(spectrum)
        whole = engine._tokens(spectrum)
    assert pieces.shape == whole.shape
    assert torch.allclose(pieces, whole, atol=rounding(9 * 128, whole.abs().max(), layers=12))


# --- windows and fast mode -----------------------------------------------------------------------


@given(samples=st.integers(1, 4_000_000), grid=st.sampled_from([1, 320, 1280]))
@settings(deadline=None)
def test_windows_on_a_grid_stay_in_the_clip(samples, grid):
    exact, snapped = window_starts(samples), window_starts(samples, grid)
    assert len(snapped) == window_count(samples)
    assert all(start % grid == 0 and 0 <= start <= max(0, samples - CROP) for start in snapped)
    assert max(abs(a - b) for a, b in zip(exact, snapped, strict=True)) < grid


def test_fast_parts_hold_the_same_windows(small):
    clip_T = uneven(75)
    clip_T[40 * 16_000 : 60 * 16_000] *= 0.01  # 40 dB: another level
    parts = list(cutting.shared_parts(clip_of(clip_T, 16_000), 1280))
    found = [
        (part.start + offset, part.wave_T[offset : offset + CROP])
        for part in parts
        for offset in part.offsets
    ]
    assert len(parts) > 2
    assert [start for start, _ in found] == window_starts(len(clip_T), 1280)
    assert all(np.array_equal(w, clip_T[start : start + CROP]) for start, w in found)
    assert all(len(part.wave_T) <= cutting.SEGMENT_SAMPLES for part in parts)


@pytest.mark.parametrize("seconds", [8, 20])
def test_fast_is_near_exact(small, seconds):
    clip_T = uneven(seconds)
    exact = small.score(clip_T, 16_000)
    assert small.score(clip_T, 16_000, mode="fast") == pytest.approx(exact, abs=0.02)
    windows_exact, windows_fast = (small.curve(clip_T, 16_000, mode) for mode in ("exact", "fast"))
    assert len(windows_exact) == len(windows_fast)
    apart = [abs(a.mos - b.mos) for a, b in zip(windows_exact, windows_fast, strict=True)]
    assert max(apart) < 0.05


def test_fast_is_exact_for_clips_of_one_window(small):
    assert small.score(uneven(5), 16_000, mode="fast") == small.score(uneven(5), 16_000)


def test_fast_needs_a_student():
    class Mean(Scorer):
        def score_windows(self, waves):
            return [float(wave.mean()) for wave in waves]

    other = Mean("other", "0" * 64, "numpy")
    with pytest.raises(ValueError, match="take exact"):
        other.score(uneven(9), 16_000, mode="fast")
    assert other.score(np.full(9 * 16_000, 0.25), 16_000) == pytest.approx(0.25)


def test_the_curve_covers_the_clip(small):
    curve = small.curve(uneven(20.5), 16_000)
    assert len(curve) == window_count(int(20.5 * 16_000))
    assert curve[0].start_seconds == 0
    assert curve[-1].end_seconds == pytest.approx(20.5)
    assert np.mean([window.mos for window in curve]) == pytest.approx(
        small.score(uneven(20.5), 16_000), abs=rounding(16, 5)
    )


# --- what goes in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "rate", "message"),
    [
        (np.zeros(0, np.float32), 16_000, "no samples"),
        (np.full(10, np.nan), 16_000, "not finite"),
        (np.array([0, np.inf]), 16_000, "not finite"),
        (np.array([0, 1e300]), 16_000, "not finite"),
        (np.zeros((2, 10), np.float32), 16_000, "one channel"),
        (np.zeros((2, 3, 4), np.float32), 16_000, "one channel"),
        (np.float32(1), 16_000, "one channel"),
        (np.zeros(10, np.uint8), 16_000, "uint8"),
        (np.zeros(10, np.int64), 16_000, "int64"),
        (np.zeros(10, complex), 16_000, "complex"),
        (np.zeros(10), 0, "positive"),
        (np.zeros(10), -16_000, "positive"),
        (np.zeros(10), 16_000.5, "whole"),
        (np.zeros(10), math.nan, "whole"),
    ],
)
def test_bad_waves_are_refused(small, bad, rate, message):
    with pytest.raises(ValueError, match=message):
        small.score(bad, rate)
    with pytest.raises(ValueError, match=message):
        small.score_batch([bad], rate)


@pytest.mark.parametrize("rate", [7999, 8000, 16_000, 16_000.0, 44_100, 48_000, 192_000])
def test_any_rate_has_a_score(small, rate):
    assert 1 <= small.score(wave(0.5, rate=int(rate)), rate) <= 5


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 161])
def test_ten_milliseconds_have_a_score(small, samples):
    assert 1 <= small.score(wave(1)[:samples], 16_000) <= 5


def test_silence_has_the_score_of_silence(small):
    scores = {round(small.score(np.zeros(n), 16_000), 5) for n in (1, 160, 16_000, CROP)}
    assert len(scores) == 1


@given(exponent=st.integers(-6, 20), seconds=st.sampled_from([0.3, 7.68, 9]))
@settings(max_examples=15, deadline=None)
def test_gain_changes_nothing(exponent, seconds):
    scorer = _random_scorer()
    clip_T = uneven(seconds)
    assert scorer.score(clip_T * 2.0**exponent, 16_000) == pytest.approx(
        scorer.score(clip_T, 16_000), abs=STUDENT
    )


@functools.cache
def _random_scorer() -> Scorer:
    return StudentScorer(_student("v1"), "random", "0" * 64)


def test_an_offset_is_not_removed(small):
    clip_T = uneven(3)
    assert abs(small.score(clip_T + 0.3, 16_000) - small.score(clip_T, 16_000)) > 1e-5


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_whole_numbers_are_divided_by_full_scale(small, dtype):
    scale = -int(np.iinfo(dtype).min)
    quiet_T = np.round(uneven(1) * scale).astype(dtype)
    floats_T = (quiet_T / scale).astype(np.float32)
    assert small.score(quiet_T, 16_000) == small.score(floats_T, 16_000)
    assert small.score(torch.from_numpy(quiet_T), 16_000) == small.score(floats_T, 16_000)


def test_arrays_of_all_kinds_are_the_same_clip(small):
    clip_T = uneven(1)
    strided_T = np.repeat(clip_T, 2)[::2]
    with_gradient = torch.from_numpy(clip_T).requires_grad_()
    scores = {small.score(w, 16_000) for w in (clip_T, strided_T, with_gradient, list(clip_T))}
    assert len(scores) == 1


# --- batches, files, provenance ------------------------------------------------------------------


def test_a_batch_of_unequal_waves_and_rates(small):
    waves = [wave(0.1), wave(9, 1), wave(2, 2, 48_000), np.zeros(400, np.int16)]
    rates = [16_000, 16_000, 48_000, 8000]
    scores = small.score_batch(waves, rates, batch=3)
    alone = [small.score(*pair) for pair in zip(waves, rates, strict=True)]
    assert [score.mos for score in scores] == pytest.approx(alone, abs=STUDENT)
    assert [score.seconds for score in scores] == pytest.approx([0.1, 9, 2, 0.05])
    for score in scores:
        assert (score.model, score.weights_sha256) == ("small", "0" * 64)
        assert score.version and score.path is None
    with pytest.raises(ValueError, match="wave 1: holds samples"):
        small.score_batch([wave(1), np.full(10, np.nan)], 16_000)
    with pytest.raises(ValueError, match="2 sample rates for 1 waves"):
        small.score_batch([wave(1)], [1, 2])
    assert small.score_batch([], 16_000) == []


def test_channels_of_a_file(small, tmp_path):
    left, right = wave(1, 0), wave(1, 4)
    stereo = write(tmp_path / "stereo.wav", np.stack([left, right], axis=1))
    turned = write(tmp_path / "turned.wav", np.stack([right, left], axis=1))
    (mono,) = small.score_files([stereo])
    each = [score.mos for score in small.score_files([stereo], channels="each")]
    other = [score.mos for score in small.score_files([turned], channels="each")]
    alone = [small.score(left, 16_000), small.score(right, 16_000)]
    assert each == pytest.approx(alone, abs=STUDENT)
    assert other == pytest.approx(each[::-1], abs=STUDENT)
    assert each[0] != each[1]
    assert mono.mos == each[0]
    assert small.score_file(stereo, channel=1).mos == each[1]
    with pytest.raises(ValueError, match="channel 2"):
        small.score_file(stereo, channel=2)
    with pytest.raises(ValueError, match="cannot be read"):
        small.score_file(tmp_path / "nothing.wav")


def test_what_is_above_8_khz_folds_over_by_the_soft_resampler_alone():
    """8.4 kHz at 48 kHz comes out as 7.6 kHz."""
    tone_T = np.sin(2 * np.pi * 8400 / 48_000 * np.arange(48_000)).astype(np.float32)
    left = {by: to_16k(tone_T, 48_000, by)[800:-800].std() / tone_T.std() for by in FILTERS}
    assert left["soft"] > 0.1 and left["sharp"] < 1e-3


def test_a_student_hears_its_own_resampler(tmp_path):
    """In memory, by files, as ONNX: as it says, and the published student as published."""
    wave_T = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * 48_000).astype(np.float32)
    path = write(tmp_path / "noise.wav", wave_T, 48_000)
    right = {by: to_16k(read_mono(path)[0], 48_000, by) for by in FILTERS}
    scores = {}
    for by in FILTERS:
        network = tiny()
        network.config = network.config.model_copy(update={"resampler": by})
        model = load(write_run(tmp_path / by, network))
        scores[by] = model.score(right[by], 16_000)
        assert model.score_file(path).mos == pytest.approx(scores[by], abs=STUDENT)
        assert model.score(read_mono(path)[0], 48_000) == pytest.approx(scores[by], abs=STUDENT)
    assert abs(scores["soft"] - scores["sharp"]) > 10 * STUDENT
    assert load("v7").resampler == "soft" and load("small").resampler == "sharp"


@pytest.mark.parametrize("by", ["soft", "sharp"])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 7999])
def test_a_long_file_in_blocks_is_the_whole_file(tmp_path, monkeypatch, rate, by):
    monkeypatch.setattr("train.audio.LONG_SECONDS", 2)
    monkeypatch.setattr("train.audio.BLOCK_SECONDS", 1)
    path = write(tmp_path / "long.wav", wave(9.123, rate=rate), rate)
    whole_T, blocks = to_16k(*read_mono(path), by), list(open_clip(path, 0, by).blocks())
    joined_T = np.concatenate(blocks)
    assert len(blocks) > 5
    assert open_clip(path).samples == len(joined_T)
    assert abs(len(joined_T) - len(whole_T)) <= (1 if rate == 7999 else 0)
    same = min(len(joined_T), len(whole_T)) - (100 if rate == 7999 else 0)
    # soxr's filters are of 20 bits; at an odd rate their phase is interpolated between 2^13 steps.
    assert np.allclose(joined_T[:same], whole_T[:same], atol=2**-13 if rate == 7999 else 4 * 2**-20)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_long_file_is_scored_in_blocks_and_never_held_whole(small, tmp_path, monkeypatch, mode):
    path = write(tmp_path / "long.wav", uneven(60))
    (expected,) = small.score_files([path], mode=mode)
    monkeypatch.setattr("train.audio.LONG_SECONDS", 1.0)
    monkeypatch.setattr("train.audio.BLOCK_SECONDS", 2)
    monkeypatch.setattr(cutting, "SEGMENT_SAMPLES", 160_000)
    held: list[int] = []
    joined = np.concatenate

    def counted(arrays, **options):
        held.append(sum(map(len, arrays)))
        return joined(arrays, **options)

    monkeypatch.setattr(cutting.np, "concatenate", counted)
    (score,) = small.score_files([path], mode=mode)
    assert score.mos == pytest.approx(expected.mos, abs=0.02 if mode == "fast" else STUDENT)
    assert len(score.windows) == window_count(60 * 16_000)
    assert max(held) <= CROP + 2 * 2 * 16_000 + 16_000


def test_a_file_that_ends_early_fails_whole(small, tmp_path, monkeypatch):
    path = write(tmp_path / "long.wav", uneven(12))
    monkeypatch.setattr("train.audio.LONG_SECONDS", 1.0)
    monkeypatch.setattr("train.audio._blocks", _early)
    good, bad = small.score_files([write(tmp_path / "a.wav", wave(0.5)), path])
    assert good.mos is not None
    assert bad.mos is None and "cut short" in bad.error


def _early(path, channel, frames):
    yield uneven(9)
    raise UserError(f"{path}: cut short")


def test_work_ahead_stops_when_it_is_not_wanted():
    def forever():
        while True:
            yield 1

    items = ahead(forever(), 2)
    assert next(items) == 1
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]

    def failing():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(ahead(failing(), 2))


def test_addresses_and_onnx_files_go_to_their_modules(monkeypatch, tmp_path):
    monkeypatch.setattr(score_module, "fetch", lambda address: tmp_path)
    monkeypatch.setattr(score_module, "OnnxScorer", lambda path: path)
    with pytest.raises(ValueError, match="train it first"):
        load("https://example.org/model")
    (tmp_path / "m.onnx").touch()
    assert load(tmp_path / "m.onnx") == tmp_path / "m.onnx"


def test_unknown_settings_are_refused(small):
    with pytest.raises(ValueError, match="padding='loop'"):
        small.score(wave(1), 16_000, padding="loop")
    with pytest.raises(ValueError, match="mode='quick'"):
        small.score(wave(1), 16_000, mode="quick")
    with pytest.raises(ValueError, match="precision"):
        StudentScorer(Student(variant("v1")), "x", "0", precision="fp8")


# --- every type of samples -----------------------------------------------------------------------

AUDIO_TYPES = ["f2", "f4", "f8", "g", "i2", "i4"]
TORCH_TYPES = sorted(
    {str(t) for t in vars(torch).values() if isinstance(t, torch.dtype)}
    - {"torch.float4_e2m1fn_x2"}
)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", AUDIO_TYPES)
def test_samples_of_any_byte_order_are_the_same_clip(small, kind, order):
    clip_T = uneven(0.2)
    scale = {"i2": 2**15, "i4": 2**31}.get(kind, 1)
    samples = np.round(clip_T * scale * 0.5) if scale > 1 else clip_T
    as_floats = samples.astype(np.dtype(kind)).astype(np.float64) / scale
    given = samples.astype(np.dtype(kind).newbyteorder(order))
    assert small.score(given, 16_000) == pytest.approx(small.score(as_floats, 16_000), abs=1e-5)


@pytest.mark.parametrize("kind", sorted(set(np.typecodes["All"]) - set("efdghil")))
def test_other_numpy_types_are_refused_by_name(small, kind):
    if np.dtype(kind).newbyteorder("=") in (np.dtype("i2"), np.dtype("i4")):
        pytest.skip("audio")
    with pytest.raises(UserError, match="give floats, int16 or int32"):
        small.score(np.zeros(1600, kind), 16_000)


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_every_torch_type_is_scored_or_refused(small, name):
    dtype = getattr(torch, name.removeprefix("torch."))
    try:
        tensor = torch.zeros(1600).to(dtype) if "q" not in name else _quantized(dtype)
    except (RuntimeError, TypeError):
        pytest.skip(f"PyTorch makes no tensor of {name}")
    if dtype.is_floating_point or dtype in (torch.int16, torch.int32):
        assert 1 <= small.score(tensor, 16_000) <= 5
    else:
        with pytest.raises(UserError, match="give floats, int16 or int32"):
            small.score(tensor, 16_000)


def _quantized(dtype):
    return torch.quantize_per_tensor(torch.zeros(1600), 0.1, 0, dtype)


def test_bfloat16_is_the_clip_it_holds(small):
    clip_T = torch.from_numpy(uneven(0.2)).bfloat16()
    assert small.score(clip_T, 16_000) == small.score(clip_T.float(), 16_000)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    as_numpy = clip_T.float().numpy().astype(ml_dtypes.bfloat16)
    assert small.score(as_numpy, 16_000) == small.score(clip_T.float(), 16_000)


@pytest.mark.parametrize("bad", [[[1.0], [1.0, 2.0]], None, "speech", torch.zeros(3).to_sparse()])
def test_what_is_no_array_of_samples(small, bad):
    with pytest.raises(UserError, match="wave"):
        small.score(bad, 16_000)


# --- what stored scores are keyed by -------------------------------------------------------------


def test_a_score_says_what_code_and_runtime_made_it(small, monkeypatch, tmp_path):
    """Changed code, another PyTorch or another kind of device is another version."""
    said = small.version
    assert torch.__version__ in said and said.endswith(" cpu")
    for name in code.SOURCES:
        source = code.ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(source, tmp_path / name)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    try:
        code.code_sha256.cache_clear()
        assert small.version == said  # wherever the code is
        for name in ("train/scoring/engine.py", "train/models/head.py", "train/audio.py"):
            (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
            code.code_sha256.cache_clear()
            assert small.version != said
            said = small.version
    finally:
        code.code_sha256.cache_clear()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert scorer_module.torch_on(torch.device("cuda")).split() == ["torch", "9.9", "cuda"]


def test_a_model_without_finite_scores_is_an_error(tmp_path):
    student = _student("v1")
    student.head.pool.output.bias.data.fill_(math.nan)
    scorer = StudentScorer(student, "broken", "0" * 64)
    with pytest.raises(UserError, match="broken gives no finite score"):
        scorer.score(uneven(0.5), 16_000)
    with pytest.raises(UserError, match="broken gives no finite score"):
        scorer.curve(uneven(0.5), 16_000)


def test_a_released_student_is_called_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "RELEASED", tmp_path)
    folder = write_run(tmp_path / "wee")
    assert load("wee").name == "wee"
    assert load("wee").weights_sha256 == load(folder).weights_sha256 == find_student("wee")[1]
    with pytest.raises(UserError, match="we: no such model; give v7, wee, a run folder"):
        load("we")
