"""The one training loop: steps, validation, the best model, checkpoints, exact resume, the log.

A student, a teacher's head and pruning are each a ``Task``: what one step computes and what the
state is. How a run goes on is here. A run folder holds ``last.pt`` (all state: the same command
continues from it, bit for bit on one type of machine), ``best.pt``, ``config.json`` and the log.
A signal waits for the step that is being done, and then ``last.pt`` is written; a kill at any point
loses what came after the last ``last.pt``.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from lightning_fabric import Fabric
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_specs.io.cli import STOPPED, Stopped, signals_wait
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.hardware import keep_freed_memory
from data_specs.io.options import options_of
from data_specs.io.progress import progress_bar
from data_specs.rated import require_heard
from data_specs.strict import Strict, checked
from train.data.loading import loader, worker_deaths_named
from train.data.sources import Sources
from train.data.stream import Batches
from train.files import load_checkpoint, require_same, save_checkpoint
from train.loop.parallel import STOP_EVERY, joint_means, largest
from train.loop.run_log import Logger, Meter, RunLog
from train.metrics import agreement

Metrics = dict[str, float | None]
Feed = Callable[[int, int], Generator[Any, None, None]]
"""Gives the batches of steps ``first`` to ``last`` (exclusive), in order."""

Count = Annotated[int, Field(ge=1)]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Host(Strict):
    """How a run uses the machine; none of it changes what is computed on one machine type."""

    device: str = Field(default_factory=_device, description="cpu, cuda, cuda:1")
    devices: Count = Field(default=1, description="processes on this machine")
    nodes: Count = Field(default=1, description="machines (torchrun says it itself)")
    workers: int = Field(default=1, ge=0, description="decoding processes (0: none)")
    threads: int | None = Field(default=None, description="of the training process; else all cores")
    cache_gb: float = Field(default=4.0, description="decoded samples kept in memory")
    checkpoint_every: Count = Field(default=500, description="steps between two last.pt")
    log_every: Count = Field(default=50, description="steps between two lines of the log")
    logger: Logger = Field(default="tensorboard", description="beside log.jsonl")
    progress: bool = True


SomeHost = TypeVar("SomeHost", bound=Host)
ONE_PROCESS = ("devices", "nodes")
"""Options of ``Host`` that a verb of one process leaves out."""


def host_of(args: Namespace, model: type[SomeHost]) -> SomeHost:
    """Take the host's settings out of parsed options."""
    return checked(model, options_of(args, model), "options")


