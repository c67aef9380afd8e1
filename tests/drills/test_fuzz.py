"""The fuzzer sees what it is for: each way to end badly is found, a good end is not."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.bench import fuzz
from tests.bench.fuzz import Case
from tests.bench.mutate import FORMATS, mutated

SEEDS = {
    "a.json": b'{"a": [1, {"b": "c"}], "d": null}',
    "a.yaml": b"a: 1\nb:\n  - c\n",
    "a.csv": b"path,mos\n0.wav,3\n",
    "a.txt": b"0.wav\n",
    "a.tar": bytes(2048),
    "a.safetensors": b"\x02" + bytes(7) + b"{}",
    "a.flac": bytes(range(256)),
    "empty.wav": b"",
}


@pytest.mark.parametrize("name", SEEDS)
def test_mutations_differ_and_are_the_seeds_own(name: str) -> None:
    made = [mutated(random.Random(f"{name} {n}"), name, SEEDS[name]) for n in range(200)]
    assert made == [mutated(random.Random(f"{name} {n}"), name, SEEDS[name]) for n in range(200)]
    assert SEEDS[name] not in made
    assert len(set(made)) > 50
    assert set(FORMATS) <= {Path(seed).suffix for seed in SEEDS}


def too_much() -> int:
    return len(np.ones(fuzz.LIMIT_BYTES // 4))  # twice as much


def broken() -> int:
    raise KeyError("ours")


def outside() -> int:
    Path("x").write_text("y")
    return 0


def told(status: int) -> int:
    print("error: x", file=sys.stderr)
    return status


ENDS: dict[str, Callable[[], int]] = {
    "crash": lambda: (ctypes.string_at(0) and 0) or 0,
    "hang": lambda: ctypes.CDLL(None).pause(),
    "signal 9": lambda: os.kill(os.getpid(), signal.SIGKILL) or 0,
    "memory": too_much,
    "traceback": broken,
    "escaped": outside,
    "status 7": lambda: told(7),
    "silent": lambda: 2,
    "accepted": lambda: told(0),
    "": lambda: told(2),
}


@pytest.mark.parametrize("what", ENDS)
def test_every_bad_end_is_found(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.__main__.main", lambda argv: ENDS[what]())
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    case = Case("x", ("pipeline",), hashed=True)
    began = time.monotonic()
    code, grown = fuzz.tried(case, tmp_path, limit_s=2.0 if what == "hang" else 60.0)
    assert fuzz.verdict(case, tmp_path, code, grown if what == "memory" else 0) == what
    assert what != "hang" or time.monotonic() - began < 60


def test_a_good_file_without_its_score_is_lost(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    case = Case("audio/a.wav", ("train", "score"), good="good.wav")
    assert fuzz.verdict(case, tmp_path, 0, 0) == "lost"
    (tmp_path / "out/t.csv").write_text("path,mos\n/a/good.wav,3.1\n")
    assert fuzz.verdict(case, tmp_path, 0, 0) == ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_inputs_find_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fuzz", "--inputs", "200", "--seed", "1", "--workers", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert fuzz.main() == 0, capsys.readouterr().out
