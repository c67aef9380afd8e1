"""Files as they come: one walk, one reader, and every verb says what it left out."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from data_specs.corpus import find_corpus
from data_specs.io import audio
from data_specs.io.audio import BadAudio, header_of, open_audio, require_sound
from data_specs.io.walk import counts, walk
from data_specs.rated import read_rated, require_heard
from data_specs.strict import SpecError
from pipeline.__main__ import main as pipeline
from pipeline.audio import read_part
from pipeline.corpora.manifest import CorpusError, scan
from tests.awkward import (
    FORMATS,
    RATE,
    Awkward,
    awkward,
    encoded,
    tone,
    with_flac_total,
    without_tag,
)
from tests.conftest import ROOT, one_corpus_recipe
from train.__main__ import main as train
from train.audio import open_clip, read_mono
from train.models.student import Student, variant
from train.scoring.files import choose_files
from train.scoring.scorer import StudentScorer

FAULTS = ROOT.parent / "shared" / "data" / "faults"


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A pipe that is opened waits for ever: end the test instead."""
    before = signal.signal(signal.SIGALRM, _waited)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _waited(number: int, frame: object) -> None:
    raise TimeoutError("it waits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Awkward:
    return awkward(tmp_path_factory.mktemp("awkward") / "corpus")


def put(folder: Path, name: str, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


# --- the walk -------------------------------------------------------------------------------------


def test_the_folder_is_awkward(folder: Awkward) -> None:
    assert len(folder.heard) + len(folder.left_out) >= 200


def test_every_file_is_found_once_or_left_out_by_name(folder: Awkward) -> None:
    found = walk(folder.folder)
    left_out = {one.path: one.reason for one in found.left_out}
    assert len(found.files) == len(set(found.files)) and not set(found.files) & set(left_out)
    assert set(found.files) | set(left_out) == set(folder.heard) | set(folder.left_out)
    for path, reason in left_out.items():
        assert reason.startswith(folder.left_out[path]), path


def test_two_loops_are_walked_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / name, "x.wav", encoded(1))
        for loop in ("one", "two"):
            (tmp_path / name / loop).symlink_to(tmp_path)
    assert walk(tmp_path).files == ["a/x.wav", "b/x.wav"]
    assert walk(tmp_path).folders == ["", "a", "b"]
    assert counts(walk(tmp_path).left_out) == "4 there already"
    assert list(choose_files([f"{tmp_path}/**/*.wav"]).files) == [
        tmp_path / "a/x.wav",
        tmp_path / "b/x.wav",
    ]


def test_a_folder_that_may_not_be_read_is_named_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "open", "x.wav", encoded(1))
    put(tmp_path / "shut", "y.wav", encoded(2))
    scandir = os.scandir

    def refused(path: str) -> Iterator[os.DirEntry[str]]:
        if path.endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    found = walk(tmp_path)
    assert found.files == ["open/x.wav"]
    assert [(one.path, one.reason) for one in found.left_out] == [
        ("shut", "folder cannot be read: Permission denied")
    ]


