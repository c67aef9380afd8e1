"""The offline default corpora: seeded, resumable, and what they claim to be."""

from __future__ import annotations

import shutil
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_specs.corpus import find_corpus
from data_specs.io.errors import UserError
from data_specs.voice import sentences
from pipeline.__main__ import main
from pipeline.corpora import synthetic
from pipeline.corpora.manifest import scan
from pipeline.corpora.studio import make_studio

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
    corpus = find_corpus("open_noise", "here")
    assert len(scan("noise", corpus, [tmp_path / "a"], progress=False).usable) == len(kinds)


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


def save_g722(path: Path, seconds: float) -> np.ndarray:
    """A tone as a prompt of Debian's packages, by the encoder that the decoder is beside."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(16_000 * seconds)) / 16_000)
    with av.open(str(path), "w", format="g722") as file:
        stream = file.add_stream("g722", rate=16_000, layout="mono")
        samples = np.round(tone * 2**15).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)
    return tone


def test_studio_prompts_are_decoded_by_language_and_talker(tmp_path: Path) -> None:
    sounds = tmp_path / "debs/usr/share/asterisk/sounds"
    tone = save_g722(sounds / "en_US_f_Allison/digits/long.g722", 4.0)
    save_g722(sounds / "it_IT_m_Carlo/vm-intro.g722", 3.5)
    save_g722(sounds / "it_IT_m_Carlo/short.g722", 2.0)
    save_g722(sounds / "it_IT_m_Carlo/silence/5.g722", 5.0)
    argv = ["corpora", "studio", "--from", str(tmp_path / "debs"), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    made = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*.flac")
    )
    assert made == ["en/studio-allison/digits-long.flac", "it/studio-carlo/vm-intro.flac"]
    wave, rate = soundfile.read(tmp_path / "out" / made[0])
    assert rate == 16_000 and abs(len(wave) - len(tone)) <= 320
    # 64 kbit/s G.722 of a tone: some 40 dB; it is 22 samples late (both filter banks)
    late, lag = wave[22:60_022], tone[:60_000]
    assert np.corrcoef(late, lag)[0, 1] > 0.99
    before = hashes(tmp_path / "out")
    assert main(argv) == 0 and hashes(tmp_path / "out") == before
    rows = scan("speech", find_corpus("speech", "here"), [tmp_path / "out"], progress=False)
    assert {(r["language"], r["speaker"], r["licence"]) for r in rows.usable.to_pylist()} == {
        ("en", "studio-allison", "CC BY-SA 3.0"),
        ("it", "studio-carlo", "CC BY 3.0"),
    }


def test_a_folder_without_prompts_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    argv = ["corpora", "studio", "--from", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "no prompts of asterisk-core-sounds-*-g722 below it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_its_decoder_studio_speech_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"PyAV, .* is not installed: run make setup"):
        make_studio(tmp_path, tmp_path / "out")
