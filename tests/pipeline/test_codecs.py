"""Telephone and low-rate codecs, Opus' networks, level and late reverberation."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pydantic import TypeAdapter, ValidationError

from data_specs.io.rng import uniforms
from data_specs.processors import CODEC_BITRATES, CONCEALING
from data_specs.processors import Processor as Spec
from pipeline.audio import from_pcm, to_pcm
from pipeline.dataset.prepare import prepare
from pipeline.dataset.shards import samples
from pipeline.render import processors as degrade
from pipeline.render.mix import active_dbfs
from pipeline.render.processors import PROCESSORS, SelfCheckError, late_reverb, opus, self_check
from pipeline.render.processors.codec import CODECS
from pipeline.render.processors.interface import arrives
from tests import engines
from tests.conftest import ROOT, small_recipe, talk
from tests.pipeline.test_processors import power_db, settings_of, stage_of, weights

__all__ = ["weights"]  # the fixture: what is missing here is skipped by name

EACH = pytest.mark.parametrize("kind", sorted(CODECS))


def wave_of(seconds: float = 3.0, seed: int = 2) -> np.ndarray:
    hiss = 0.003 * np.random.default_rng(seed).standard_normal(int(seconds * 16_000))
    return (talk(seconds, seed) + hiss).astype(np.float32)


def coded(kind: str, wave: np.ndarray, bitrate_bps: float | None = None, **more: float) -> Any:
    """At its highest rate, if nothing else is said."""
    rate = CODEC_BITRATES[kind][-1] if bitrate_bps is None else bitrate_bps
    return degrade.run(kind, wave[None], [{"bitrate_bps": rate, **more}])[0]


def specified(**fields: Any) -> Any:
    return TypeAdapter(Spec).validate_python(fields)


def lag_of(after: np.ndarray, before: np.ndarray, within: int = 400) -> int:
    """Where the cross-correlation of the two has its maximum, in samples."""
    size = 1 << 17
    product = np.fft.rfft(after, size) * np.conj(np.fft.rfft(before, size))
    near = np.roll(np.fft.irfft(product), within)[: 2 * within + 1]
    return int(np.argmax(near)) - within


def envelope(wave: np.ndarray) -> np.ndarray:
    """Power over 10 ms, less its mean."""
    power = np.convolve(wave.astype(np.float64) ** 2, np.hanning(160), "same")
    return np.asarray(power - power.mean())


# --- the codecs -----------------------------------------------------------------------------------


@EACH
def test_the_delay_is_taken_out(kind: str) -> None:
    """At the highest rate: two samples for a codec's phase, of one that keeps the waveform."""
    wave = wave_of()
    out = coded(kind, wave)
    if kind == "codec2":  # no waveform: within a frame of its model, 10 ms
        assert abs(lag_of(envelope(out), envelope(wave))) <= 160
    else:
        assert abs(lag_of(np.diff(out), np.diff(wave))) <= 2


@EACH
def test_the_level_stays(kind: str) -> None:
    """Of what a narrow band has; the least bits of a codec cost some, of Codec 2 a quarter more."""
    wave, least_db = wave_of(), 6 if kind == "codec2" else 3
    before_db = power_db(wave, 300, 3_000)
    for bitrate_bps, most_db in ((CODEC_BITRATES[kind][0], least_db), (None, 1.5)):
        after_db = power_db(coded(kind, wave, bitrate_bps), 300, 3_000)
        assert abs(after_db - before_db) < most_db, bitrate_bps


