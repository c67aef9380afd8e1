"""``python -m tests.bench score``: the same clips for all, ratios, differences; no timings."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import soundfile

from tests.bench import score as bench_score
from tests.bench.__main__ import main as run_bench
from tests.bench.score import Contender, clips_of, command, moved, race, rows_of, table
from tests.train_helpers import tone_pcm


@pytest.fixture
def entrants():
    return [Contender("theirs", lambda w: float(w[0])), Contender("ours", lambda w: w[0] + 0.5)]


def test_all_hear_the_same_clips_in_the_same_order(entrants):
    clips = [np.full(200, number, np.float32) for number in range(3)]
    race(entrants, clips, 2)
    assert entrants[0].scores == [0, 1, 2] * 2
    assert entrants[1].scores == [0.5, 1.5, 2.5] * 2
    theirs, ours = rows_of("x", entrants)
    assert theirs["ratio"] == "1.00"
    assert (ours["mean_difference"], ours["max_size"]) == ("+0.50000", "0.50000")
    later = moved(clips, entrants[0], 2)
    assert later.scores == entrants[0].scores and not later.seconds
    text = table([theirs, ours, *rows_of("x", [entrants[0], later])[1:]])
    assert len(text.splitlines()) == 4


def test_clips_are_made_or_cut_from_recordings(tmp_path):
    made = clips_of(8000, 2, None)
    assert not np.array_equal(*made)
    soundfile.write(tmp_path / "a.wav", tone_pcm(0, 5000), 16_000)
    soundfile.write(tmp_path / "b.wav", tone_pcm(1, 5000), 16_000)
    first, second = clips_of(4000, 2, tmp_path)
    assert np.allclose(first, tone_pcm(0, 5000)[:4000] / 32768)
    assert np.allclose(second[1000:], tone_pcm(1, 5000)[:3000] / 32768)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no recordings"):
        list(clips_of(10, 1, empty))


def test_a_command_that_fails_says_why(tmp_path):
    held = np.ones(30_000_000)  # 240 MB that are ours, not the command's
    ran = command(["-c", "import time; b = bytearray(50_000_000); time.sleep(0.3)"], tmp_path)
    assert 50 < ran.peak_mb < held.nbytes / 1e6
    with pytest.raises(ValueError, match="so it goes"):
        command(["-c", "raise SystemExit('so it goes')"], tmp_path)


def test_the_table_of_folder_and_long_file(tmp_path, monkeypatch):
    def ran(words, folder):
        if any(word.endswith("/all") for word in words):
            where = sorted((folder / "all").glob("*.wav"))
            if "-c" in words:
                lines = ["filename, DistillMOS", *(f"{path}, 3.0" for path in where)]
                (folder / "theirs.csv").write_text("\n".join(lines))
            else:
                lines = ["path,mos", *(f"{path},3.25" for path in where)]
                (folder / "ours.csv").write_text("\n".join(lines))
        return bench_score.Ran(2.0 if "-c" in words else 0.5, 100)

    monkeypatch.setattr(bench_score, "command", ran)
    monkeypatch.setattr(bench_score.os, "sched_setaffinity", lambda *_: None)
    out = tmp_path / "t.csv"
    options = ["--clips", "0", "--long-clips", "0", "--files", "4", "--long-hours", "0.04"]
    assert run_bench(["score", *options, "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    by_name = {row["scorer"]: row for row in rows}
    assert by_name["train score auto"]["ratio"] == "4.00"
    assert by_name["train score auto"]["max_size"] == "0.25000"
    assert sum("one file" in row["what"] for row in rows) == 2
