"""``python -m tests.bench gpu``: what only a GPU can show, in order of worth, each within its time.

Every step is a process of its own. What it finds is in ``results.json`` as soon as it ends, what it
says in ``STEP.log``; ``results.md`` is the table. A run that is cut short keeps what it has.
``--device cpu --small`` is the rehearsal: the same steps over sizes that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.strict import unknown
from tests.bench.gpu_steps import DEVICE_VARIABLE, RESULT

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 64


@dataclass(frozen=True)
class Step:
    """What is run, how long it may take, and what it is for."""

    about: str
    limit_s: float
    command: Callable[[argparse.Namespace], list[str]]


@dataclass
class Outcome:
    """How a step ended: "done", "failed", "over its time", and the results until then."""

    step: str
    about: str
    status: str = "not run"
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)


def _measured(name: str) -> Callable[[argparse.Namespace], list[str]]:
    """A function of ``gpu_steps``."""

    def command(args: argparse.Namespace) -> list[str]:
        words = ["-m", "tests.bench.gpu_steps", name, "--device", args.device]
        words += ["--data", str(args.data), "--out", str(args.out / name)]
        return words + (["--small"] if args.small else [])

    return command


def _tests(args: argparse.Namespace) -> list[str]:
    return ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rA", "tests/gpu"]


def _bench(name: str, small: str, full: str) -> Callable[[argparse.Namespace], list[str]]:
    """A benchmark that is there anyway, with its options."""

    def command(args: argparse.Namespace) -> list[str]:
        options = (small if args.small else full).split()
        return ["-m", "tests.bench", name, *options, "--device", args.device]

    return command


STEPS = {
    "right": Step("equal to the CPU: models, processors, masks", 100, _tests),
    "teacher": Step("the 2B teacher: clips/s, share of the matrix rate", 110, _measured("teacher")),
    "shards": Step("64 samples twice: the same bytes, samples/s", 60, _measured("shards")),
    "resume": Step("100 steps, stopped and resumed", 60, _measured("resume")),
    "scoring": Step("hours of audio a second", 60, _measured("scoring")),
    "training": Step("from shards against from memory", 90, _measured("training")),
    "processors": Step(
        "the paper's processors and the whole recipe",
        90,
        _bench("processors", "--samples 2 --clips 1 --repeat 1", "--samples 200 --group 50"),
    ),
    "prune": Step(
        "a round of pruning at the 2B shape",
        60,
        _bench(
            "prune",
            "--size 300m --batch 2 --updates 1",
            "--batch 20 --micro-batch 4 --updates 5 --precision bf16",
        ),
    ),
}


def run_step(name: str, args: argparse.Namespace) -> Outcome:
    """Run a step to its end or limit; its words go to ``STEP.log``."""
    step, log = STEPS[name], args.out / f"{name}.log"
    outcome, began = Outcome(name, step.about), time.monotonic()
    environment = os.environ | {DEVICE_VARIABLE: args.device, "PYTHONUNBUFFERED": "1"}
    environment["SPEECH_SHARED"] = str(args.data)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *step.command(args)], cwd=ROOT, env=environment, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(step.limit_s * args.patience)
            outcome.status = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome.status = "over its time"
        finally:
            _end(process)
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.results = results_of(log.read_text("utf-8", "replace"))
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a step: it leads a process group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def results_of(text: str) -> list[dict[str, Any]]:
    """What ``gpu_steps.tell`` wrote among a step's words."""
    lines = (line for line in text.splitlines() if line.startswith(RESULT))
    return [json.loads(line.removeprefix(RESULT)) for line in lines]


def machine(device: str) -> dict[str, str]:
    """What the numbers were measured on."""
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    when = time.strftime("%Y-%m-%d", time.gmtime())
    return {
        "card": card,
        "date": when,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": str(len(os.sched_getaffinity(0))),
    }


def as_markdown(about: dict[str, str], outcomes: Sequence[Outcome], command: str) -> str:
    """A line a result; a step without one has its status."""
    said = ", ".join(f"{name} {value}" for name, value in about.items())
    lines = [
        f"`{command}`: {said}",
        "",
        "| step | what | result | goal | |",
        "|---|---|---|---|---|",
    ]
    for one in outcomes:
        lines.append(f"| {one.step} | {one.about} | {one.status}, {one.seconds:.0f} s | | |")
        for found in one.results:
            met = {True: "met", False: "**missed**", None: ""}[found["met"]]
            lines.append(f"| | {found['what']} | {found['value']} | {found['goal']} | {met} |")
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench gpu``."""
    shared = Path(os.environ.get("SPEECH_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes of a rehearsal")
    parser.add_argument("--step", action="append", default=[], help="this one (may be repeated)")
    parser.add_argument("--data", type=path_here, default=shared, help="folder with data/speech")
    parser.add_argument("--out", type=path_here, default=Path("runs/gpu"))
    parser.add_argument("--patience", type=float, default=1.0, help="times each step's limit")


def run(args: argparse.Namespace) -> int:
    """Run the steps; exit status 1 where one did not come to its end or missed a goal."""
    for name in args.step:
        if name not in STEPS:
            raise UserError(f"--step {name}: {unknown('step', name, STEPS)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; --device cpu --small rehearses")
    args.out, args.data = args.out.resolve(), args.data.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    about, outcomes = machine(args.device), []
    command = "make gpu" + (f" GPU={args.device} SMALL=1" if args.small else "")
    for name in args.step or STEPS:
        outcomes.append(run_step(name, args))
        kept = {"machine": about, "steps": [asdict(one) for one in outcomes]}
        write_text(args.out / "results.json", json.dumps(kept, indent=1) + "\n")
        write_text(args.out / "results.md", as_markdown(about, outcomes, command))
        print(f"{name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
    print((args.out / "results.md").read_text())
    wrong = [one for one in outcomes if one.status != "done"]
    missed = [found for one in outcomes for found in one.results if found["met"] is False]
    return 1 if wrong or (missed and not args.small) else 0
