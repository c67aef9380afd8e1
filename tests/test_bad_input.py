"""Bad input, as users have it: each has its stated outcome, and nothing half-made looks whole."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data_specs.corpus import find_corpus
from pipeline.__main__ import main
from pipeline.corpora.manifest import CorpusError, scan
from pipeline.dataset.prepare import prepare
from pipeline.dataset.shards import find_shards, read_record
from tests import engines
from tests.conftest import ROOT, small_recipe, talk, write

Corpora = dict[str, list[Path]]


def scanned(folder: Path) -> dict[str, str]:
    """Why each file of a speech folder is left out; empty where it is not."""
    manifest = scan("speech", find_corpus("speech", "test"), [folder])
    return {row["path"]: row["rejected"] for row in manifest.table.to_pylist()}


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A folder with one good recording, to which each test adds its bad one."""
    write(tmp_path / "speech" / "good.wav", talk(9, 0))
    return tmp_path / "speech"


def dropped(speech: Path, out: Path) -> dict[str, str]:
    """Make shards of a speech folder; file name to reason of what was dropped."""
    recipe = small_recipe(
        max_dropped_share=1.0, room=None, noise=None, sources={"speech": {"corpus": "speech"}}
    )
    job = prepare(recipe, {"speech": [speech]}, out, 16, {"speech": "all"})
    assert engines.run(job, "local", 1).failed == {}
    records = filter(None, (read_record(out, shard) for shard in range(2)))
    drops = [drop for record in records for drop in record.dropped]
    return {Path(drop["detail"].split(": ")[0]).name: drop["reason"] for drop in drops}


# --- what the manifest finds ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "said"), [("", "no usable audio file in {}"), ("nowhere", "no such folder")]
)
def test_a_folder_without_audio(folder: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=said.format(tmp_path)):
        scanned(tmp_path / folder)


def test_files_that_hold_too_little(speech: Path) -> None:
    write(speech / "header.wav", np.zeros(0, np.float32))
    write(speech / "slow.wav", talk(9, 1, 4_000), 4_000)
    found = scanned(speech)
    assert found["header.wav"].startswith("too short: 0.000 s")
    assert found["slow.wav"] == "sample rate too low: 4000 Hz, at least 8000"


# --- what rendering finds -------------------------------------------------------------------------


