"""Reading, rooms, noise and level, held to numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio import DropSample, decode_flac, encode_flac, from_pcm, read_part, to_pcm
from pipeline.render.mix import (
    active_dbfs,
    add_noise,
    gain,
    guard_peak,
    loop,
    reverberate,
    set_level,
)
from tests.conftest import talk, write

RATES_HZ = (8_000, 16_000, 22_050, 44_100, 48_000)


def chirp(seconds: float, rate_hz: int) -> np.ndarray:
    time = np.arange(int(seconds * rate_hz)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * (200 * time + 100 * time**2))).astype(np.float32)


@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_a_part_is_the_same_sound_at_every_rate(tmp_path: Path, rate_hz: int) -> None:
    path = write(tmp_path / "a.wav", chirp(4, rate_hz), rate_hz, "FLOAT")
    part = read_part(path, 16_000, 32_000)
    wanted = chirp(4, 16_000)[16_000:48_000]
    assert len(part) == len(wanted)
    inside = slice(400, -400)
    assert np.abs(part - wanted)[inside].max() < 0.01


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 40_000))
def test_a_part_from_anywhere_is_in_place(start: int, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "chirp48.wav"
    if not path.exists():
        write(path, chirp(4, 48_000), 48_000, "FLOAT")
    part = read_part(path, start, 8_000)
    wanted = chirp(4, 16_000)[start : start + 8_000]
    assert np.abs(part - wanted)[200:-200].max() < 0.01


def test_speed_raises_the_pitch(tmp_path: Path) -> None:
    time = np.arange(64_000) / 16_000
    path = write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1_000 * time))
    part = read_part(path, 0, 16_000, speed=1.1)
    peak_hz = np.argmax(np.abs(np.fft.rfft(part * np.hanning(len(part)))))
    assert len(part) == 16_000
    assert peak_hz == pytest.approx(1_100, abs=1)


def test_the_first_channel_counts(tmp_path: Path) -> None:
    left, right = chirp(1, 16_000), np.zeros(16_000, np.float32)
    path = write(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT")
    assert np.allclose(read_part(path, 0, 16_000), left)


def test_nan_is_dropped_by_name(tmp_path: Path) -> None:
    wave = talk(1, 0)
    wave[500] = np.nan
    path = write(tmp_path / "a.wav", wave, subtype="FLOAT")
    with pytest.raises(DropSample, match=r"non_finite: .*a\.wav"):
        read_part(path, 0, 16_000)


def test_pcm_survives_flac_bit_for_bit() -> None:
    pcm = to_pcm(talk(2, 1))
    assert np.array_equal(decode_flac(encode_flac(pcm)), pcm)
    assert np.array_equal(to_pcm(from_pcm(pcm)), pcm)


@settings(max_examples=25, deadline=None)
@given(snr_db=st.floats(-10, 40), level_db=st.floats(-20, 20))
def test_snr_is_the_difference_of_active_levels(snr_db: float, level_db: float) -> None:
    speech = talk(3, 2)
    noise = gain(np.random.default_rng(0).standard_normal(48_000).astype("f4") * 0.01, level_db)
    added = add_noise(speech, noise, snr_db, "noise") - speech
    assert active_dbfs(speech) - active_dbfs(added) == pytest.approx(snr_db, abs=0.05)


def test_pauses_do_not_change_the_active_level() -> None:
    speech = talk(3, 3)
    paused = np.concatenate([speech, np.zeros(64_000, np.float32)])
    assert active_dbfs(paused) == pytest.approx(active_dbfs(speech), abs=0.2)


def test_a_room_keeps_level_and_place() -> None:
    speech = talk(4, 4)
    response = np.zeros(4_000, np.float32)
    response[300] = 0.2  # the direct sound comes late and quiet: neither may show
    response[1_100] = 0.1
    wet = reverberate(speech, response, "room")
    lag = np.argmax(np.correlate(wet[8_000:24_000], speech[8_000:16_000], "valid"))
    assert lag == 0
    assert active_dbfs(wet) == pytest.approx(active_dbfs(speech), abs=0.05)


def test_level_is_met_and_never_clips() -> None:
    assert active_dbfs(set_level(talk(2, 5), -30)) == pytest.approx(-30, abs=0.1)
    assert np.abs(set_level(talk(2, 5), 10)).max() <= 0.9901
    assert np.abs(guard_peak(np.array([2.0, -4.0], np.float32))).max() <= 0.9901


def test_noise_is_played_in_a_loop() -> None:
    wave = np.random.default_rng(0).standard_normal(4_000).astype("f4")
    looped = loop(wave[1_000:], wave, 20_000)
    assert np.array_equal(looped[:2_200], wave[1_000:3_200])  # until the end fades out
    assert np.array_equal(looped[3_000:5_400], wave[800:3_200])  # and the beginning has faded in


@pytest.mark.parametrize("wave", [np.zeros(16_000, np.float32), np.full(16_000, 1e-6, np.float32)])
def test_silence_is_dropped_by_name(wave: np.ndarray) -> None:
    with pytest.raises(DropSample, match="silent"):
        add_noise(talk(1, 6), wave, 10, "quiet.wav")
