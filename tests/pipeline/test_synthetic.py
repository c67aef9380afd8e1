"""The offline default corpora: seeded, resumable, and what they claim to be."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_specs.io.errors import UserError
from data_specs.voice import sentences
from pipeline.__main__ import main
from pipeline.corpora import synthetic

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
    made = synthetic.make_speech(tmp_path / "a", clips=5, seed=3, workers=2)
    synthetic.make_speech(tmp_path / "b", clips=5, seed=3, workers=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    for path in made:
        wave, rate = soundfile.read(path)
        assert rate == 16_000 and wave.ndim == 1
        assert 8.2 <= len(wave) / rate <= 16
        assert 0.05 < np.abs(wave).max() <= 0.91
    assert {path.parts[-3] for path in made} == {"en", "de"}
    synthetic.make_speech(tmp_path / "c", clips=1, seed=4)  # another seed says other things
    assert not set(hashes(tmp_path / "c").values()) & set(hashes(tmp_path / "a").values())


def test_there_are_many_speakers_and_most_are_flite() -> None:
    voices = synthetic.voices()
    assert len({(voice.language, voice.speaker) for voice in voices}) == len(voices) >= 45
    assert sum(voice.engine == "flite" for voice in voices) > 0.7 * len(voices)
    for language in {voice.language for voice in voices}:
        assert len(sentences()[language]) >= 10


def test_a_missing_synthesizer_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="apt-get install espeak-ng"):
        synthetic.make_speech(tmp_path / "speech", clips=1)


def test_noise_of_every_kind_is_seeded(tmp_path: Path, talkers: Path) -> None:
    synthetic.make_noise(tmp_path / "a", files=5, seed=3, speech=talkers, workers=2)
    synthetic.make_noise(tmp_path / "b", files=5, seed=3, speech=talkers, workers=1)
    found = hashes(tmp_path / "a")
    assert found == hashes(tmp_path / "b")
    kinds = ("babble", "band", "clicks", "coloured", "hum")
    assert list(found) == [f"{kind}-000.flac" for kind in kinds]
    for name in found:
        wave, rate = soundfile.read(tmp_path / "a" / name)
        assert rate == 16_000 and 10 <= len(wave) / rate <= 20
        assert np.isfinite(wave).all() and 0.05 < np.abs(wave).max() <= 0.91


def test_babble_needs_speech_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no audio files to make babble"):
        synthetic.make_noise(tmp_path / "noise", files=1, speech=tmp_path / "empty")
    made = synthetic.make_noise(tmp_path / "noise", files=5)
    assert not any("babble" in path.name for path in made)


def test_what_is_whole_is_kept_and_what_is_missing_is_made(tmp_path: Path) -> None:
    synthetic.make_noise(tmp_path, files=4, seed=3)
    before = hashes(tmp_path)
    kept, lost = tmp_path / "hum-000.flac", tmp_path / "band-000.flac"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    synthetic.make_noise(tmp_path, files=6, seed=3)
    after = hashes(tmp_path)
    assert len(after) == 6 and before.items() <= after.items()
    assert kept.stat().st_mtime_ns == stamp


def test_two_seeds_never_mix_in_one_folder(tmp_path: Path) -> None:
    synthetic.make_noise(tmp_path, files=1, seed=3)
    with pytest.raises(ValueError, match="another --out or seed"):
        synthetic.make_noise(tmp_path, files=1, seed=4)


def test_the_command_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpora", "noise", "--out", str(tmp_path), "--count", "2", "--workers", "1"]) == 0
    assert len(hashes(tmp_path)) == 2
    assert "2 noise files" in capsys.readouterr().out


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["corpora", "noise", "--out", str(tmp_path), "--count", "-1"]) == 2
    assert capsys.readouterr().err == "error: --count must not be negative, is -1\n"
