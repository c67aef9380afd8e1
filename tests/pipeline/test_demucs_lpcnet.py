"""Demucs and LPCNet: the contract, loading, and what each does where something is amiss.

Where a test's name says "random weights", it makes them: the real architecture and on-disk format,
seeded noise. "Pass-through weights" are set by hand so that the same architecture returns its
input. "Stand-in" is a small script in place of xiph's ``lpcnet_demo``, with its two modes, frames
and delay, that codes a frame as the first 36 coefficients of its cosine transform. The real weights
and the real executable are used where they are at hand.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_specs.io.errors import UserError
from data_specs.processors import Demucs
from pipeline.audio import DropSample, read_part
from pipeline.corpora.weights import FOLDER_VARIABLE
from pipeline.render.mix import fit_length
from pipeline.render.processors import demo_program, demucs, lpcnet, runtime
from pipeline.render.processors.interface import Processor
from pipeline.render.processors.runtime import Runtime
from tests.bench.random_weights import demucs_network, seeded
from tests.conftest import SHARED, talk
from tests.tolerance import rounding

CROP = 122_880


def voices(seconds: float, count: int = 3) -> np.ndarray:
    """Voices with a little hiss, each at its own level."""
    rng = np.random.default_rng(0)
    length = int(seconds * 16_000)
    clips = [talk(seconds + 1, seed)[-length:] / (1 + seed) for seed in range(count)]
    return np.stack([c + 0.003 * rng.standard_normal(length) for c in clips]).astype("f4")


def global_state() -> tuple[object, ...]:
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()


def lag_samples(before: np.ndarray, after: np.ndarray) -> int:
    """By how much ``after`` is late, where both are most alike."""
    spectrum = np.fft.rfft(after, 1 << 18) * np.conj(np.fft.rfft(before, 1 << 18))
    lag = int(np.argmax(np.fft.irfft(spectrum)))
    return lag if lag < 1 << 17 else lag - (1 << 18)


def si_sdr_db(clean: np.ndarray, estimate: np.ndarray) -> float:
    clean, estimate = clean.astype(np.float64), estimate.astype(np.float64)
    target = clean * (clean @ estimate) / (clean @ clean)
    return float(10 * np.log10(np.sum(target**2) / np.sum((estimate - target) ** 2)))


def snr_db(expected: np.ndarray, given: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(expected**2) / np.mean((given - expected) ** 2)))


def check_process(
    processor: Processor, waves: np.ndarray, params: list[dict[str, float]], empty: Path
) -> np.ndarray:
    """Shape, finite, the same again; input, random state and the folder ``empty`` as they were."""
    given, state = waves.copy(), global_state()
    out = processor.process(waves, params)
    assert state == global_state()
    assert np.array_equal(waves, given)
    assert out.shape == waves.shape and out.dtype == np.float32 and np.isfinite(out).all()
    assert np.array_equal(out, processor.process(waves, params))
    assert list(empty.iterdir()) == []
    return out


# --- Demucs ---------------------------------------------------------------------------------------


def network(hidden: int) -> Any:
    pytest.importorskip("denoiser.demucs", reason=demucs.INSTALL)
    with seeded():
        return demucs_network(hidden)


def save(cache: Path, state: object, hidden: int, zipped: bool = True) -> Path:
    """As the official files lie in the cache; those of 2020 are in torch's format before 1.6."""
    path = cache / f"demucs-dns{hidden}" / demucs.FILES[hidden]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both networks with seeded random weights, one in each of torch's formats."""
    cache = tmp_path_factory.mktemp("random")
    save(cache, network(48).state_dict(), 48, zipped=False)
    save(cache, network(64).state_dict(), 64)
    return cache


@pytest.fixture
def use_random_weights(
    random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[int, Any]]:
    monkeypatch.setenv(FOLDER_VARIABLE, str(random_weights))
    demucs._network.cache_clear()
    yield {hidden: network(hidden) for hidden in (48, 64)}
    demucs._network.cache_clear()  # each holds 75 or 134 MB


def widths(*hidden: int) -> list[dict[str, float]]:
    return [{"hidden": float(h)} for h in hidden]


def test_demucs_random_weights_each_wave_goes_through_its_own_network(
    use_random_weights: dict[int, Any],
) -> None:
    waves, hidden = voices(0.4, 7), (48, 64, 48, 48, 64, 48, 48)  # five: more than a batch
    out = demucs.process(waves, widths(*hidden))
    for wave, width, ours in zip(waves, hidden, out, strict=True):
        with torch.inference_mode():
            theirs = use_random_weights[width](torch.from_numpy(wave)[None])[0, 0].numpy()
        allowed = rounding(3 * 768, np.abs(theirs).max(), layers=24)  # 768 channels, 3 taps
        assert np.abs(ours - theirs).max() < allowed
    other = demucs.process(waves[:1], widths(64))[0]
    assert np.abs(other - out[0]).max() > 0.1 * np.abs(out[0]).max()