class Task(ABC):
    """What a run optimises: a network, its optimiser, and all else that a checkpoint holds.

    ``step`` counts the steps done of ``steps``; ``due`` says that the validation after this step
    is still to be done, ``best`` holds the metrics of the best one so far. ``config`` decides what
    is computed: a continued run must have the same. On several processes there is a ``fabric``.
    """

    name: str
    config: Any
    steps: int
    parts: Mapping[str, Any]
    """Networks and optimisers, whose state dicts a checkpoint holds by these names."""
    device: torch.device
    fabric: Fabric | None = None
    compiled = False
    validates_first = False
    """Whether what the run starts with is validated, too."""

    def __init__(self) -> None:
        self.step = 0
        self.due = False
        self.best: dict[str, Any] | None = None

    @property
    def rank(self) -> int:
        """This process, of ``world``."""
        return self.fabric.global_rank if self.fabric else 0

    @property
    def world(self) -> int:
        """Processes that share every batch."""
        return self.fabric.world_size if self.fabric else 1

    @abstractmethod
    def update(self, batch: Any) -> Tensor:
        """Do one step, and count it; returns the loss (a scalar tensor, MOS squared)."""

    @abstractmethod
    def validate(self, held: Any) -> Metrics:
        """Measure the model on the data that is held out: ``loss`` and whatever else."""

    def state(self) -> dict[str, Any]:
        """All state that is the task's own, as tensors and plain values."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Take over what ``state`` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(content[name])

    def is_due(self) -> bool:
        """Whether a validation belongs after the step just done."""
        return self.step % self.config.validate_every == 0 or self.step == self.steps

    def figures(self) -> dict[str, float]:
        """What else a line of the log holds."""
        return {}

    def best_model(self) -> dict[str, Any]:
        """What ``best.pt`` holds; the metrics are in ``best``."""
        return {}

    def keep(self, metrics: Metrics, out: Path) -> str:
        """Write ``best.pt`` if the validation loss is the lowest so far; returns what to say."""
        loss, lowest = metrics["loss"], self.best["loss"] if self.best else math.inf
        if loss is None or not loss < lowest:
            return ""
        self.best = {"step": self.step, **metrics}
        save_checkpoint(out / "best.pt", self.best_model())
        return " (best)"

    def checkpoint(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "due": self.due,
            "best": self.best,
            "rng": torch.get_rng_state(),
            **self.state(),
        }

    def restore(self, path: Path) -> list[float]:
        """Continue from a checkpoint; returns the losses that are not in its log yet.

        ``UserError`` naming the field that is not the same, or a file that is damaged.
        """
        content = load_checkpoint(path)
        require_same(path.parent, content.get("config", {}), self.config.model_dump(mode="json"))
        self.load_state(content)
        torch.set_rng_state(content["rng"])
        self.step, self.due, self.best = content["step"], content["due"], content["best"]
        return list(content.get("losses", []))


def errors_of(truth: ArrayLike, predicted: ArrayLike) -> Metrics:
    """What a validation on clips (N,) logs: mean squared error, correlations, its root; in MOS."""
    found = agreement(truth, predicted)
    loss = None if found.rmse is None else found.rmse**2
    return {"loss": loss, "pcc": found.pcc, "spearman": found.spearman, "rmse": found.rmse}


def attention_backward(device: torch.device) -> AbstractContextManager[None]:
    """PyTorch's attention for training: the fused one is slow backwards on a CPU.

    At a student's size 41 of 250 ms.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def load_best(out: Path) -> dict[str, Any]:
    """What ``Task.best_model`` gave for ``best.pt``; ``UserError`` where no loss was finite."""
    if not (out / "best.pt").is_file():
        raise UserError(f"{out}: no validation gave a finite loss, so there is no best model")
    return load_checkpoint(out / "best.pt")


def train(task: Task, feed: Feed, held: Any, out: Path, host: Host) -> None:
    """Do all steps that are left, of a new run or of the one in ``out``.

    Ctrl-C (and SIGTERM, where it raises too) comes out when ``last.pt`` is written: the same call
    continues. ``UserError`` if ``out`` holds a run with another configuration, or if data is
    damaged or the loss is not finite.
    """
    keep_freed_memory()
    losses: list[float] = []
    if (out / "last.pt").is_file():
        losses = task.restore(out / "last.pt")
    else:
        task.due = task.validates_first
    with closing(_Loop(task, held, out, host, losses)) as loop, worker_deaths_named():
        loop.run(feed)


def train_on(task: Task, sources: Sources, out: Path, host: Host) -> None:
    """``train`` on shards and rated clips; a new run reads all of these first."""
    if task.rank == 0 and not (out / "last.pt").is_file():
        require_heard([*sources.rated, *sources.rated_validation])
    samples, held = sources.samples(host.cache_gb)
    order, share = sources.order(task.config), (task.rank, task.world)
    batches = Batches(samples, order, sources.rated, *share, sources.resampler)
    pin = task.device.type == "cuda"
    train(task, partial(loader, batches, workers=host.workers, pin=pin), held, out, host)


