"""``python -m train score``: what is found, what is written, resumed, and told."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import resource
import shutil
import sys

import numpy as np
import pytest
import soundfile

from tests.tolerance import rounding
from tests.train_helpers import tone_pcm
from train.__main__ import main
from train.scoring import table as tables
from train.scoring.base import Scorer
from train.scoring.files import choose_files
from train.scoring.scorer import StudentScorer
from train.scoring.table import COLUMNS, LineTable, open_table

ENDINGS = [".csv", ".jsonl", ".parquet"]


@pytest.fixture
def scored(small, monkeypatch):
    """The paths that the command scores, as it scores them."""
    seen: list[str] = []
    original = Scorer.score_files

    def watched(self, paths, *options):
        paths = list(paths)
        seen.extend(path.name for path in paths)
        return original(self, paths, *options)

    monkeypatch.setattr("train.scoring.score.load", lambda *_: small)
    monkeypatch.setattr(Scorer, "score_files", watched)
    return seen


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.wav", "b.flac", "deep/c.ogg"]):
        soundfile.write(folder / name, tone_pcm(number, 4000), (16_000, 44_100, 8000)[number])
    stereo = np.stack([tone_pcm(5, 4000), tone_pcm(7, 4000)], axis=1)
    soundfile.write(folder / "d.wav", stereo, 16_000)
    return folder


def rows_in(path):
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def names(rows):
    return [str(row["path"]).rsplit("/", 1)[1] for row in rows]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_second_run_scores_only_what_is_missing(scored, clips, tmp_path, ending):
    out = tmp_path / f"scores{ending}"
    command = ["score", str(clips), "--out", str(out)]
    assert main(command) == 0
    assert scored == ["a.wav", "b.flac", "d.wav", "c.ogg"]
    (clips / "bad.wav").write_text("no audio")
    soundfile.write(clips / "e.wav", tone_pcm(9, 4000), 16_000)
    scored.clear()
    assert main(command) == 1
    assert scored == ["bad.wav", "e.wav"]
    assert main(command) == 1  # the bad file is tried again, and told once
    rows = rows_in(out)
    assert names(rows) == ["a.wav", "b.flac", "d.wav", "c.ogg", "bad.wav", "e.wav"]
    assert list(rows[0]) == list(COLUMNS)
    assert [row["mos"] in (None, "") for row in rows] == [False] * 4 + [True, False]
    assert all(bool(row["error"]) == (row["mos"] in (None, "")) for row in rows)
    assert {row["model"] for row in rows} == {"small"}
    assert not list(tmp_path.glob(".scores*"))


def test_a_changed_file_is_scored_again_and_another_model_too(
    scored, clips, tmp_path, small, monkeypatch
):
    out = tmp_path / "scores.csv"
    command = ["score", str(clips / "a.wav"), "--out", str(out)]
    assert main(command) == 0
    soundfile.write(clips / "a.wav", tone_pcm(9, 5000), 16_000)
    assert main(command) == 0
    other = StudentScorer(small.network, "other", "1" * 64)
    monkeypatch.setattr("train.scoring.score.load", lambda *_: other)
    assert main(command) == 0
    assert main([*command, "--padding", "repeat"]) == 0
    assert main(command) == 0
    monkeypatch.setattr(StudentScorer, "version", "other code, or another device")
    assert main(command) == 0
    rows = rows_in(out)
    assert [row["model"] for row in rows] == ["small", "small", *["other"] * 3]
    assert rows[0]["mos"] != rows[1]["mos"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.97])
def test_a_torn_table_is_repaired(scored, clips, tmp_path, ending, kept):
    whole, torn = tmp_path / f"whole{ending}", tmp_path / f"torn{ending}"
    options = [str(clips), "--channels", "each", "--curve"]
    assert main(["score", *options, "--out", str(whole)]) == 0
    text = whole.read_bytes()
    torn.write_bytes(text[: int(kept * len(text))])
    scored.clear()
    assert main(["score", *options, "--out", str(torn)]) == 0
    assert torn.read_bytes() == text
    assert 0 < len(scored) < (5 if kept == 0.3 else 4)


def test_the_rows_of_one_file_are_whole_or_not_there(scored, clips, tmp_path):
    out = tmp_path / "scores.jsonl"
    command = ["score", str(clips / "d.wav"), "--channels", "each", "--out", str(out)]
    assert main(command) == 0
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    out.write_text(lines[0])
    assert main(command) == 0
    assert out.read_text() == "".join(lines)


def test_a_killed_parquet_run_goes_on_from_its_journal(scored, clips, tmp_path):
    out = tmp_path / "scores.parquet"
    assert main(["score", str(clips / "a.wav"), "--out", str(out)]) == 0
    assert main(["score", str(clips), "--out", str(tmp_path / "j.jsonl")]) == 0
    (tmp_path / "j.jsonl").rename(tmp_path / ".scores.parquet.jsonl")  # as a kill leaves it
    scored.clear()
    assert main(["score", str(clips), "--out", str(out)]) == 0
    assert scored == []
    assert sorted(names(rows_in(out))) == ["a.wav", "b.flac", "c.ogg", "d.wav"]


def test_parquet_without_pyarrow_says_what_to_install(scored, clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["score", str(clips), "--out", str(tmp_path / "s.parquet")]) == 2
    assert main(["score", str(clips), "--out", str(tmp_path / "s.csv")]) == 0


def test_a_curve_has_a_row_a_window(scored, tmp_path):
    soundfile.write(tmp_path / "long.wav", tone_pcm(1, 12 * 16_000), 16_000)
    out = tmp_path / "s.jsonl"
    command = ["score", str(tmp_path / "long.wav"), "--curve", "--mode", "fast", "--out", str(out)]
    assert main(command) == 0
    clip, *curve = rows_in(out)
    assert (clip["scope"], clip["start_seconds"], clip["end_seconds"]) == ("clip", 0, 12)
    assert len(curve) == 6 == clip["rows"] - 1
    assert {row["scope"] for row in curve} == {"window"}
    assert np.mean([row["mos"] for row in curve]) == pytest.approx(clip["mos"], abs=rounding(16, 5))
    assert curve[-1]["end_seconds"] == pytest.approx(12, abs=0.1)


def test_channels(scored, clips, tmp_path):
    out = tmp_path / "s.csv"
    assert main(["score", str(clips), "--channels", "each", "--out", str(out)]) == 0
    rows = rows_in(out)
    assert names(rows).count("d.wav") == 2
    assert [row["channel"] for row in rows if row["path"].endswith("d.wav")] == ["0", "1"]


def test_standard_input(scored, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(f"{clips}/a.wav\n\n{clips}/d.wav\n".encode()))
    )
    assert main(["score", "-", "--out", str(tmp_path / "s.csv")]) == 0
    assert scored == ["a.wav", "d.wav"]


def test_globs_folders_and_doubles(clips, monkeypatch):
    monkeypatch.chdir(clips)
    assert list(map(str, choose_files(["*.wav"]).files)) == ["a.wav", "d.wav"]
    assert list(map(str, choose_files(["**/*.ogg", "."]).files)) == [
        *("deep/c.ogg", "a.wav", "b.flac", "d.wav")
    ]
    (clips / "x[1].wav").touch()
    assert list(map(str, choose_files(["x[1].wav"]).files)) == ["x[1].wav"]
    with pytest.raises(ValueError, match=r"\*.mp3"):
        choose_files(["*.mp3"])


def test_exit_codes(scored, clips, tmp_path, capsys):
    out = str(tmp_path / "s.csv")
    bad = clips / "bad.wav"
    bad.write_text("no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    assert main(["score", str(tmp_path / "empty.wav"), "--out", out]) == 2
    assert "no samples" in capsys.readouterr().err
    assert main(["score", str(bad), "--out", str(tmp_path / "no/where.csv")]) == 2
    assert main(["score", str(bad), "--out", out]) == 2
    assert "bad.wav" in capsys.readouterr().err
    assert main(["score", str(clips), "--out", out]) == 1
    assert main(["score", str(clips / "a.wav"), "--out", out]) == 0
    assert main(["score", str(clips), "--out", str(tmp_path / "s.txt")]) == 2
    assert main(["score", str(tmp_path / "no*"), "--out", out]) == 2
    assert main(["score", str(clips), "--batch-seconds", "0", "--out", out]) == 2


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
@pytest.mark.parametrize("text", ["name,score\nx,1\n", "precious notes", "{}\n"])
def test_another_file_is_never_written_to(scored, clips, tmp_path, ending, text):
    out = tmp_path / f"mine{ending}"
    out.write_text(text)
    assert main(["score", str(clips), "--out", str(out)]) == 2
    assert out.read_text() == text


def test_two_runs_do_not_write_to_one_table(tmp_path):
    table = LineTable(tmp_path / "s.csv")
    with pytest.raises(ValueError, match="another run"):
        LineTable(tmp_path / "s.csv")
    table.close()
    LineTable(tmp_path / "s.csv").close()


def test_a_path_that_is_not_utf8_and_one_with_a_comma(scored, tmp_path):
    source = tmp_path / "a.wav"
    soundfile.write(source, tone_pcm(0, 800), 16_000)
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9,\n1.wav")
    os.rename(source, odd)
    out = tmp_path / "s.csv"
    for _ in range(2):
        assert main(["score", odd, "--out", str(out)]) == 0
    with out.open(newline="", errors="surrogateescape") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [odd]
    assert len(scored) == 1
    assert main(["score", odd, "--out", str(tmp_path / "s.parquet")]) == 0
    assert len(rows_in(tmp_path / "s.parquet")) == 1


def remove_meanwhile(monkeypatch, act):
    """Do something to the table once two files are scored."""
    original = Scorer.score_files

    def watched(self, paths, *options):
        for number, score in enumerate(original(self, paths, *options)):
            if number == 2:
                act()
            yield score

    monkeypatch.setattr(Scorer, "score_files", watched)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("what", ["table", "folder", "replaced"])
def test_a_table_removed_meanwhile_is_told_and_its_rows_are_kept(
    scored, clips, tmp_path, monkeypatch, capsys, ending, what
):
    out = tmp_path / "results" / f"s{ending}"
    out.parent.mkdir()
    assert main(["score", str(clips / "a.wav"), "--out", str(out)]) == 0

    def act():
        if what == "folder":
            shutil.rmtree(out.parent)
            return
        for path in out.parent.iterdir():  # a Parquet table's journal, too
            path.unlink()
        if what == "replaced":
            out.write_text("another's")

    remove_meanwhile(monkeypatch, act)
    (clips / "e.wav").write_bytes((clips / "a.wav").read_bytes())
    assert main(["score", str(clips), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"{out}: was removed or replaced" in said
    place = out
    if what == "replaced":
        assert out.read_text() == "another's"
        (place,) = [path for path in out.parent.iterdir() if path != out]
    assert str(place) in said
    assert sorted(names(rows_in(place))) == ["a.wav", "b.flac", "c.ogg", "d.wav", "e.wav"]
    assert {path.name for path in out.parent.iterdir()} == {out.name, place.name}


def rows_for(path, number):
    """A row of a file, without scoring it."""
    row = dict.fromkeys(COLUMNS) | {"path": f"{path}/{number}.wav", "mos": 3.0, "rows": 1}
    return [row | dict.fromkeys(tables.Settings._fields, "x")]


def test_a_parquet_table_is_locked_until_it_is_written(tmp_path, monkeypatch):
    out, refused = tmp_path / "s.parquet", []
    original = tables.write_atomically

    def watched(path, write):
        with pytest.raises(ValueError, match="another run"):
            open_table(out)
        refused.append(path)
        original(path, write)

    monkeypatch.setattr(tables, "write_atomically", watched)
    for number in range(3):
        table = open_table(out)
        table.append(rows_for(tmp_path, number))
        assert table.close() == ""
    assert len(refused) == len(rows_in(out)) == 3


def test_a_journal_that_went_while_it_was_waited_for_is_not_written_to(tmp_path, monkeypatch):
    out = tmp_path / "s.parquet"
    first = open_table(out)
    first.append(rows_for(tmp_path, 0))
    original = tables.lock

    def late(file, path):
        monkeypatch.setattr(tables, "lock", original)
        first.close()  # the second run has opened the journal that goes now
        return original(file, path)

    monkeypatch.setattr(tables, "lock", late)
    second = open_table(out)
    second.append(rows_for(tmp_path, 1))
    second.close()
    assert names(rows_in(out)) == ["0.wav", "1.wav"]


def test_a_file_system_without_locks_is_warned_of(scored, clips, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("data_specs.io.files.fcntl.flock", no_locks)
    out = tmp_path / "s.csv"
    assert main(["score", str(clips), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert f"warning: {out}" in said and "no locks" in said and "another run" not in said
    assert len(rows_in(out)) == 4


def test_a_file_that_cannot_grow_is_told_with_the_tables_path(scored, clips, tmp_path, capsys):
    """A file may not be larger than a limit here: what a full disk or a quota answers is alike."""
    out = tmp_path / "s.csv"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        assert main(["score", str(clips), "--out", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{out}: File too large" in capsys.readouterr().err
    assert main(["score", str(clips), "--out", str(out)]) == 0
    assert len(rows_in(out)) == 4