def spectrum_db(wave: np.ndarray) -> np.ndarray:
    """Of frames of 32 ms, 300 to 3000 Hz."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::128] * np.hanning(512)
    return np.asarray(20 * np.log10(np.abs(np.fft.rfft(frames))[:, 10:96] + 1e-6))


@pytest.mark.parametrize("kind", sorted(kind for kind in CODECS if len(CODEC_BITRATES[kind]) > 1))
def test_more_bits_are_nearer_to_the_speech(kind: str) -> None:
    """By the spectrum: most of these do not keep the waveform's phase at any rate."""
    wave = wave_of()
    spectrum = spectrum_db(wave)
    heard = spectrum > spectrum.max() - 40
    distances = [
        np.abs(spectrum_db(coded(kind, wave, bitrate_bps)) - spectrum)[heard].mean()
        for bitrate_bps in (CODEC_BITRATES[kind][0], CODEC_BITRATES[kind][-1])
    ]
    assert distances[1] < 0.9 * distances[0]


@EACH
def test_short_clips_go_through_at_every_rate(kind: str) -> None:
    for length, bitrate_bps in itertools.product((1, 160, 4_001), CODEC_BITRATES[kind]):
        wave = wave_of(1.0)[:length]
        out = PROCESSORS[kind].process(wave[None], [{"bitrate_bps": bitrate_bps}])
        assert out.shape == (1, length) and np.isfinite(out).all(), bitrate_bps


def digest(kind: str) -> str:
    loss = {"loss": 0.1, "pattern": 3.0} if kind in CONCEALING else {}
    out = coded(kind, wave_of(1.0), CODEC_BITRATES[kind][0], **loss)
    return hashlib.sha256(out.tobytes()).hexdigest()


def runnable() -> list[str]:
    found = []
    for kind in sorted(CODECS):
        try:
            self_check(small_recipe(stages=(stage_of(kind),)))
            found.append(kind)
        except SelfCheckError:
            pass
    return found