class _Loop:
    """A run folder that is being trained in: its log, its checkpoints, its progress."""

    def __init__(self, task: Task, held: Any, out: Path, host: Host, losses: list[float]) -> None:
        self.task, self.held, self.out, self.host = task, held, out, host
        self.alone, self.first = task.world == 1, task.rank == 0
        # To compile takes minutes: a signal does not wait for it, and nothing is lost.
        self.compiling = task.compiled
        self.meter = Meter([torch.tensor(loss, device=task.device) for loss in losses])
        self.log: RunLog | None = None
        if self.first:
            about = task.config.model_dump(mode="json")
            write_text(out / "config.json", json.dumps(about, indent=2) + "\n")
            self.log = RunLog(out, task.step, host.logger, task.due)
        self.bar = progress_bar(
            total=task.steps,
            initial=task.step,
            unit="step",
            desc=task.name,
            disable=not (host.progress and self.first),
        )

    def close(self) -> None:
        self.bar.close()
        if self.log:
            self.log.close()

    def run(self, feed: Feed) -> None:
        """All steps that are left; after a signal ``last.pt`` holds those that were done."""
        task, first = self.task, self.task.step
        # Several processes must agree on when to stop: there signals wait until they have.
        waiting: AbstractContextManager[list[int]]
        waiting = nullcontext([]) if self.alone else signals_wait()
        with waiting as came, closing(feed(first, task.steps)) as batches:
            try:
                self._steps(batches, came)
            except KeyboardInterrupt:
                if self.alone and not self.compiling and task.step > first:
                    with signals_wait():
                        self._save()
                raise

    def _steps(self, batches: Iterator[Any], came: list[int]) -> None:
        task = self.task
        if task.due:
            self._validate()
        while task.step < task.steps:
            self.agree_to_stop(came)
            asked = time.monotonic()
            batch = next(batches)
            self.meter.waited += time.monotonic() - asked
            with nullcontext() if self.compiling else signals_wait():
                self._update(batch)
            self.compiling = False
            if task.due:
                self._validate()

    def _update(self, batch: Any) -> None:
        """One step; the log and ``last.pt``, each where it is due."""
        task = self.task
        self.meter.losses.append(task.update(batch))
        self.meter.samples += task.config.batch
        self.bar.update()
        if task.step % self.host.log_every == 0 or task.step == task.steps:
            self._log_interval()
        task.due = task.is_due()
        if task.step % self.host.checkpoint_every == 0 and not task.due:
            self._save()

    def _log_interval(self) -> None:
        task, values = self.task, self.meter.read()
        (loss,) = joint_means(task.fabric, [values["loss"]])
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {task.step}: lower --lr")
        figures = task.figures()
        more = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        self.bar.set_postfix_str(
            f"{values['samples_per_s']:.0f} samples/s, data wait "
            f"{values['data_wait_share']:.0%}, loss {loss:.3f}, {more}"
        )
        self._write({**values, "loss": loss, **figures})
        self.meter = Meter()

    def _validate(self) -> None:
        """Validate, keep the best, and write ``last.pt``; a signal may end the first of these."""
        task, began = self.task, time.monotonic()
        metrics = task.validate(self.held)
        with signals_wait():
            task.due = False
            said = task.keep(metrics, self.out) if self.first else ""
            # The log first: a run continued from here drops what was logged after it, not before.
            self._write({f"validation_{name}": value for name, value in metrics.items()})
            self._save()
        self.meter.start += time.monotonic() - began  # the log's rates are those of training
        if not self.bar.disable:
            figures = ", ".join(
                f"{name} {'-' if value is None else format(value, '.3f')}"
                for name, value in metrics.items()
                if "/" not in name
            )
            self.bar.write(f"step {task.step}: {figures}{said}", file=sys.stderr)

    def _write(self, values: Mapping[str, float | None]) -> None:
        if self.log:
            self.log.write(self.task.step, values)

    def _save(self) -> None:
        """``last.pt``, with the losses that are not in the log yet."""
        losses = joint_means(self.task.fabric, [float(loss) for loss in self.meter.losses])
        if self.first:
            save_checkpoint(self.out / "last.pt", self.task.checkpoint() | {"losses": losses})

    def agree_to_stop(self, came: list[int]) -> None:
        """End all processes at one step, now and then, if a signal came to any of them."""
        if self.alone or self.task.step % STOP_EVERY:
            return
        assert self.task.fabric is not None
        number = largest(self.task.fabric, came[0] if came else 0)
        if number:
            came.clear()
            self._save()
            if not self.first:  # one process says it
                sys.exit(STOPPED[signal.Signals(number)])
            raise Stopped(number)