def test_a_truncated_flac(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(speech / "cut.flac", talk(60, 2))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 10])
    assert scanned(speech)["cut.flac"].startswith("cut short")
    path.write_bytes(whole)
    render = engines.run  # it is cut after its header was read

    def cut_before(*arguments: Any, **options: Any) -> Any:
        path.write_bytes(whole[: len(whole) // 10])
        return render(*arguments, **options)

    monkeypatch.setattr(engines, "run", cut_before)
    assert dropped(speech, tmp_path / "out") == {"cut.flac": "unreadable"}


def test_a_silent_file(speech: Path, tmp_path: Path) -> None:
    write(speech / "silent.wav", np.zeros(60 * 16_000, np.float32))
    assert dropped(speech, tmp_path / "out") == {"silent.wav": "silent"}


def test_nan_and_infinity(speech: Path, tmp_path: Path) -> None:
    wave = talk(60, 3)
    wave[::1_000] = np.nan
    write(speech / "nan.wav", wave, subtype="FLOAT")
    wave[::1_000] = np.inf
    write(speech / "inf.wav", wave, subtype="FLOAT")
    found = dropped(speech, tmp_path / "out")
    assert found and set(found) <= {"nan.wav", "inf.wav"}
    assert set(found.values()) == {"non_finite"}


def test_an_8_channel_file_gives_its_first_channel(speech: Path, tmp_path: Path) -> None:
    channels = np.stack([talk(60, 4)] + [np.full(960_000, np.nan, np.float32)] * 7, axis=1)
    write(speech / "eight.wav", channels, subtype="FLOAT")
    assert dropped(speech, tmp_path / "out") == {}  # nobody listens to the others


def test_a_3_hour_file_is_read_in_parts(speech: Path, tmp_path: Path) -> None:
    path = speech / "long.flac"
    minute = talk(60, 5)
    with soundfile.SoundFile(path, "w", 16_000, 1) as file:
        for _ in range(180):
            file.write(minute)
    assert soundfile.info(str(path)).duration == 3 * 3600
    tracked = f"""
import resource, sys
from pathlib import Path
from pipeline.audio import read_part
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wave = read_part(Path({str(path)!r}), 2 * 3600 * 16_000 + 5, 122_880)
print(len(wave), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000)
"""
    done = subprocess.run([sys.executable, "-c", tracked], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["122880", "True"], done.stderr
    assert dropped(speech, tmp_path / "out") == {}


def test_a_file_that_vanishes_fails_the_attempt_and_drops_nothing(
    speech: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(room=None, noise=None, sources={"speech": {"corpus": "speech"}})
    job = prepare(recipe, {"speech": [speech]}, tmp_path / "out", 16, {"speech": "all"})
    (speech / "good.wav").unlink()
    failed = engines.run(job, "local", 1).failed
    assert set(failed) == {0, 1} and all("good.wav" in reason for reason in failed.values())
    assert find_shards(job.out) == []


# --- what the command says ------------------------------------------------------------------------


def command(
    corpora: Corpora, out: Path, *more: str, recipe: str = "demo", skip: str = ""
) -> list[str]:
    given = [f"--corpus={n}={f[0]}" for n, f in corpora.items() if n != skip]
    options = ["--out", str(out), "--samples", "4", "--engine", "local", "--workers", "1"]
    return ["shards", recipe, *given, *options, *more]


def said(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


def test_an_unwritable_output(corpora: Corpora, tmp_path: Path, capsys) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert str(blocked) in said(capsys, command(corpora, blocked / "out"))
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert "Permission denied" in said(capsys, command(corpora, tmp_path / "out"))


def test_a_corpus_without_a_folder_and_one_misspelled(
    corpora: Corpora, tmp_path: Path, capsys
) -> None:
    text = said(capsys, command(corpora, tmp_path / "out", skip="noise"))
    assert "corpus 'noise' has no folder: give --corpus noise=DIR" in text
    text = said(capsys, command(corpora, tmp_path / "out", "--corpus", "niose=/x"))
    assert "did you mean 'noise'?" in text
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there_and_one_that_cannot_run(
    corpora: Corpora, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", str(tmp_path))
    text = said(capsys, command(corpora, tmp_path / "out", recipe=str(tmp_path / "no.yaml")))
    assert "no.yaml: no such file" in text
    text = said(capsys, command(corpora, tmp_path / "out", recipe="paper"))
    assert "demucs (stage 'enhance'): no weights 'demucs-dns48' in" in text


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ("tarin", "must be one of"),
        ("noise=tests", "must be one of"),
        ("niose=train", "did you mean 'noise'?"),
    ],
)
def test_an_unknown_split_or_role(
    split: str, told: str, corpora: Corpora, tmp_path: Path, capsys
) -> None:
    text = said(capsys, command(corpora, tmp_path / "out", "--split", split))
    assert told in text


def test_corpora_can_come_from_the_environment(
    corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORPUS_NOISE", str(corpora["noise"][0]))
    assert main(command(corpora, tmp_path / "out", skip="noise")) == 0


def test_verify_and_replay_tell_what_they_found(corpora: Corpora, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(command(corpora, out)) == 0
    assert main(["verify", str(out), "--deep"]) == 0
    given = [f"--corpus={n}={f[0]}" for n, f in corpora.items()]
    replay = ["replay", "000000002", "--dataset", str(out), *given]
    assert main([*replay, "--out", str(tmp_path / "audio")]) == 0
    assert "000000002: the same audio" in capsys.readouterr().out
    assert soundfile.info(str(tmp_path / "audio" / "000000002.flac")).frames == 122_880
    assert main(["replay", "99", "--dataset", str(out), *given]) == 2
    assert "sample 99 is not in it" in capsys.readouterr().err
    tar = out / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    assert main(["verify", str(out)]) == 1
    assert "0 of 1 shards are whole" in capsys.readouterr().out


@pytest.fixture
def made(corpora: Corpora, tmp_path: Path) -> Path:
    """A whole dataset."""
    assert main(command(corpora, tmp_path / "made")) == 0
    return tmp_path / "made"


def test_replay_without_the_corpus_says_what_to_give(made: Path, capsys) -> None:
    assert "--corpus speech=DIR" in said(capsys, ["replay", "0", "--dataset", str(made)])


def test_replay_follows_no_link_out_of_a_corpus_unasked(
    made: Path, corpora: Corpora, tmp_path: Path, capsys
) -> None:
    (tmp_path / "en").symlink_to(corpora["speech"][0] / "en")
    given = [f"--corpus={n}={f[0]}" for n, f in (corpora | {"speech": [tmp_path]}).items()]
    replay = ["replay", "000000002", "--dataset", str(made), *given]
    assert "--allow-outside" in said(capsys, replay)
    assert main([*replay, "--allow-outside"]) == 0


def test_replay_on_a_full_disk_leaves_no_half_file(
    made: Path, corpora: Corpora, tmp_path: Path, capsys
) -> None:
    """A file may not be larger than a limit here: what a full disk answers is alike."""
    given = [f"--corpus={n}={f[0]}" for n, f in corpora.items()]
    replay = ["replay", "000000002", "--dataset", str(made), *given, "--out", str(tmp_path / "a")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert f"{tmp_path}/a/000000002.flac: File too large" in said(capsys, replay)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "a").iterdir()) == []