def test_what_may_not_be_read_is_told_with_its_reason_and_costs_no_other(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never as "no such file"."""
    names, opening = ("good.wav", "shut.wav"), os.open
    for number, name in enumerate(names):
        put(tmp_path / "in", name, encoded(number))

    def refused(path: Any, *rest: Any, **named: Any) -> int:
        if str(path).endswith("shut.wav"):
            raise PermissionError(13, "Permission denied", str(path))
        return opening(path, *rest, **named)

    monkeypatch.setattr(os, "open", refused)
    long = tmp_path / ("x" * 300 + ".wav")
    status, rows = scored(tmp_path / "s.csv", str(tmp_path / "in"), str(long))
    errors = {Path(path).name: row["error"] for path, row in rows.items()}
    assert status == 1 and errors["good.wav"] == ""
    assert "Permission denied" in errors["shut.wav"] and "File name too long" in errors[long.name]
    corpus = find_corpus("speech", "test")
    table = scan("speech", corpus, [tmp_path / "in"])
    assert table.rejections() == {"cannot be read": 1} and len(table.usable) == 1
    assert table.left_out()[0].reason == "cannot be read: Permission denied"
    rated = put(tmp_path, "rated.csv", "\n".join(["path,mos", "in/shut.wav,3"]).encode())
    with pytest.raises(SpecError, match=r"rated\.csv: line 2: .*Permission denied"):
        require_heard(read_rated(rated))
    rated.write_text(f"path,mos\n{long},3\n")
    with pytest.raises(SpecError, match=r"rated\.csv: line 2: .*File name too long"):
        read_rated(rated)
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (("loop", "cannot be read: Too many levels"), ("none", "no such folder")):
        with pytest.raises(CorpusError, match=said):
            scan("speech", corpus, [tmp_path / name])


# --- the reader -----------------------------------------------------------------------------------


def test_all_that_is_found_is_heard_whole_or_told_why_not(folder: Awkward) -> None:
    for name in walk(folder.folder).files:
        path = folder.folder / name
        if name in folder.heard:
            header = header_of(path)
            assert abs(header.frames / header.sample_rate_hz - folder.heard[name]) < 0.2, (
                name
            )  # an encoder's delay
            require_sound(path)
            with open_audio(path) as recording:
                whole = recording.whole()
                assert len(whole) == header.frames and np.abs(whole).max() > 0.1, name
        else:
            with pytest.raises(BadAudio) as told:
                require_sound(path)
            assert told.value.reason.startswith(folder.left_out[name]), name
            assert str(path) in str(told.value)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_good_file_is_read_as_soundfile_reads_it(tmp_path: Path, ending: str) -> None:
    path = put(tmp_path, f"x.{ending}", encoded(3, ending, 2.0))
    with soundfile.SoundFile(path) as file:
        plain, rate = file.read(file.frames, "float32", True), file.samplerate
    with open_audio(path) as recording:
        assert np.array_equal(recording.whole(), plain)
    with soundfile.SoundFile(path) as file, open_audio(path) as recording:
        file.seek(7_000)
        assert np.array_equal(recording.read(7_000, 5_000), file.read(5_000, "float32", True))
    wave_T, rate_hz = read_mono(path)
    assert np.array_equal(wave_T, plain[:, 0]) and rate_hz == rate


def test_chained_streams_follow_each_other(tmp_path: Path) -> None:
    one, two = encoded(4, "ogg", 1.0), encoded(5, "ogg", 1.5)
    path = put(tmp_path, "x.ogg", one + two)
    both = [soundfile.read(io.BytesIO(data), dtype="float32")[0] for data in (one, two)]
    with open_audio(path) as recording:
        assert np.array_equal(recording.whole()[:, 0], np.concatenate(both))
        assert np.array_equal(
            recording.read(15_000, 3_000)[:, 0], np.concatenate(both)[15_000:18_000]
        )
    wave = read_part(path, 15_000, 3_000)
    assert np.array_equal(wave, np.concatenate(both)[15_000:18_000])


def test_what_cannot_be_sought_is_read_from_any_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.audio.LONG_SECONDS", 0.5)
    path = put(tmp_path, "x.wav", encoded(6, "wav", 2.0, "GSM610"))
    with soundfile.SoundFile(path) as file:
        assert not file.seekable()
        whole = file.read(file.frames, "float32")
    for start in (9_000, 200, 20_000):  # forward, and back
        assert np.array_equal(read_part(path, start, 2_000), whole[start : start + 2_000])
    joined = np.concatenate(list(open_clip(path).blocks()))
    assert np.array_equal(joined, whole)


def test_joined_mp3_is_heard_to_its_end(tmp_path: Path) -> None:
    path = put(tmp_path, "x.mp3", encoded(7, "mp3", 2.0) + without_tag(encoded(8, "mp3", 3.0)))
    with open_audio(path) as recording:
        wave_T = recording.whole()[:, 0]
    assert abs(len(wave_T) / RATE - 5.0) < 0.3
    assert _pitch(wave_T[8_000:24_000]) == pytest.approx(200 + 3 * 7, abs=2)
    assert _pitch(wave_T[-24_000:-8_000]) == pytest.approx(200 + 3 * 8, abs=2)


def _pitch(wave_T: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(wave_T * np.hanning(len(wave_T))))
    return float(np.argmax(spectrum) * RATE / len(wave_T))


@pytest.mark.parametrize("bit", range(36))
def test_a_bit_of_a_flacs_length_makes_it_neither_longer_nor_shorter(
    tmp_path: Path, bit: int
) -> None:
    data = encoded(9, "flac")
    path = put(tmp_path, "x.flac", with_flac_total(data, lambda total: total ^ 1 << bit))
    try:
        assert header_of(path).frames == len(tone(9))
    except BadAudio as told:
        assert told.reason.startswith("cut short: ends after 20000 of ")


def test_a_flac_of_unknown_length_costs_no_other_a_sample(tmp_path: Path) -> None:
    put(tmp_path, "good.flac", encoded(10, "flac"))
    put(tmp_path, "unknown.flac", with_flac_total(encoded(11, "flac"), lambda total: 0))
    table = scan("speech", find_corpus("speech", "test"), [tmp_path]).table
    assert table["frames"].to_pylist() == [20_000, 20_000]
    assert len(read_part(tmp_path / "unknown.flac", 4_000, 30_000)) == 16_000
    assert np.array_equal(
        read_mono(tmp_path / "unknown.flac")[0],
        soundfile.read(io.BytesIO(encoded(11, "flac")), dtype="float32")[0],
    )


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(BadAudio, match="named pipe"):
        header_of(tmp_path / "pipe.wav")
    with pytest.raises(BadAudio, match="device"):
        header_of("/dev/zero")
    with pytest.raises(BadAudio, match="folder"):
        header_of(tmp_path)


def test_a_long_file_is_not_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "long.flac", encoded(12, "flac", 2.0))
    monkeypatch.setattr(audio, "LARGEST_BYTES", 4 * 31_999)
    with pytest.raises(BadAudio, match="too long"):
        read_mono(path)


# --- the verbs ------------------------------------------------------------------------------------


KINDS = ("cut short", "dead link", "format not read", "hidden")


def expected(folder: Awkward) -> dict[str, str]:
    """Why each file is left out; empty for those that are heard."""
    return folder.left_out | dict.fromkeys(folder.heard, "")


def test_manifest_lists_every_file(
    folder: Awkward, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, corpus = tmp_path / "manifests", f"speech={folder.folder}"
    assert (
        pipeline(
            ["manifest", str(one_corpus_recipe(tmp_path)), "--corpus", corpus, "--out", str(out)]
        )
        == 0
    )
    rows = pq.read_table(out / "speech.parquet").to_pylist()
    assert {row["path"] for row in rows} == set(expected(folder))
    assert len(rows) == len(expected(folder))
    for row in rows:
        why = expected(folder)[row["path"]]
        assert bool(row["rejected"]) == (row["path"] not in folder.heard), row
        assert row["rejected"].startswith(why), row
    said = capsys.readouterr().out
    for kind in (*KINDS, "Git LFS pointer"):
        assert kind in said
    assert "names/hard.wav" in said and "dead.wav" in said


def test_plan_draws_every_file_that_is_heard_and_no_other(
    folder: Awkward, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, corpus = tmp_path / "plan.parquet", f"speech={folder.folder}"
    drawing = ["plan", str(one_corpus_recipe(tmp_path)), "--corpus", corpus, "--split", "all"]
    assert pipeline([*drawing, "--samples", "4000", "--out", str(out)]) == 0
    assert set(pq.read_table(out)["speech.file"].to_pylist()) == set(folder.heard)
    said = capsys.readouterr().out
    for kind in (*KINDS, "Git LFS pointer"):
        assert kind in said


@pytest.mark.slow
def test_shards_are_made_of_every_file_that_is_heard(
    folder: Awkward, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = one_corpus_recipe(tmp_path, teacher={"name": "mfcc"}, shard_samples=250)
    out = tmp_path / "shards"
    making = ["shards", str(path), "--corpus", f"speech={folder.folder}", "--split", "all"]
    making += ["--samples", "250", "--out", str(out), "--engine", "local", "--workers", "1"]
    assert pipeline(making) == 0
    assert "cut short" in capsys.readouterr().out
    record = json.loads((out / "shard-000000.json").read_text())
    assert record["samples"] == 250 and not record["dropped"]


def test_evaluate_compares_on_every_clip_or_names_it(
    folder: Awkward, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(names: Iterable[str]) -> Path:
        table = tmp_path / "labels.csv"
        with table.open("w", newline="") as file:
            rows = [(folder.folder / name, 1 + number % 5) for number, name in enumerate(names)]
            csv.writer(file).writerows([("path", "mos"), *rows])
        return table

    judging = ["evaluate", "--model", "mfcc", "--out", str(tmp_path / "out"), "--rated"]
    unread = [name for name, why in folder.left_out.items() if why == "cut short"]
    assert train([*judging, str(rate([*folder.heard, *unread]))]) == 1
    said = "".join(capsys.readouterr())
    assert f"{len(unread)} of {len(unread) + len(folder.heard)} clips are left out" in said
    for name in unread:
        assert f"not scored: {folder.folder / name}: cannot be read as audio: cut short" in said


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    scorer = StudentScorer(Student(variant("v1")), "small", "0" * 64)
    monkeypatch.setattr("train.scoring.score.load", lambda *_: scorer)


def scored(out: Path, *names: str) -> tuple[int, dict[str, dict[str, str]]]:
    status = train(["score", *names, "--out", str(out)])
    with out.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == len(rows)
    return status, {row["path"]: row for row in rows}


def test_score_scores_or_names_every_file(
    small: None, folder: Awkward, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows = scored(tmp_path / "s.csv", str(folder.folder))
    lost = {name for name, why in folder.left_out.items() if why not in ("hidden", "there already")}
    assert status == 1
    assert {os.path.relpath(path, folder.folder) for path in rows} == set(folder.heard) | lost
    for path, row in rows.items():
        assert bool(row["mos"]) == (os.path.relpath(path, folder.folder) in folder.heard), row
        assert bool(row["error"]) != bool(row["mos"])
    said = capsys.readouterr()
    assert f"{len(folder.heard)} scored, 0 scored before, {len(lost)} not (" in said.out
    for kind in ("cut short", "dead link", "format not read", "Git LFS pointer", "not a file"):
        assert kind in said.out
    assert "hidden" in said.err and "there already" in said.err


def test_noise_is_made_of_the_talkers_that_can_be_heard(
    folder: Awkward, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["corpora", "noise", "--out", str(tmp_path / "noise"), "--count", "5", "--workers", "1"]
    assert pipeline([*made, "--from", str(folder.folder)]) == 0
    assert len(list((tmp_path / "noise").rglob("*.flac"))) == 5
    said = capsys.readouterr().err
    for kind in KINDS:
        assert kind in said


@pytest.mark.shared
def test_faults_that_users_met(small: None, tmp_path: Path) -> None:
    seconds = {
        "flac_of_unknown_length.flac": 3.0,
        "gsm610_wav49.wav": 8.0,
        "two_chained_oggs_5s_9s.ogg": 14.0,
        "vbr_without_xing_10s.mp3": 10.0,
    }
    reasons = {"git_lfs_pointer.wav": "Git LFS pointer", "mp3_cut_short_8s.mp3": "cut short"}
    table = scan("speech", find_corpus("speech", "test"), [FAULTS]).table
    for row in table.to_pylist():
        if row["path"] in seconds:
            length = row["frames"] / row["sample_rate_hz"]
            assert length == pytest.approx(seconds.pop(row["path"]), abs=0.1)
            assert not row["rejected"]
            assert len(read_part(FAULTS / row["path"], 32_000, 8_000)) == 8_000
        else:
            assert row["rejected"].startswith(reasons[row["path"]])
    assert not seconds
    status, rows = scored(tmp_path / "s.csv", str(FAULTS))
    assert status == 1 and len(rows) == 6
    assert {Path(path).name for path, row in rows.items() if row["error"]} == set(reasons)


def test_names_that_are_not_utf_8(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9.wav")
    for number, each in enumerate((name, "good.wav")):
        put(tmp_path / "in", each, encoded(number))
    status, rows = scored(tmp_path / "s.csv", str(tmp_path / "in"))
    assert status == 0 and str(tmp_path / "in" / name) in rows
    table = scan("speech", find_corpus("speech", "test"), [tmp_path / "in"])
    assert [row["path"] for row in table.usable.to_pylist()] == ["good.wav"]
    assert table.rejections() == {"name is not UTF-8": 1}
    assert table.left_out()[0].path == "caf\\udce9.wav"


def test_output_in_ascii(tmp_path: Path) -> None:
    for number, name in enumerate(("日本.wav", os.fsdecode(b"caf\xe9.wav"), "ümlaut.m4a")):
        put(tmp_path / "in", name, encoded(number))
    command = [sys.executable, "-m", "pipeline", "manifest", str(one_corpus_recipe(tmp_path))]
    corpus = ["--corpus", f"speech={tmp_path / 'in'}", "--out", str(tmp_path / "out")]
    for more in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}):
        done = subprocess.run(
            [*command, *corpus], cwd=ROOT, env={**os.environ, **more}, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert b"mlaut.m4a" in done.stdout and b"1 files" in done.stdout


# --- lists and tables -----------------------------------------------------------------------------

ENDS = {"unix": "\n", "windows": "\r\n", "old mac": "\r"}
MARKS = ("utf-8", "utf-8-sig", "utf-16")


@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("encoding", MARKS)
def test_lists_of_any_line_ending(
    tmp_path: Path, end: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a.wav", "line\u2028separator.wav", "ü.wav"]
    text = end.join(["", *names, "", ""]).encode(encoding)
    listed = put(tmp_path, "list.txt", text)
    assert list(choose_files([listed]).files) == [tmp_path / name for name in names]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), "ascii"))
    assert list(choose_files(["-"]).files) == [Path(name) for name in names]


@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("encoding", MARKS)
def test_tables_of_any_line_ending(tmp_path: Path, end: str, encoding: str) -> None:
    put(tmp_path, "ü.wav", encoded(1))
    text = end.join(["path,mos,votes,ci", "ü.wav,3.5,8,0.2", ""])
    (clip,) = read_rated(put(tmp_path, "labels.csv", text.encode(encoding)))
    assert (clip.path.name, clip.mos, clip.votes) == ("ü.wav", 3.5, 8)
    assert clip.where == f"{tmp_path / 'labels.csv'}: line 2"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("c.wav,3,8,0", "line 2: no such audio file"),
        ("a.wav,3,8,0\nb.wav,seven,8,0", "line 3: mos 'seven' is not a number"),
        ("a.wav,7,8,0", "line 2: mos 7.0 is not on the scale 1-5"),
        ("", "no rows"),
        ("a.wav,nan,8,0", "line 2: mos nan is not on the scale"),
        ("a.wav,inf,8,0", "line 2: mos inf is not on the scale"),
        ("a.wav,0.5,8,0", "line 2: mos 0.5 is not on the scale"),
        ("a.wav,3,nan,0", "line 2: votes 'nan' is not a number from 1"),
        ("a.wav,3,inf,0", "line 2: votes 'inf' is not a number from 1"),
        ("a.wav,3,-1,0", "line 2: votes '-1' is not a number from 1"),
        ("a.wav,3,0,0", "line 2: votes '0' is not a number from 1"),
        ("a.wav,3,1e300,0", "line 2: votes '1e300' is not a number from 1"),
        ("a.wav,3,many,0", "line 2: votes 'many' is not a number"),
        ("a.wav,3,8,nan", "line 2: ci 'nan' is not a number from 0"),
        ("a.wav,3,8,-0.1", "line 2: ci '-0.1' is not a number from 0"),
        ("a.wav,3,5,8,0", "line 2: more cells than columns"),
        ("a.wav,3,8,0\nb.wav,3,8,0\na.wav,4,8,0", "line 4: .*twice.*first in line 2"),
        ("a.wav,3,8,0\n./a.wav,4,8,0", "line 3: .*twice.*first in line 2"),
        ('a.wav,3,8,0\n"b.wav,3,8,0', "not a CSV"),
    ],
)
def test_a_wrong_table_is_told_by_row(tmp_path: Path, rows: str, told: str) -> None:
    for name in ("a.wav", "b.wav"):
        put(tmp_path, name, encoded(1))
    table = put(tmp_path, "labels.csv", f"path,mos,votes,ci\n{rows}\n".encode())
    with pytest.raises(SpecError, match=f"labels.csv: {told}"):
        read_rated(table)


def test_a_table_that_is_no_text(tmp_path: Path) -> None:
    table = put(tmp_path, "labels.csv", "path,mos\nü.wav,3\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.csv: line 2: not text in UTF-8"):
        read_rated(table)
    with pytest.raises(ValueError, match="zero bytes"):
        read_rated(put(tmp_path, "labels.csv", b"path,mos\n\0\n"))
    with pytest.raises(SpecError, match="no column 'mos'"):
        read_rated(put(tmp_path, "labels.csv", b"path,score\na.wav,3\n"))


def test_unreadable_rated_clips_are_told_with_file_and_line(tmp_path: Path) -> None:
    lines = ["path,mos"]
    for name, data in {
        "good.wav": encoded(1),
        "cut.flac": encoded(2, "flac")[:2_000],
        "text.wav": b"no audio",
    }.items():
        put(tmp_path, name, data)
        lines.append(f"{name},3")
    table = put(tmp_path, "labels.csv", "\n".join(lines).encode())
    with pytest.raises(SpecError) as told:
        require_heard(read_rated(table))
    assert "2 clips cannot be read" in str(told.value)
    assert f"{table}: line 3: {tmp_path / 'cut.flac'}" in str(told.value)
    assert f"{table}: line 4: {tmp_path / 'text.wav'}" in str(told.value)
    assert "good.wav" not in str(told.value)


def test_fit_tells_an_unreadable_rated_clip_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["path,mos"]
    for number in range(20):
        put(tmp_path, f"{number}.wav", encoded(number) if number != 7 else b"no audio")
        lines.append(f"{number}.wav,{1 + number % 5}")
    table = put(tmp_path, "labels.csv", "\n".join(lines).encode())
    run = tmp_path / "run"
    assert train(["fit", "--student", "v1", "--rated", str(table), "--out", str(run)]) == 2
    assert f"{table}: line 9: {tmp_path / '7.wav'}" in capsys.readouterr().err
    assert not (run / "last.pt").exists()
