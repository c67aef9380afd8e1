"""``python -m tests.bench gpu``: what only a GPU can show, in order of worth, each within its time.

Every step is a process of its own. What it finds is in ``results.json`` as soon as it ends, what it
says in ``STEP.log``; ``results.md`` is the table. A run that is cut short keeps what it has, and
the same command on the same day goes on with what is not done. ``--device cpu --small`` is the
rehearsal: the same steps over sizes that mean nothing.
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
LIMIT_S = 690.0
"""Of all steps together: what they took on an H200 with 16 cores, the last one reckoned."""

RESULTS = "results.json"
SAID_LINES = 20
"""Of a step's log, in the table where it has no results."""


@dataclass(frozen=True)
class Step:
    """What is run, how long it may take, and what it is for."""

    about: str
    limit_s: float
    command: Callable[[argparse.Namespace], list[str]]


@dataclass
class Outcome:
    """How a step ended, the results until then, and the end of its log where it has none."""

    step: str
    about: str
    status: str = "not run"
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)
    said: str = ""


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
    "right": Step("equal to the CPU: models, processors, masks", 110, _tests),
    "teacher": Step("the 2B teacher: clips/s, share of the matrix rate", 100, _measured("teacher")),
    "shards": Step("64 samples twice: the same bytes", 110, _measured("shards")),
    "resume": Step("100 steps, stopped and resumed", 120, _measured("resume")),
    "training": Step("from shards against from memory", 110, _measured("training")),
    "prune": Step(
        "a round of pruning at the 2B shape",
        60,
        _bench(
            "prune",
            "--size 300m --batch 2 --micro-batch 1 --updates 1",
            "--batch 20 --micro-batch 4 --updates 5 --precision bf16",
        ),
    ),
    "gates": Step("a joint gated update, 300M and 1B", 60, _measured("gates")),
    "scoring": Step("hours of audio a second", 100, _measured("scoring")),
    "recipe": Step("the paper's whole recipe, all cores", 140, _measured("recipe")),
    "processors": Step("each of the paper's processors", 60, _measured("processors")),
}


def run_step(name: str, args: argparse.Namespace, left_s: float = LIMIT_S) -> Outcome:
    """Run a step to its end or limit; its words go to ``STEP.log``."""
    step, log = STEPS[name], args.out / f"{name}.log"
    outcome, began = Outcome(name, step.about, "cut short"), time.monotonic()
    environment = os.environ | {DEVICE_VARIABLE: args.device, "PYTHONUNBUFFERED": "1"}
    environment["SPEECH_SHARED"] = str(args.data)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *step.command(args)], cwd=ROOT, env=environment, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(min(step.limit_s * args.patience, left_s))
            outcome.status = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome.status = "over its time"
        except KeyboardInterrupt as stop:
            args.stopped = stop
        finally:
            _end(process)
    outcome.seconds = round(time.monotonic() - began, 1)
    said = log.read_text("utf-8", "replace")
    outcome.results = results_of(said)
    if not outcome.results or outcome.status != "done":
        outcome.said = "\n".join(said.splitlines()[-SAID_LINES:])
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
    for one in outcomes:
        lines += ["", f"{one.step}:", "", "```", one.said, "```"] if one.said else []
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench gpu``."""
    shared = Path(os.environ.get("SPEECH_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes of a rehearsal")
    parser.add_argument("--step", action="append", default=[], help="this one (may be repeated)")
    parser.add_argument("--data", type=path_here, default=shared, help="folder with data/speech")
    parser.add_argument("--out", type=path_here, default=Path("runs/gpu"))
    parser.add_argument("--patience", type=float, default=1.0, help="times every limit")


def run(args: argparse.Namespace) -> int:
    """Run the steps; exit status 1 where one did not come to its end or missed a goal."""
    for name in args.step:
        if name not in STEPS:
            raise UserError(f"--step {name}: {unknown('step', name, STEPS)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; --device cpu --small rehearses")
    args.out, args.data, args.stopped = args.out.resolve(), args.data.resolve(), None
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine(args.device) | {"sizes": "small" if args.small else "full"}
    found = kept(args.out / RESULTS, about)
    write_results(args, about, list(found.values()))
    todo = args.step or [name for name in STEPS if found[name].status != "done"]
    ends = time.monotonic() + LIMIT_S * args.patience
    for name in todo:
        if (left_s := ends - time.monotonic()) <= 0:
            print(f"{name}: not run: no time is left")
            continue
        found[name] = run_step(name, args, left_s)
        write_results(args, about, list(found.values()))
        print(f"{name}: {found[name].status}, {found[name].seconds:.0f} s", flush=True)
        if args.stopped:
            raise args.stopped
    print((args.out / "results.md").read_text())
    judged = [found[name] for name in args.step or STEPS]
    wrong = [one for one in judged if one.status != "done"]
    missed = [r for one in judged for r in one.results if r["met"] is False]
    return 1 if wrong or missed else 0


def kept(path: Path, about: dict[str, str]) -> dict[str, Outcome]:
    """Every step's outcome: "not run", or what an earlier run on the same machine and day left."""
    found = {name: Outcome(name, step.about) for name, step in STEPS.items()}
    if path.is_file() and (content := json.loads(path.read_text()))["machine"] == about:
        found |= {one["step"]: Outcome(**one) for one in content["steps"]}
    return found


def write_results(args: argparse.Namespace, about: dict[str, str], outcomes: list[Outcome]) -> None:
    """``results.json`` and ``results.md``, each whole at any time."""
    content = {"machine": about, "steps": [asdict(one) for one in outcomes]}
    write_text(args.out / RESULTS, json.dumps(content, indent=1) + "\n")
    command = "make gpu" + (f" GPU={args.device} SMALL=1" if args.small else "")
    write_text(args.out / "results.md", as_markdown(about, outcomes, command))
