"""Signals to a whole process group: the state is kept, one sentence, and the run goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from data_specs.io.cli import STOPPED, STOPPED_WORDS, run_command, signals_wait
from tests.conftest import ROOT
from tests.export_helpers import write_run
from tests.forks import forked
from tests.train_helpers import logged, write_dataset, write_rated
from train.__main__ import main
from train.data import loading
from train.files import load_checkpoint
from train.pruning import prune as pruning
from train.student import fit as fitting
from train.teacher import fit as teacher_fit


def group(number: int) -> None:
    """What scancel, docker stop, systemd and a terminal do."""
    os.killpg(0, number)


def at(owner: Any, name: str, number: int, when: Callable[..., bool] = lambda *_: True) -> None:
    """Send the signal when a function is first called and ``when`` says so of its arguments."""
    whole, calls = getattr(owner, name), []

    def signals(*given: Any, **named: Any) -> Any:
        if not calls and when(*given):
            calls.append(1)
            group(number)
        return whole(*given, **named)

    setattr(owner, name, signals)


def after(owner: Any, name: str, number: int) -> None:
    """Send the signal when a function has been called: workers were just born."""
    whole = getattr(owner, name)

    def signals(*given: Any) -> Any:
        found = whole(*given)
        group(number)
        return found

    setattr(owner, name, signals)


def is_at(step: int) -> Callable[..., bool]:
    return lambda trainer, *_: trainer.step == step


TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP

FIT: dict[str, tuple[int, Callable[[int], None], int | None]] = {
    "data": (TERM, lambda n: at(fitting, "open_sources", n), None),
    "workers start": (TERM, lambda n: after(DataLoader, "__iter__", n), None),
    "first batch": (INT, lambda n: at(loading, "_received", n), None),
    "first update": (HUP, lambda n: at(fitting.Trainer, "update", n), 1),
    "validation": (TERM, lambda n: at(fitting.Trainer, "validate", n, is_at(2)), 2),
    "update": (TERM, lambda n: at(fitting.Trainer, "update", n, is_at(2)), 3),
    "checkpoint": (INT, lambda n: at(fitting.Trainer, "checkpoint", n, is_at(4)), 4),
    "last validation": (TERM, lambda n: at(fitting.Trainer, "validate", n, is_at(6)), 6),
}
"""By moment: the signal, how it comes, and the step that ``last.pt`` then holds."""

PRUNE: dict[str, tuple[int, Callable[[int], None], int | None]] = {
    "first validation": (TERM, lambda n: at(pruning.Pruner, "validate", n), None),
    "update": (TERM, lambda n: at(pruning.Pruner, "update", n), 1),
    "end of a round": (HUP, lambda n: at(pruning.Pruner, "validate", n, is_at(2)), 2),
    "removal": (INT, lambda n: at(pruning.Pruner, "remove", n), 3),
}

TEACHER: dict[str, tuple[int, Callable[[int], None], int | None]] = {
    "features": (TERM, lambda n: at(teacher_fit, "open_cache", n), None),
    "update": (TERM, lambda n: at(teacher_fit.HeadTrainer, "update", n), 1),
    "validation": (INT, lambda n: at(teacher_fit.HeadTrainer, "raw_logits", n, is_at(2)), 2),
    "update again": (HUP, lambda n: at(teacher_fit.HeadTrainer, "update", n, is_at(2)), 3),
}

RUNS = {"fit": FIT, "prune": PRUNE, "teacher": TEACHER}


def arguments(verb: str, top: Path, out: Path) -> list[str]:
    rated, device = str(top / "rated/labels.csv"), ("--device", "cpu", "--out", str(out))
    shards = ("--shards", str(top / "shards"), "--workers", "2", "--logger", "none")
    small = ("--steps", "6", "--batch", "4", "--validate-every", "2", "--precision", "fp32")
    if verb == "fit":
        return [verb, "--student", "v1", "--preset", "fast", *shards, *small, *device]
    if verb == "teacher":
        return [verb, "--front-end", "mfcc", "--rated", rated, "--dim", "4", *small, *device]
    rounds = ("--steps", "2", "--rate", "0.2", "--sizes", "75", "--batch", "2")
    return [verb, "--model", str(top / "student"), *rounds, *shards, *device]


def child(verb: str, top: Path, out: Path, prepare: Callable[[], None]) -> int | None:
    """Exit status of a command in a process group of its own; what it says is in ``OUT.err``."""

    def work() -> int:
        prepare()
        return main(arguments(verb, top, out))

    return forked(work, Path(f"{out}.err"))[0]


def stop_and_go_on(verb: str, top: Path) -> None:
    """Stop a run at every moment, one after the other, and let it end. In a process of its own."""
    torch.set_num_threads(1)
    for moment, (number, prepare, step) in RUNS[verb].items():
        status = child(verb, top, top / "broken", lambda p=prepare, n=number: p(n))
        said = (top / "broken.err").read_text()
        assert status == STOPPED[signal.Signals(number)], (moment, status, said)
        assert said.count(STOPPED_WORDS) == 1 and "Traceback" not in said, (moment, said)
        kept = top / "broken/last.pt"
        found = load_checkpoint(kept)["step"] if kept.is_file() else None
        assert found == step, (moment, found)
    for run in ("broken", "unbroken"):
        assert child(verb, top, top / run, lambda: None) == 0, (top / f"{run}.err").read_text()


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(
            same(ours[key], theirs[key]) for key in ours if key not in ("seconds", "rows")
        )
    return bool(ours == theirs)


@pytest.mark.slow
@pytest.mark.parametrize("verb", sorted(RUNS))
def test_a_run_stopped_at_any_moment_ends_at_the_same_bits(tmp_path, verb):
    write_dataset(tmp_path / "shards", shards=2, samples=5, validation=4)
    write_rated(tmp_path / "rated", clips=8)
    if verb == "prune":
        write_run(tmp_path / "student")
    code = (
        "import sys, tests.drills.test_stops as t; from pathlib import Path;"
        "t.stop_and_go_on(sys.argv[1], Path(sys.argv[2]))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, verb, str(tmp_path)], env=environment, check=True)
    ours, theirs = (load_checkpoint(tmp_path / run / "last.pt") for run in ("broken", "unbroken"))
    assert same(ours, theirs)
    ours, theirs = (logged(tmp_path / run, "loss") for run in ("broken", "unbroken"))
    assert ours == theirs


# --- what a signal does ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [TERM, INT, HUP])
def test_what_may_not_be_cut_is_done_whole_before_the_signal_counts(number, capsys):
    done: list[str] = []

    def work() -> int:
        with signals_wait() as came:
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append("whole")
            assert came == [number, number]
        done.append("never")
        return 0

    assert run_command(work) == STOPPED[signal.Signals(number)]
    assert done == ["whole"]
    assert capsys.readouterr().err == f"{STOPPED_WORDS}\n"


def test_what_a_library_makes_of_a_signal_is_still_the_signal(capsys):
    def work() -> int:
        try:
            signal.raise_signal(TERM)
        except KeyboardInterrupt as error:
            raise ImportError("numpy.core.multiarray failed to import") from error
        return 0

    assert run_command(work) == 143
    assert capsys.readouterr().err == f"{STOPPED_WORDS}\n"


def test_a_full_disk_at_a_stop_is_told_too(capsys):
    def work() -> int:
        try:
            signal.raise_signal(TERM)
        except KeyboardInterrupt as error:
            raise OSError(errno.ENOSPC, "No space left on device", "run/last.pt") from error
        return 0

    assert run_command(work) == 143
    assert "run/last.pt: No space left on device" in capsys.readouterr().err


def test_a_signal_during_imports_ends_at_once():
    code = (
        "import signal; from data_specs.io.cli import signals_end_at_once\n"
        "with signals_end_at_once():\n"
        "    try: signal.raise_signal(signal.SIGTERM)\n"
        "    except BaseException: print('swallowed')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "", f"{STOPPED_WORDS}\n")
