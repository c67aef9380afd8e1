"""``KILLS`` kills over trainers, scoring and export, at moments that a seed draws: the same command
goes on, and what it leaves is an undisturbed run's, byte for byte."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.export_helpers import write_run
from tests.forks import forked
from tests.train_helpers import write_dataset, write_rated
from train.__main__ import main

KILLS = int(os.environ.get("KILLS", "50"))
IN_A_ROW = 6
"""Kills of one run before it may end."""

QUIET = ("--device", "cpu", "--threads", "1", "--logger", "none")
Words = tuple[str, ...]


def fit(place: Path) -> Words:
    """A student on shards; a checkpoint at each of ten validations."""
    options = ("--student", "v1", "--preset", "fast", "--steps", "10", "--batch", "2", "--warmup")
    more = ("2", "--validate-every", "1", "--precision", "fp32", "--workers", "0", *QUIET)
    return ("fit", "--shards", str(place / "shards"), *options, *more)


def teacher(place: Path) -> Words:
    """A head on rated clips; a checkpoint at every second step."""
    size = ("--dim", "4", "--heads", "2", "--layers", "1", "--batch", "2", "--precision", "fp32")
    steps = ("--steps", "40", "--checkpoint-every", "2", "--validate-every", "10")
    return ("teacher", "--front-end", "mfcc", "--rated", str(place / "labels.csv"), *size, *steps)


def prune(place: Path) -> Words:
    """A run's student, round by round."""
    sizes = ("--rate", "0.1", "--sizes", "60", "--steps", "3", "--batch", "2", "--lr", "1e-3")
    words = ("--model", str(place / "run"), "--rated", str(place / "labels.csv"), *sizes)
    return ("prune", *words, "--checkpoint-every", "2", *QUIET)


def score(place: Path) -> Words:
    """A folder of clips into a table."""
    return ("score", str(place), "--model", str(place / "run"), "--curve", "--batch-seconds", "8")


def export(place: Path) -> Words:
    """A bundle with ONNX."""
    return ("export", "--model", str(place / "run"))


JOBS: dict[str, tuple[Callable[[Path], Words], str, Words]] = {
    "fit": (fit, "out", ("model.safetensors",)),
    "teacher": (teacher, "out", ("head.safetensors",)),
    "prune": (prune, "out", ("pruned-60/model.sparse.safetensors", "results.csv")),
    "score": (score, "out.csv", ("",)),
    "export": (export, "out", ("model.safetensors", "model.onnx")),
}
"""By name: the command, what it writes, and the files of it that must be the same."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, rated clips and a student."""
    folder = tmp_path_factory.mktemp("kills")
    write_dataset(folder / "shards", shards=2, samples=4, validation=2)
    write_rated(folder, clips=12, seconds=1.0)
    write_run(folder / "run")
    return folder


def content(out: Path, files: Words) -> dict[str, bytes]:
    """The bytes that must be the same: all but how long it took, a table's last column."""
    found = {name: (out / name if name else out).read_bytes() for name in files}
    if "results.csv" in found:
        rows = found["results.csv"].splitlines()
        assert rows[0].endswith(b",seconds")
        found["results.csv"] = b"\n".join(row.rpartition(b",")[0] for row in rows)
    return found


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", JOBS)
def test_kills_at_any_moment_leave_the_same_bytes(name: str, place: Path, tmp_path: Path) -> None:
    command, out, files = JOBS[name]
    words, log = command(place), tmp_path / "log"
    began = time.monotonic()
    (tmp_path / "whole").mkdir()
    whole = partial(main, [*words, "--out", str(tmp_path / "whole" / out)])
    assert forked(whole, log)[0] == 0, log.read_text()
    seconds = time.monotonic() - began
    expected = content(tmp_path / "whole" / out, files)
    draw, kills, number = random.Random(name), 0, 0
    while kills < KILLS // len(JOBS):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        again = partial(main, [*words, "--out", str(folder / out)])
        for _ in range(IN_A_ROW):
            if (status := forked(again, log, draw.uniform(0, seconds))[0]) is not None:
                break
            kills += 1
        if status is None:
            status, _ = forked(again, log)
        assert status == 0, log.read_text()[-3000:]
        assert content(folder / out, files) == expected
        assert not list(folder.rglob("*.tmp")), "left by a process that is dead"
        number += 1
