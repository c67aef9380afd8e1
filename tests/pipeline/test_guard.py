"""A processor that hangs, crashes or is killed takes its sample and nothing else."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.audio import DropSample
from pipeline.dataset.prepare import prepare
from pipeline.dataset.shards import read_record
from pipeline.render import processors as degrade
from pipeline.render.guard import Guard, GuardError
from pipeline.render.plan import Step
from pipeline.render.processors.interface import Params, Waves
from pipeline.render.render import _run_steps
from tests import engines
from tests.conftest import small_recipe, talk

LOUD = 0.5


def trouble(kind: str, waves_BT: Waves, params: list[Params]) -> Waves:
    """Runs in the child. Does what ``kind`` says where a wave is loud, halves it else."""
    if (np.abs(waves_BT).max(axis=1) > LOUD).any():
        TROUBLES[kind]()
    return waves_BT * np.float32(0.5)


def answer_half() -> None:
    """The beginning of a long answer on the child's own connection, and then nothing."""
    os.write(int(sys.orig_argv[3]), (1 << 20).to_bytes(4, "big") + b"begun")
    ctypes.CDLL(None).sleep(1_000)


def raise_bare() -> None:
    raise KeyError("no such frame")


TROUBLES = {
    "hang": lambda: ctypes.CDLL(None).sleep(1_000),  # native: no Python signal handler runs
    "half": answer_half,
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: os._exit(3),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": raise_bare,
    "print": lambda: print("noise on stdout"),
    "disk": lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")),
}


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    monkeypatch.setattr("pipeline.render.guard.LOAD_SECONDS", 20.0)  # the child starts within it
    return Guard(limit_s=0.3, target="tests.pipeline.test_guard:trouble")


@pytest.mark.parametrize(
    ("kind", "reason", "said"),
    [
        pytest.param("hang", "processor_timeout", "no answer within 0.3 s", marks=pytest.mark.slow),
        ("crash", "processor_crashed", "SIGSEGV"),
        pytest.param("exit", "processor_crashed", "exit status 3", marks=pytest.mark.slow),
    ],
)
def test_only_the_culprit_is_dropped(kind: str, reason: str, said: str, guard: Guard) -> None:
    quiet = [talk(0.1, seed) for seed in range(3)]
    guard.limit_s = 0.3 if kind == "hang" else 30.0  # to die may take a slow machine a while
    guard.run(kind, np.stack(quiet), [{}] * 3)  # loaded: from now on only the limit counts
    slots = [quiet[0], quiet[1] + np.float32(1), quiet[2]]
    _run_steps(slots, [[Step(stage="x", kind=kind, params={})]] * 3, guard.run)
    assert np.array_equal(slots[0], quiet[0] * np.float32(0.5))
    assert np.array_equal(slots[2], quiet[2] * np.float32(0.5))
    assert isinstance(slots[1], DropSample)
    assert slots[1].reason == reason and kind in slots[1].detail
    assert said in slots[1].detail


def test_a_child_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """More is sent than a pipe holds: to send must end with the time as to wait does."""
    monkeypatch.setattr(
        "pipeline.render.guard.CHILD", "import ctypes; ctypes.CDLL(None).sleep(1_000)"
    )
    monkeypatch.setattr("pipeline.render.guard.LOAD_SECONDS", 0.3)
    with Guard(limit_s=0.2) as deaf:
        monkeypatch.setattr("pipeline.render.guard.PROBE", np.zeros((1, 1 << 21), np.float32))
        with pytest.raises(DropSample, match=r"clip: did not start within 0\.3 s"):
            deaf.run("clip", np.zeros((1, 160), np.float32), [{}])
        began = time.monotonic()  # that much to start is granted once
        with pytest.raises(DropSample, match=r"clip: did not start within 0\.2 s"):
            deaf.run("clip", np.zeros((1, 160), np.float32), [{}])
        assert time.monotonic() - began < 5