def pass_through(hidden: int) -> dict[str, torch.Tensor]:
    """Weights with which the first layer's skip connection returns the input, and no other's does.

    Four phases of the signal, each as its positive and its negative part (the layer rectifies),
    go straight to the last layer; the gates are open.
    """
    model = network(hidden)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        outer, inner = model.encoder[0], model.decoder[-1]
        for phase in range(4):
            for conv in (outer[0].weight, inner[2].weight):
                conv[2 * phase, 0, phase], conv[2 * phase + 1, 0, phase] = 1.0, -1.0
        for gated in (outer[2], inner[0]):
            gated.weight[:hidden, :, 0] = torch.eye(hidden)
            gated.bias[hidden:] = 20.0
    return model.state_dict()


@pytest.fixture
def use_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    save(tmp_path, pass_through(48), 48)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    yield
    demucs._network.cache_clear()


def test_demucs_pass_through_weights_return_every_wave_in_place_at_its_level(
    use_pass_through: None,
) -> None:
    waves = voices(1.5)
    out = demucs.process(waves, widths(48, 48, 48))
    for before, after in zip(waves, out, strict=True):
        assert lag_samples(before, after) == 0
        scale = before.std() / (before.std() + 1e-3)  # the package's floor on the level
        assert snr_db(scale * before[:-1], after[:-1]) > 40  # hiss next to 8 kHz goes in resampling


def test_demucs_pass_through_weights_stay_within_tolerance_in_bf16(use_pass_through: None) -> None:
    waves = voices(0.5, 2)
    whole = demucs.process(waves, widths(48, 48))
    runtime.use(Runtime(precision="bf16"))
    try:
        half = demucs.process(waves, widths(48, 48))
    finally:
        runtime.use(Runtime())
    assert half.dtype == np.float32
    assert 40 < snr_db(whole, half) < 80  # 80: it did run in bf16


def test_demucs_file_names_are_those_the_package_loads() -> None:
    pretrained = pytest.importorskip("denoiser.pretrained", reason=demucs.INSTALL)
    assert pretrained.DNS_48_URL.endswith("/" + demucs.FILES[48])
    assert pretrained.DNS_64_URL.endswith("/" + demucs.FILES[64])
    assert demucs.FILES[48].startswith("dns48-") and demucs.FILES[64].startswith("dns64-")


def test_demucs_random_weights_count_as_part_of_the_data(
    use_random_weights: dict[int, Any], random_weights: Path
) -> None:
    names = [
        path.relative_to(random_weights).as_posix() for path in demucs.PROCESSOR.weights(Demucs())
    ]
    assert names == [f"demucs-dns{hidden}/{name}" for hidden, name in demucs.FILES.items()]


def test_demucs_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    save(tmp_path, {}, 48)
    monkeypatch.setitem(sys.modules, "denoiser.demucs", None)
    with pytest.raises(UserError, match=re.escape(demucs.INSTALL)):
        demucs.process(voices(0.1, 1), widths(48))


@pytest.mark.shared
@pytest.mark.parametrize("hidden", [48, 64])
def test_demucs_real_weights_raise_si_sdr(hidden: int, shared: Path) -> None:
    pytest.importorskip("denoiser.demucs", reason=demucs.INSTALL)
    try:
        demucs.weights_path(hidden)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pairs = shared / "data" / "pairs"
    clean = fit_length(read_part(pairs / "clean_freesound_33711.wav", 0, CROP), CROP)
    noisy = fit_length(read_part(pairs / "noisy_snr0.wav", 0, CROP), CROP)
    out = demucs.process(noisy[None], widths(hidden))[0]
    assert abs(lag_samples(clean, out)) <= 16
    assert si_sdr_db(clean, out) > si_sdr_db(clean, noisy) + 2


# --- LPCNet ---------------------------------------------------------------------------------------

