"""How far a dataset is, from its ledger alone: ``python -m pipeline status DATASET``.

Reads records and attempts, no tar and no process: it works while the job runs, from any machine
that sees the folder, and after the job died.

Exit status: 0 every shard is whole; 1 nobody is at work and shards failed; 2 bad input; 3 at work;
4 nobody is at work and shards are missing (run the same command again).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from data_specs.io.addresses import PathOrUrl, path_or_url, shown
from data_specs.recipe import Recipe
from data_specs.sample import DATASET_FILE, shard_name
from data_specs.strict import checked
from pipeline.dataset import attempts
from pipeline.dataset.attempts import Attempts, Tally
from pipeline.dataset.description import require_dataset
from pipeline.dataset.job import CLIP_HOURS
from pipeline.engine.watch import CLIP_S, duration, reasons

EXIT = {"whole": 0, "failed": 1, "running": 3, "stopped": 4}
SAID = {
    "whole": "every shard is whole",
    "failed": "nobody is at work, and shards failed: see the reasons, then run the command again",
    "running": "at work",
    "stopped": "nobody is at work, and shards are missing: run the same command again",
}
LISTED = 5
"""Shards named of each kind; ``--json`` names all."""


@dataclass(frozen=True)
class Status:
    """A dataset's state. ``samples``, ``hours`` and ``tar_bytes`` are of whole shards, ``left_s``
    is None where nobody is at work, ``retries`` counts attempts that were begun again or must be:
    those of dead workers, of dead drivers and failed ones."""

    state: str
    recipe: str
    dataset_hash: str
    shards: int
    done: int
    in_flight: int
    planned: int
    samples: int
    hours: float
    tar_bytes: int
    dropped: dict[str, int]
    retries: int
    rate: float
    realtime: float
    left_s: float | None
    oldest_s: float | None
    failed: dict[int, str]
    wrong: dict[int, str]
    runs: list[dict[str, Any]]

    @property
    def exit_status(self) -> int:
        return EXIT[self.state]


def look(out: PathOrUrl, now: float | None = None) -> Status:
    """The state of a dataset folder. ``ShardError`` where it is none."""
    now = time.time() if now is None else now
    found = require_dataset(out)
    recipe = checked(Recipe, found["recipe"], f"{shown(out)}: {DATASET_FILE}: recipe")
    size, samples = recipe.shard_samples, found["samples"]
    planned = [min(size, samples - first) for first in range(0, samples, size)]
    held = attempts.load(out, found["recipe_hash"], planned)
    return _status(found, planned, held, attempts.read_attempts(out), now)


def _status(
    found: dict[str, Any], planned: list[int], held: Tally, runs: list[Attempts], now: float
) -> Status:
    alive = [run for run in runs if run.alive(now)]
    began = {shard: at for run in alive for shard, at in run.running.items()}
    running = {shard: at for shard, at in began.items() if shard not in held.whole}
    failed = _failed(runs, held, running)
    rate = sum(run.rate for run in alive)
    missing = sum(count for shard, count in enumerate(planned) if shard not in held.whole)
    at_rest = "failed" if failed else "stopped"
    return Status(
        state="whole" if not missing else "running" if alive else at_rest,
        recipe=found["recipe"]["name"],
        dataset_hash=found["recipe_hash"],
        shards=len(planned),
        done=len(held.whole),
        in_flight=len(running),
        planned=found["samples"],
        samples=held.samples,
        hours=round(held.samples * CLIP_HOURS, 3),
        tar_bytes=held.tar_bytes,
        dropped=dict(held.dropped.most_common()),
        retries=_retries(runs, now),
        rate=round(rate, 3),
        realtime=round(rate * CLIP_S, 1),
        left_s=round(missing / rate, 1) if rate > 0 else None,
        oldest_s=round(now - min(running.values()), 1) if running else None,
        failed=failed,
        wrong={k: why for k, why in held.wrong.items() if k not in running},
        runs=[_run(run, now) for run in runs],
    )


def _failed(runs: list[Attempts], held: Tally, running: dict[int, float]) -> dict[int, str]:
    """Shards whose last known attempt failed."""
    latest: dict[int, str] = {}
    for run in runs:
        for shard in run.running:  # begun again: what was said of it before is over
            latest.pop(shard, None)
        latest.update(run.failed)
    return {
        shard: reason
        for shard, reason in sorted(latest.items())
        if shard not in held.whole and shard not in running
    }


def _retries(runs: list[Attempts], now: float) -> int:
    lost = sum(len(run.running) for run in runs if not run.alive(now))
    return lost + sum(run.retries + len(run.failed) for run in runs)


def _run(run: Attempts, now: float) -> dict[str, Any]:
    shown_fields = run.model_dump(mode="json", exclude={"format", "running", "failed"})
    state = run.ended or ("at work" if run.alive(now) else "silent: it was killed, or lost its net")
    return shown_fields | {"state": state, "silent_s": round(now - run.updated, 1)}


def lines(status: Status) -> Iterator[str]:
    """The state in words."""
    waiting = status.shards - status.done - status.in_flight - len(status.failed)
    yield f"{status.recipe} {status.dataset_hash[:12]}: {SAID[status.state]}"
    yield (
        f"shards: {status.done} of {status.shards} whole, {status.in_flight} in flight, "
        f"{len(status.failed)} failed, {max(waiting, 0)} waiting"
    )
    yield (
        f"samples: {status.samples} of {status.planned}, {status.hours:.2f} h, "
        f"{status.tar_bytes / 1e9:.3f} GB"
    )
    yield f"dropped: {reasons(status.dropped)}; retries: {status.retries}"
    if status.state == "running":
        yield (
            f"rate: {status.rate:.2f} samples/s ({status.realtime:.1f} x real time), "
            f"left {duration(status.left_s)}, oldest in flight {duration(status.oldest_s)}"
        )
    for run in status.runs[-LISTED:]:
        yield (
            f"run {run['run']}: {run['engine']}, {run['workers']} workers, {run['made']} shards "
            f"made, last heard {duration(run['silent_s'])} ago: {run['state']}"
        )
    for what, named in (("failed", status.failed), ("not whole", status.wrong)):
        for shard, reason in list(named.items())[:LISTED]:
            yield f"{what}: {shard_name(shard)}: {reason}"
        if len(named) > LISTED:
            yield f"{what}: and {len(named) - LISTED} more (--json names all)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("dataset", type=path_or_url, help="a folder, or its address")
    parser.add_argument("--json", action="store_true", help="everything, for machines")


def run(options: argparse.Namespace) -> int:
    """Print the state; the exit status says it too."""
    status = look(options.dataset)
    if options.json:
        print(json.dumps(asdict(status), indent=1))
    else:
        print("\n".join(lines(status)))
    return status.exit_status
