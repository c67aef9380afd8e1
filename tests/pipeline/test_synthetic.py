"""The offline default corpora: seeded, resumable, and what they claim to be."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_specs.io.errors import UserError
from pipeline.__main__ import main
from pipeline.corpora import synthetic as makers

needs_synthesizers = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")),
    reason="needs the Debian packages flite and espeak-ng",
)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every FLAC file below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.flac"))
    }


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talkers")
    rng = np.random.default_rng(0)
    for index in range(3):
        soundfile.write(folder / f"{index}.wav", 0.1 * rng.standard_normal(20_000), 8_000)
    return folder


@needs_synthesizers
def test_speech_is_seeded_long_enough_and_levelled(tmp_path: Path) -> None:
    made = makers.make_speech(tmp_path / "a", clips=5, seed=3, workers=2)
    makers.make_speech(tmp_path / "b", clips=5, seed=3, workers=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    for path in made:
        wave, rate = soundfile.read(path)
        assert rate == 16_000 and wave.ndim == 1
        assert 8.2 <= len(wave) / rate <= 16
        assert 0.05 < np.abs(wave).max() <= 0.91
    assert {path.parts[-3] for path in made} == {"en", "de"}


@needs_synthesizers
def test_another_seed_says_other_things(tmp_path: Path) -> None:
    makers.make_speech(tmp_path / "a", clips=1, seed=3)
    makers.make_speech(tmp_path / "b", clips=1, seed=4)
    assert hashes(tmp_path / "a") != hashes(tmp_path / "b")


def test_there_are_many_speakers_and_most_are_flite() -> None:
    voices = makers.voices()
    assert len({(voice.language, voice.speaker) for voice in voices}) == len(voices) >= 45
    assert sum(voice.engine == "flite" for voice in voices) > 0.7 * len(voices)
    for language in {voice.language for voice in voices}:
        assert len(makers.sentences_of()[language]) >= 10


def test_a_missing_synthesizer_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="apt-get install espeak-ng"):
        makers.make_speech(tmp_path / "speech", clips=1)


def test_noise_of_every_kind_is_seeded(tmp_path: Path, talkers: Path) -> None:
    makers.make_noise(tmp_path / "a", files=5, seed=3, speech=talkers, workers=2)
    makers.make_noise(tmp_path / "b", files=5, seed=3, speech=talkers, workers=1)
    found = hashes(tmp_path / "a")
    assert found == hashes(tmp_path / "b")
    kinds = ("babble", "band", "clicks", "coloured", "hum")
    assert list(found) == [f"{kind}-000.flac" for kind in kinds]
    for name in found:
        wave, rate = soundfile.read(tmp_path / "a" / name)
        assert rate == 16_000 and 10 <= len(wave) / rate <= 20
        assert np.isfinite(wave).all() and 0.05 < np.abs(wave).max() <= 0.91


def test_noise_without_speech_has_no_babble(tmp_path: Path) -> None:
    made = makers.make_noise(tmp_path, files=5)
    assert not any("babble" in path.name for path in made)


def test_babble_needs_speech_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no audio files to make babble"):
        makers.make_noise(tmp_path / "noise", files=1, speech=tmp_path / "empty")


def test_what_is_whole_is_kept_and_what_is_missing_is_made(tmp_path: Path) -> None:
    makers.make_noise(tmp_path, files=4, seed=3)
    before = hashes(tmp_path)
    kept, lost = tmp_path / "hum-000.flac", tmp_path / "band-000.flac"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    makers.make_noise(tmp_path, files=6, seed=3)
    after = hashes(tmp_path)
    assert len(after) == 6 and before.items() <= after.items()
    assert kept.stat().st_mtime_ns == stamp


def test_two_seeds_never_mix_in_one_folder(tmp_path: Path) -> None:
    makers.make_rooms(tmp_path, rooms=1, seed=3)
    with pytest.raises(ValueError, match="another --out or seed"):
        makers.make_rooms(tmp_path, rooms=1, seed=4)


@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.0])
def test_rooms_decay_as_asked(tmp_path: Path, seconds: float) -> None:
    made = makers.make_rooms(tmp_path, rooms=12, rt60_s=(seconds, seconds))
    decays = []
    for path in made:
        response, rate = soundfile.read(path)
        assert rate == 16_000 and np.abs(response).max() == pytest.approx(0.9, abs=0.01)
        assert np.argmax(np.abs(response) > 0.05) < 0.01 * rate  # the direct sound leads
        decays.append(makers.decay_seconds(response))
    assert np.median(decays) == pytest.approx(seconds, rel=0.15)
    assert all(0.5 * seconds < decay < 1.3 * seconds for decay in decays)


def test_rooms_are_seeded(tmp_path: Path) -> None:
    makers.make_rooms(tmp_path / "a", rooms=3, seed=3, workers=2)
    makers.make_rooms(tmp_path / "b", rooms=3, seed=3, workers=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_an_empty_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rt60_s: 1 to 0\.5"):
        makers.make_rooms(tmp_path, rt60_s=(1, 0.5))


def test_the_command_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpora", "rooms", "--out", str(tmp_path), "--count", "2", "--workers", "1"]) == 0
    assert len(hashes(tmp_path)) == 2
    assert "2 rooms files" in capsys.readouterr().out


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["corpora", "rooms", "--out", str(tmp_path), "--count", "-1"]) == 2
    assert capsys.readouterr().err == "error: --count must not be negative, is -1\n"