def test_the_same_bytes_in_another_order_in_threads_and_in_another_process() -> None:
    kinds = runnable()
    here = {kind: digest(kind) for kind in kinds}
    with ThreadPoolExecutor(4) as pool:
        assert dict(zip(kinds * 2, pool.map(digest, kinds * 2), strict=True)) == here
    code = (
        "from tests.pipeline.test_codecs import digest\n"
        f"print(*[digest(kind) for kind in {kinds[::-1]!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [here[kind] for kind in kinds[::-1]], done.stderr


@pytest.mark.parametrize(("kind", "subtype"), [("g711_alaw", "ALAW"), ("g711_ulaw", "ULAW")])
def test_g711_is_libsndfiles_to_a_step(kind: str, subtype: str) -> None:
    """Each may round a sample to another side: a step is a 16th of a sample, 16 near zero."""
    time = np.arange(16_000) / 16_000
    wave = sum(0.1 * np.sin(2 * np.pi * f * time + f) for f in (310, 700, 1_170)).astype("f4")
    file = io.BytesIO()
    soundfile.write(file, to_pcm(wave[::2]), 8_000, format="WAV", subtype=subtype)
    file.seek(0)
    theirs = soundfile.read(file, dtype="float32")[0]
    ours = CODECS[kind].code(to_pcm(wave[::2]), 8_000, 64_000, {})
    assert (np.abs(ours - theirs) <= np.abs(theirs) / 16 + 16 / 32_768).all()
    assert np.abs(ours - from_pcm(to_pcm(wave[::2]))).max() > 1e-4


@pytest.mark.parametrize("kind", sorted(CONCEALING))
def test_a_lost_frame_is_concealed_and_moves_nothing_before_it(kind: str) -> None:
    wave, pattern = wave_of(), 11.0
    whole = coded(kind, wave)
    lossy = coded(kind, wave, loss=0.2, pattern=pattern)
    frame = 480 if kind == "g723_1" else 320
    first = int(np.argmin(arrives(100, {"loss": 0.2, "pattern": pattern}))) * frame
    assert first > 1_600  # or there is nothing to see
    until = first - 800  # a delay of 15 ms at most, and the resampler's filter
    assert np.abs(lossy[:until] - whole[:until]).max() < 1e-4
    assert np.mean((lossy - whole) ** 2) > 0.01 * np.mean(whole**2)
    assert abs(active_dbfs(lossy) - active_dbfs(whole)) < 6  # none of them is silence
    assert np.array_equal(lossy, coded(kind, wave, loss=0.2, pattern=pattern))


# --- what a recipe may say, and what is missing ---------------------------------------------------


def test_every_bitrate_is_drawn_and_a_loss_only_where_there_is_one() -> None:
    for kind, rates in CODEC_BITRATES.items():
        columns = PROCESSORS[kind].draw(specified(kind=kind), uniforms(0, 0, 500), "x")
        assert set(columns) == {"bitrate_bps"} and set(columns["bitrate_bps"]) == set(rates)
    spec = specified(kind="amr_nb", bitrate_bps=4_750, loss=0.1)
    columns = PROCESSORS["amr_nb"].draw(spec, uniforms(0, 0, 3), "x")
    assert columns["loss"].tolist() == [0.1] * 3 and len(set(columns["pattern"])) == 3
    assert columns["bitrate_bps"].tolist() == [4_750] * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "amr_nb", "bitrate_bps": 5_000}, "bitrate_bps of amr_nb must be .*4750"),
        ({"kind": "gsm", "loss": 0.1}, "loss: gsm conceals no loss"),
        ({"kind": "speex_nb", "loss": 0.7}, "must stay within 0 to 0.5"),
        ({"kind": "opus", "decoder_complexity": 8}, "choice among 0, 5, 6, 7"),
    ],
)
def test_a_recipe_says_what_a_codec_has(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        specified(**fields)


def test_each_that_is_missing_is_named_with_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    choices = [{"use": {"kind": kind}} for kind in ("aac", "speex_nb", "amr_wb", "codec2", "gsm")]
    recipe = small_recipe(stages=({"stage": "only", "choices": choices},)).model_dump_json()
    code = f"""
import importlib.metadata, sys
sys.modules["av"] = None
importlib.metadata.files = lambda name: None
from data_specs.recipe import Recipe
from pipeline.render.processors import self_check
self_check(Recipe.model_validate_json({recipe!r}))
"""
    for name in ("LIBSPEEX", "LIBVO_AMRWBENC"):
        monkeypatch.setenv(name, str(tmp_path / "none.so"))
    monkeypatch.delenv("LIBCODEC2", raising=False)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    for kind, brings in (
        ("aac", "pip install 'av<19'"),
        ("speex_nb", "apt-get install libspeex1, or set LIBSPEEX"),
        ("amr_wb", "apt-get install libvo-amrwbenc0, or set LIBVO_AMRWBENC"),
        ("codec2", "pip install pycodec2, or set LIBCODEC2"),
    ):
        lines = [one for one in done.stderr.splitlines() if one.startswith(f"  {kind} (stage")]
        assert len(lines) == 1 and brings in lines[0], done.stderr
    assert "  gsm (stage" not in done.stderr


def test_a_recipe_of_codecs_makes_shards_that_say_which_libraries_made_them(
    corpora: dict[str, list[Path]], tmp_path: Path
) -> None:
    kinds = runnable()
    stages = (
        {"stage": "room", "choices": [{"use": {"kind": "late_reverb"}}]},
        {"stage": "line", "choices": [{"use": {"kind": kind}} for kind in kinds]},
        {"stage": "end", "choices": [{"use": {"kind": "level"}}]},
    )
    job = prepare(small_recipe(stages=stages), corpora, tmp_path, 8)
    engines.run(job, "local", 1)
    assert len(list(samples(tmp_path / "shard-000000.tar"))) == 8
    made_by = {"gsm": "libsndfile", "aac": "ffmpeg", "speex_nb": "libspeex", "codec2": "libcodec2"}
    for kind, library in (made_by | {"amr_wb": "libvo-amrwbenc"}).items():
        assert bool(job.identity["versions"].get(library)) == (kind in kinds)


# --- Opus' networks -------------------------------------------------------------------------------


def network_settings(decoder_complexity: int) -> dict[str, float]:
    lossy = {"loss": 0.2, "pattern": 7.0, "conceal": 1.0, "decoder_complexity": decoder_complexity}
    return settings_of(16_000) | lossy


def test_a_libopus_without_networks_is_refused_by_name() -> None:
    if len(opus.networks()) == 3:
        pytest.skip(f"{opus.library_version()} has all")
    stage = {"stage": "x", "choices": [{"use": {"kind": "opus", "decoder_complexity": 7}}]}
    with pytest.raises(
        SelfCheckError, match=r"needs a libopus with NoLACE: this is libopus .*LIBOP"
    ):
        self_check(small_recipe(stages=(stage,)))
    stage["choices"] = [{"use": {"kind": "opus"}}]
    self_check(small_recipe(stages=(stage,)))


def test_each_network_of_libopus_changes_what_is_heard_and_moves_nothing() -> None:
    if len(opus.networks()) < 3:
        pytest.skip(f"{opus.library_version()}: set {opus.PATH_VARIABLE} to one with all networks")
    wave = wave_of()
    heard = [degrade.run("opus", wave[None], [network_settings(c)])[0] for c in (0, 5, 6, 7)]
    assert len({out.tobytes() for out in heard}) == 4
    for out in heard:
        assert abs(lag_of(np.diff(out), np.diff(wave))) <= 16  # 1 ms, as for every processor
    again = degrade.run("opus", wave[None], [network_settings(7)])[0]
    assert np.array_equal(again, heard[-1])
    assert opus.library_version().endswith("with deep PLC, LACE, NoLACE")


def test_a_setting_says_which_libopus() -> None:
    """The one that is loaded here already, by its path."""
    opus.library_version()
    maps = Path("/proc/self/maps").read_text().splitlines()
    found = next(line.split()[-1] for line in maps if "libopus.so" in line)
    code = "from pipeline.render.processors import opus; print(opus.library_version())"
    for path in (found, "/nowhere/libopus.so"):
        environment = os.environ | {opus.PATH_VARIABLE: path}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if path == found:
            assert done.stdout.strip() == opus.library_version()
        else:
            assert "/nowhere/libopus.so: cannot open" in done.stderr


# --- level and late reverberation -----------------------------------------------------------------


def test_a_level_is_changed_and_full_scale_clips() -> None:
    wave = wave_of(1.0)
    softer = degrade.run("level", wave[None], [{"gain_db": -20.0}])[0]
    assert np.allclose(softer, wave * 0.1, rtol=1e-6)
    loud = degrade.run("level", wave[None], [{"gain_db": 30.0}])[0]
    assert np.abs(loud).max() == 1.0 and np.mean(np.abs(loud) == 1.0) > 0.01


@pytest.mark.parametrize("c50_db", [-5.0, 10.0])
def test_late_reverberation_has_its_clarity_and_its_time(c50_db: float) -> None:
    impulse = np.zeros((1, 32_000), np.float32)
    impulse[0, 100] = 1.0
    params = {"rt60_s": 1.0, "c50_db": c50_db, "pattern": 4.0}
    out = PROCESSORS["late_reverb"].process(impulse, [params])[0].astype(np.float64)
    early, late = out[100:900], out[900:]
    assert np.abs(early[1:]).max() < 1e-6  # an FFT's rounding
    assert 10 * np.log10(np.sum(early**2) / np.sum(late**2)) == pytest.approx(c50_db, abs=0.01)
    assert np.sum(out**2) == pytest.approx(1, abs=1e-3)
    parts_db = [10 * np.log10(np.mean(late[i : i + 1_600] ** 2)) for i in (0, 8_000)]
    # 30 dB in half a second; a mean of 1600 squares has a deviation of .15 dB, two of .22.
    assert parts_db[0] - parts_db[1] == pytest.approx(30, abs=1)
    assert np.array_equal(late_reverb.response(params), late_reverb.response(params))