def test_half_an_answer_is_not_waited_for(guard: Guard) -> None:
    guard.run("half", np.zeros((1, 160), np.float32), [{}])
    with pytest.raises(DropSample, match=r"half: no answer within 0\.3 s"):
        guard.run("half", np.ones((1, 160), np.float32), [{}])


def test_a_group_has_its_usual_time_twice_and_never_its_members_sum_and_more() -> None:
    with Guard(limit_s=60.0) as guard:
        assert [guard._seconds("clip", count) for count in (1, 2, 8, 1_000)] == [60, 120, 120, 120]
        guard._pace["clip"] = 3.0
        assert [guard._seconds("clip", count) for count in (1, 8, 1_000)] == [60, 120, 6_000]
        guard._pace["clip"] = 59.0
        assert guard._seconds("clip", 8) == 480


def test_what_a_start_takes_is_not_the_samples_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit far below what Python takes to start, and a child that is started again."""
    monkeypatch.setattr("pipeline.render.guard.LOAD_SECONDS", 60.0)
    with Guard(limit_s=0.1, target="tests.pipeline.test_guard:trouble") as guard:
        quiet, loud = np.zeros((1, 160), np.float32), np.ones((1, 160), np.float32)
        for _ in range(2):
            guard.run("hang", quiet, [{}])
            with pytest.raises(DropSample, match=r"hang: no answer within 0\.1 s"):
                guard.run("hang", loud, [{}])


def test_what_is_no_samples_fault_fails_the_attempt(guard: Guard) -> None:
    loud = np.ones((1, 160), np.float32)
    with pytest.raises(GuardError, match="is memory short"):
        guard.run("killed", loud, [{}])
    with pytest.raises(OSError, match="No space left"):
        guard.run("disk", loud, [{}])
    with pytest.raises(GuardError, match="KeyError: 'no such frame'"):
        guard.run("raise", loud, [{}])
    assert np.array_equal(guard.run("print", loud, [{}]), loud * np.float32(0.5))


def test_the_child_gives_what_the_processor_gives() -> None:
    waves = np.stack([talk(7.68, seed) for seed in (1, 2)])
    params = [{"cutoff_hz": 3_000.0}, {"cutoff_hz": 4_000.0}]
    guarded = Guard()
    assert np.array_equal(
        guarded.run("band_limit", waves, params), degrade.run("band_limit", waves, params)
    )
    with pytest.raises(DropSample, match="non_finite"):
        guarded.run("band_limit", waves * np.float32(np.nan), params)
    with pytest.raises(DropSample, match="processor_failed: band_limit: KeyError"):
        guarded.run("band_limit", waves, [{}, {}])


def test_the_child_ends_with_its_guard(guard: Guard) -> None:
    child = psutil.Process(guard._process.pid)
    guard.close()
    assert not child.is_running()


def hang_on_one(kind: str, waves_BT: Waves, params: list[Params]) -> Waves:
    """Runs in the child: the real processors, and an endless wait on one sample's parameters."""
    if any(json.dumps([kind, p]) == os.environ["HANG_ON"] for p in params):
        ctypes.CDLL(None).sleep(1_000)
    return degrade.run(kind, waves_BT, params)


@pytest.mark.slow
def test_a_hanging_processor_costs_one_sample_of_a_run(
    corpora: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(max_dropped_share=0.5)
    job = prepare(recipe, corpora, tmp_path, 8, time_limit_s=2.0)
    victim = next(plan for plan in job.plans(range(8)) if plan.steps[-1].params)
    monkeypatch.setenv("HANG_ON", json.dumps([victim.steps[-1].kind, victim.steps[-1].params]))
    monkeypatch.setattr("pipeline.render.guard.LOAD_SECONDS", 12.0)
    monkeypatch.setattr(
        "pipeline.dataset.job.Guard", partial(Guard, target="tests.pipeline.test_guard:hang_on_one")
    )
    outcome = engines.run(job, "local", 1)
    record = read_record(tmp_path, 0)
    assert outcome.failed == {} and record is not None
    dropped = [(drop["key"], drop["reason"]) for drop in record.dropped]
    assert dropped == [(victim.key, "processor_timeout")]
    assert record.samples == 7
