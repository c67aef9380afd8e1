"""What measures a clip measures what is heard of it: the same with and without padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_specs.io.waves import cross_fade
from data_specs.sample import CROP_SAMPLES, FRAME_SAMPLES
from pipeline.render import processors as degrade
from pipeline.render.mix import active_dbfs, add_noise, loop, reverberate
from pipeline.render.plan import NoisePlan, RoomPlan, SamplePlan, SpeechPlan, Step
from pipeline.render.processors import PROCESSORS
from pipeline.render.render import render_group
from tests.conftest import talk, write
from tests.pipeline.test_processors import OPTIONAL, drawn, weights

__all__ = ["weights"]  # the fixture

SECONDS = (0.5, 1.0, 3.0)
SLOW = {"hifigan", "encodec", "lpcnet", "demucs"}


def speech(seconds: float) -> np.ndarray:
    """Loud from the first to the last sample, so that padding is all that is silent."""
    hiss = 0.01 * np.random.default_rng(7).standard_normal(int(seconds * 16_000))
    return (talk(seconds, 1) + hiss).astype(np.float32)


def padded(wave: np.ndarray) -> np.ndarray:
    return np.pad(wave, (0, CROP_SAMPLES - len(wave)))


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in sorted(PROCESSORS)]
)
def test_padding_changes_nothing_of_what_a_processor_does(kind: str) -> None:
    params = drawn(kind, 1)
    for seconds in SECONDS:
        wave = speech(seconds)
        short = degrade.run(kind, wave[None], params)[0]
        long = degrade.run(kind, padded(wave)[None], params)[0]
        assert np.array_equal(long[: len(wave)], short)
        assert not long[len(wave) :].any()


@pytest.mark.parametrize("kind", ["clip", "dropout", "mnru", "spectral_gating"])
def test_short_clips_of_a_group_do_not_move_each_other(kind: str) -> None:
    params = drawn(kind, 3)
    waves = np.stack([padded(speech(seconds)) for seconds in SECONDS])
    batch = degrade.run(kind, waves, params)
    for wave, p, out in zip(waves, params, batch, strict=True):
        assert np.array_equal(degrade.run(kind, wave[None], [p])[0], out)


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_the_share_that_is_clipped_or_lost_is_of_what_is_heard(
    seconds: float, share: float
) -> None:
    wave = speech(seconds)
    clipped = degrade.run("clip", padded(wave)[None], [{"share": share}])[0][: len(wave)]
    at_limit = np.abs(clipped) >= np.abs(clipped).max() * (1 - 1e-6)
    assert np.mean(at_limit) == pytest.approx(share, abs=2 / len(wave))
    lose = {"share": share, "packet_ms": 20.0, "pattern": 5.0}
    lost = degrade.run("dropout", padded(wave)[None], [lose])[0][: len(wave)] == 0
    assert np.mean(lost) == pytest.approx(share, abs=1 / (seconds * 50))


def test_the_shortest_clips_go_through() -> None:
    wave = speech(0.05)
    for kind in sorted(set(PROCESSORS) - OPTIONAL):
        out = degrade.run(kind, padded(wave)[None], drawn(kind, 1))[0]
        assert out.any() and np.isfinite(out).all(), kind
    one_packet = {"share": 0.1, "packet_ms": 60.0, "pattern": 5.0}
    assert np.array_equal(degrade.run("dropout", wave[None], [one_packet])[0], wave)


# --- level, SNR, rooms ----------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [100, FRAME_SAMPLES - 1, 500, 8_000, 8_100, 48_001])
def test_the_active_level_does_not_depend_on_padding(samples: int) -> None:
    wave = np.full(samples, 0.1, np.float32)
    assert active_dbfs(wave) == pytest.approx(-20, abs=1e-5)
    if samples >= FRAME_SAMPLES:
        assert active_dbfs(padded(wave)) == active_dbfs(wave)
    voice = speech(3)[:samples]
    assert active_dbfs(voice) == pytest.approx(
        active_dbfs(np.pad(voice, (0, CROP_SAMPLES - samples))),
        abs=1e-9 if samples >= FRAME_SAMPLES else 6,
    )


def test_no_samples_have_no_level() -> None:
    assert active_dbfs(np.zeros(0, np.float32)) == active_dbfs(np.zeros(900, np.float32)) == -np.inf


@pytest.mark.parametrize("seconds", SECONDS)
def test_the_snr_is_that_of_the_part_with_speech(seconds: float) -> None:
    wave = speech(seconds)
    noise = 0.001 * np.random.default_rng(0).standard_normal(CROP_SAMPLES).astype("f4")
    noise[len(wave) :] *= 100  # what is loud over the padding must not make the rest inaudible
    added = add_noise(padded(wave), noise, 10, "noise") - padded(wave)
    assert active_dbfs(wave) - active_dbfs(added[: len(wave)]) == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_room_keeps_the_level_of_a_short_clip(seconds: float) -> None:
    wave = speech(seconds)
    wet = reverberate(padded(wave), ringing(), "room")[: len(wave)]
    assert active_dbfs(wet) == pytest.approx(active_dbfs(wave), abs=0.01)
    assert np.allclose(wet, reverberate(wave, ringing(), "room"), atol=1e-5)


def ringing() -> np.ndarray:
    decay = np.exp(-np.arange(16_000) / 4_000)
    response = np.random.default_rng(1).standard_normal(16_000) * decay * 0.1
    response[0] = 1.0
    return response.astype(np.float32)


def plan(**changes: object) -> SamplePlan:
    base = {
        "index": 0,
        "speech": SpeechPlan(
            corpus="speech", root=0, path="a.wav", start_sample=0, speaker="a", language=""
        ),
        "speed": 1.0,
        "level_dbfs": -25.0,
        "room": None,
        "noise": None,
        "speech_steps": 0,
        "steps": (),
    }
    return SamplePlan.model_validate(base | changes)


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_short_recording_is_made_as_what_is_heard_of_it(seconds: float, tmp_path: Path) -> None:
    length = int(seconds * 16_000)
    write(tmp_path / "a.wav", speech(seconds), subtype="FLOAT")
    write(tmp_path / "room.wav", ringing(), subtype="FLOAT")
    write(tmp_path / "noise.wav", 0.1 * np.random.default_rng(2).standard_normal(40_000))
    roots = {name: [tmp_path] for name in ("speech", "noise", "rooms")}
    room = RoomPlan(corpus="rooms", root=0, path="room.wav")
    noise = NoisePlan(corpus="noise", root=0, path="noise.wav", start_sample=0, snr_db=10.0)
    clip = Step(stage="line", kind="clip", params={"share": 0.1})
    made = render_group(
        [
            plan(),
            plan(index=1, room=room, noise=noise),
            plan(index=2, room=room, noise=noise, steps=(clip,)),
        ],
        roots,
    )
    for sample in made:
        assert sample.pcm is not None and sample.pcm.shape == (CROP_SAMPLES,)
        assert not sample.pcm[length:].any()
    plain, mixed, clipped = (sample.pcm[:length] / np.float32(32_768) for sample in made)
    for wave in (plain, mixed):
        assert active_dbfs(wave) == pytest.approx(-25, abs=0.02)
    at_limit = np.abs(clipped) >= np.abs(clipped).max() * (1 - 1e-6)
    assert np.mean(at_limit) == pytest.approx(0.1, abs=0.005)  # as 16 bits have it


def test_a_sample_is_the_same_alone_and_in_a_group_of_other_lengths(tmp_path: Path) -> None:
    plans = []
    for i, seconds in enumerate((*SECONDS, 8.0)):
        write(tmp_path / f"{i}.wav", speech(seconds))
        one = plan(index=i, steps=(Step(stage="x", kind="clip", params={"share": 0.05}),))
        plans.append(
            one.model_copy(
                update={"speech": one.speech.model_copy(update={"path": f"{i}.wav"})},
            )
        )
    roots = {"speech": [tmp_path]}
    for together in render_group(plans, roots):
        (alone,) = render_group([together.plan], roots)
        assert np.array_equal(alone.pcm, together.pcm)


# --- noise that is shorter than the speech --------------------------------------------------------


def tone(hz: float, seconds: float) -> np.ndarray:
    time = np.arange(int(seconds * 16_000)) / 16_000
    return (0.5 * np.sin(2 * np.pi * hz * time)).astype(np.float32)


@pytest.mark.parametrize("hz", [50.0, 123.4, 440.0, 1_234.5])
@pytest.mark.parametrize("seconds", [0.1, 0.73, 2.01])
@pytest.mark.parametrize("start", [0, 1_000, 1_590])
def test_a_looped_tone_does_not_click(hz: float, seconds: float, start: int) -> None:
    wave = tone(hz, seconds)
    looped = loop(wave[start:], wave, CROP_SAMPLES)
    assert looped.shape == (CROP_SAMPLES,) and looped.dtype == np.float32
    slope = 2 * np.pi * hz / 16_000 * 0.5
    assert np.abs(np.diff(looped)).max() <= slope * 1.01 + 0.5 * np.pi / 2 / 400
    assert np.abs(looped).max() <= 0.5 * 1.01  # how alike two ends are is rounded to 1 %
    hard = np.resize(wave[start:], CROP_SAMPLES)
    if np.abs(np.diff(hard)).max() > 2 * slope:  # it does click where it is only repeated
        assert above_db(looped, 3_000) < above_db(hard, 3_000) - 20


def above_db(wave: np.ndarray, hz: float) -> float:
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    above = np.fft.rfftfreq(len(wave), 1 / 16_000) > hz
    return float(10 * np.log10(power[above].sum() / power.sum() + 1e-20))


def test_looped_noise_keeps_its_power_and_its_steps_over_the_seam() -> None:
    noise = 0.1 * np.random.default_rng(3).standard_normal(16_000).astype("f4")
    brown = np.cumsum(noise - noise.mean())
    brown /= np.abs(brown).max()
    for wave in (noise, brown.astype("f4")):
        looped = loop(wave[4_000:], wave, CROP_SAMPLES)
        assert np.abs(np.diff(looped)).max() <= 1.15 * np.abs(np.diff(wave)).max()
    other = 0.1 * np.random.default_rng(5).standard_normal(16_000).astype("f4")
    seam = cross_fade(noise, other)[15_200:16_000]
    # 800 samples: sigma 0.22 dB. A fade at equal gain would lose 1.8 dB.
    assert 10 * np.log10(np.mean(seam**2) / 0.1**2) == pytest.approx(0, abs=0.9)


def test_what_is_long_enough_is_not_touched_and_nothing_stays_nothing() -> None:
    noise = np.random.default_rng(4).standard_normal(9_000).astype("f4")
    assert np.array_equal(loop(noise, noise[:10], 8_000), noise[:8_000])
    assert len(loop(noise[:0], noise[:0], 100)) == 0
    assert loop(noise[:1], noise[:1], 50).tolist() == [noise[0]] * 50
    assert np.array_equal(loop(noise[-20:], noise, 8_000), noise[:8_000])  # too short to fade out