STAND_IN = """#!{python}
import os, resource, signal, sys, time
import numpy as np

FRAME, KEPT, LOOK_AHEAD = 160, 36, {look_ahead}
mode, source, target = sys.argv[1:]
data = open(source, "rb").read()
{before}
angles = np.pi / FRAME * np.outer(np.arange(FRAME) + 0.5, np.arange(KEPT))
basis = np.cos(angles) * np.where(np.arange(KEPT) == 0, 1, 2**0.5) / FRAME**0.5
if mode == "-features":
    pcm = np.frombuffer(data, "<i2")
    assert len(pcm) % FRAME == 0
    frames = np.pad(pcm, (FRAME // 2, 0))[: len(pcm)].reshape(-1, FRAME)
    out = (frames @ basis).astype("<f4")
else:
    assert mode == "-synthesis"
    features = np.frombuffer(data, "<f4").reshape(-1, KEPT)
    blocks = np.pad(features @ basis.T, ((LOOK_AHEAD, 0), (0, 0)))[: len(features)]
    out = np.clip(np.rint(blocks), -32767, 32767).astype("<i2").ravel()
{after}
open(target, "wb").write(out.tobytes())
"""


class StandIn:
    """Writes the script, and makes it the ``lpcnet_demo`` that is found."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "bin" / "lpcnet_demo"
        self.path.parent.mkdir()
        monkeypatch.setenv(lpcnet.PROGRAM.variable, str(self.path))
        monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
        (folder / "tmp").mkdir()
        monkeypatch.chdir(folder / "tmp")
        self.write()

    def write(self, before: str = "", after: str = "", look_ahead: int = 2) -> None:
        code = {"python": sys.executable, "look_ahead": look_ahead, "before": before}
        self.path.write_text(STAND_IN.format(**code, after=after))
        self.path.chmod(0o755)
        lpcnet._delay.cache_clear()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    yield StandIn(tmp_path, monkeypatch)
    lpcnet._delay.cache_clear()


def test_lpcnet_stand_in_keeps_the_contract(stand_in: StandIn, tmp_path: Path) -> None:
    waves = voices(1.003)
    out = check_process(lpcnet.PROCESSOR, waves, [{}] * 3, tmp_path / "tmp")
    single = [lpcnet.PROGRAM.process(wave[None], [{}])[0] for wave in waves]
    assert np.array_equal(out, np.stack(single))
    assert np.abs(out - waves).max() > 0.001


@pytest.mark.parametrize("look_ahead", [0, 1, 2, 4])
def test_lpcnet_stand_in_whatever_its_look_ahead_the_delay_is_taken_out(
    look_ahead: int, stand_in: StandIn
) -> None:
    stand_in.write(look_ahead=look_ahead)
    wave = voices(1, 1)[0]
    out = lpcnet.PROGRAM.process(wave[None], [{}])[0]
    assert lpcnet._delay(stand_in.path) == 160 * look_ahead + 80
    assert lag_samples(wave, out) == 0
    assert si_sdr_db(wave, out) > 5  # to the end: nothing is cut from the last frame
    assert si_sdr_db(wave[-480:], out[-480:]) > 5


@pytest.mark.parametrize("length", [1, 80, 160, 161, 1_600])
def test_lpcnet_stand_in_any_length_and_silence(length: int, stand_in: StandIn) -> None:
    waves = np.zeros((2, length), np.float32)
    waves[1] = 0.1
    out = lpcnet.PROGRAM.process(waves, [{}] * 2)
    assert out.shape == waves.shape and out.dtype == np.float32
    assert (out[0] == 0).all() and (out[1] > 0).any()


@pytest.mark.parametrize(
    ("before", "after", "reason", "says"),
    [
        ("sys.exit('no model data')", "", "processor_failed", "-features: exit status 1: no model"),
        (
            "mode == '-synthesis' and sys.exit(7)",
            "",
            "processor_failed",
            "-synthesis: exit status 7",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "", "processor_crashed", "-features: SIGSEGV"),
        ("", "out = out[:0]", "processor_failed", "-features gave 0 bytes for 32 frames"),
        ("", "out = out.ravel()[:-36]", "processor_failed", "bytes for 32 frames"),
        (
            "",
            "out = out[:-90] if mode == '-synthesis' else out",
            "processor_failed",
            "-synthesis gave 5030 samples for 5120",
        ),
    ],
    ids=["exit", "exit-silent", "signal", "nothing", "short-features", "short-pcm"],
)
def test_lpcnet_stand_in_that_fails_is_named(
    before: str, after: str, reason: str, says: str, stand_in: StandIn, tmp_path: Path
) -> None:
    stand_in.write(before, after)
    with pytest.raises(DropSample) as error:
        lpcnet.PROGRAM.process(voices(0.2, 1), [{}])
    assert error.value.reason == reason
    assert error.value.detail.startswith("lpcnet: lpcnet_demo ") and says in error.value.detail
    assert list((tmp_path / "tmp").iterdir()) == []


def test_lpcnet_stand_in_that_fails_on_one_wave_only(stand_in: StandIn) -> None:
    stand_in.write("mode == '-features' and len(data) > 20_000 and sys.exit('too long for me')")
    assert np.isfinite(lpcnet.PROGRAM.process(voices(0.2, 1), [{}])).all()
    with pytest.raises(DropSample, match="too long for me"):
        lpcnet.PROGRAM.process(voices(1, 1), [{}])


def test_lpcnet_stand_in_killed_from_outside_fails_the_attempt_not_the_sample(
    stand_in: StandIn,
) -> None:
    stand_in.write("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(OSError, match="-features was killed; is memory short"):
        lpcnet.PROGRAM.process(voices(0.2, 1), [{}])


def test_lpcnet_stand_in_that_hangs_is_ended(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "pid"
    stand_in.write(f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(200)")
    monkeypatch.setattr(demo_program, "LIMIT_SECONDS", 5.0)
    began = time.monotonic()
    with pytest.raises(DropSample, match="-features took more than 5 s") as error:
        lpcnet.PROGRAM.process(voices(0.2, 1), [{}])
    assert error.value.reason == "processor_timeout" and time.monotonic() - began < 100
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_lpcnet_stand_in_runs_under_limits_of_its_own(stand_in: StandIn) -> None:
    stand_in.write("sys.exit(str([resource.getrlimit(r)[1] for r in (0, 4)]))")  # CPU, CORE
    with pytest.raises(DropSample, match=r"exit status 1: \[60, 0\]"):
        lpcnet.PROGRAM.process(voices(0.2, 1), [{}])


def test_lpcnet_stand_in_that_is_silent_is_no_vocoder(stand_in: StandIn) -> None:
    stand_in.write(after="out *= 0")
    with pytest.raises(OSError, match="answers with silence: run make lpcnet"):
        lpcnet.PROGRAM.process(voices(0.2, 1), [{}])


def test_lpcnet_is_found_by_variable_then_path_then_cache(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "cache" / "lpcnet" / "lpcnet_demo"
    on_path = tmp_path / "path" / "lpcnet_demo"
    for path in (cached, on_path):
        path.parent.mkdir(parents=True)
        shutil.copy(stand_in.path, path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert lpcnet.PROCESSOR.weights(None) == [stand_in.path]
    monkeypatch.delenv(lpcnet.PROGRAM.variable)
    assert lpcnet.PROGRAM.path() == on_path
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lpcnet.PROGRAM.path() == cached


@pytest.mark.parametrize("given", ["variable", "nothing", "folder"])
def test_lpcnet_without_its_executable_says_what_to_run(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(lpcnet.PROGRAM.variable, raising=False)
    where = {"variable": tmp_path / "no", "folder": tmp_path}.get(given)
    if where:
        monkeypatch.setenv(lpcnet.PROGRAM.variable, str(where))
    with pytest.raises(
        FileNotFoundError, match="run make lpcnet LPCNET_REF=COMMIT, or set LPCNET_DEMO"
    ) as error:
        lpcnet.PROGRAM.process(voices(0.2, 1), [{}])
    assert str(where or tmp_path / "lpcnet" / "lpcnet_demo") in str(error.value)


def test_lpcnet_stand_in_that_may_not_be_executed(stand_in: StandIn) -> None:
    stand_in.path.chmod(0o644)
    with pytest.raises(PermissionError, match=r"lpcnet_demo cannot be executed: run chmod \+x"):
        lpcnet.PROGRAM.process(voices(0.2, 1), [{}])


def envelope(wave: np.ndarray) -> np.ndarray:
    """Over 10 ms, without its mean."""
    smooth = np.convolve(np.abs(wave), np.ones(160) / 160, mode="same")
    return smooth - smooth.mean()


@pytest.mark.shared
def test_lpcnet_real_executable_speaks_in_time(shared: Path) -> None:
    """A vocoder keeps no phases: what must be in place are the envelope's rises and falls."""
    try:
        lpcnet.PROGRAM.path()
    except OSError as error:
        pytest.skip(str(error))
    talkers = sorted((SHARED / "data" / "speech" / "test-other").rglob("*.flac"))[:20:5]
    waves = np.stack([fit_length(read_part(path, 0, CROP), CROP) for path in talkers])
    out = lpcnet.PROGRAM.process(waves, [{}] * len(waves))
    assert np.array_equal(out[:1], lpcnet.PROGRAM.process(waves[:1], [{}]))
    for before, after in zip(waves, out, strict=True):
        assert abs(10 * np.log10(np.mean(after**2) / np.mean(before**2))) < 6
        assert np.corrcoef(envelope(before), envelope(after))[0, 1] > 0.8
        assert abs(lag_samples(envelope(before), envelope(after))) <= 80  # 5 ms, half a frame
