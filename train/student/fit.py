"""The training loop: shards in, a trained student out. ``python -m train fit``.

Section IV-B: mean squared error on the teacher's MOS, AdamW, validation every N steps, the best
kept. ``--preset paper`` (the default) is the paper's setting; ``--preset fast`` reaches the same
error with a fraction of the compute. Without ``--shards`` a run is on rated clips alone: the
paper's labelled-only baseline. On several devices or nodes (``--devices``, ``--nodes`` or
``torchrun``) a batch stays one batch: every process takes its rows of it (``train.loop.parallel``).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_specs.io.addresses import path_here
from data_specs.io.cli import STOPPED, Stopped, signals_wait
from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of, write_text
from data_specs.io.hardware import keep_freed_memory
from data_specs.io.progress import progress_bar
from data_specs.rated import require_heard
from data_specs.sample import CROP_SAMPLES
from train.data.augment import augment
from train.data.loading import loader, worker_deaths_named
from train.data.order import Order
from train.data.shards import DatasetInfo
from train.data.sources import Samples, Sources, open_sources
from train.data.stream import Batch, Batches, to_waves
from train.files import (
    load_checkpoint,
    require_same,
    run_folder,
    save_checkpoint,
    version,
    write_weights,
)
from train.loop.launch import is_first_process
from train.loop.parallel import (
    STOP_EVERY,
    joint_means,
    largest,
    make_fabric,
    synchronise_batch_norm,
    whole,
)
from train.loop.run_log import LOGGERS, Meter, RunLog
from train.metrics import agreement
from train.models.student import Student, StudentConfig, count, variant
from train.models.tensors import write_about
from train.scoring.score import load, student_in
from train.student.presets import (
    PRESETS,
    FitConfig,
    computed_in_bf16,
    is_compiled,
    learning_rate,
    make_config,
)


@dataclass(frozen=True)
class Host:
    """How a run uses the machine; none of it changes what is computed on one machine type."""

    workers: int = 1
    device: str = "cpu"
    cache_gb: float = 4.0
    log_every: int = 50
    progress: bool = True
    devices: int = 1
    nodes: int = 1
    logger: str = "tensorboard"


class Trainer:
    """A student, its averaged copy and its optimiser: everything that a checkpoint holds."""

    def __init__(
        self, config: FitConfig, fabric: Fabric | None = None, start: Student | None = None
    ) -> None:
        self.config = config
        self.fabric = fabric or make_fabric(bf16=computed_in_bf16(config, "cpu"))
        self.device = self.fabric.device
        torch.manual_seed(config.seed)
        student = copy.deepcopy(start) if start else Student(variant(config.student))
        student.requires_grad_(True)
        student.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(student).requires_grad_(False).eval().to(self.device)
        if self.fabric.world_size > 1:
            synchronise_batch_norm(student)
        self.student = student
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.compiled = is_compiled(config, self.device)
        network: Any = torch.compile(student) if self.compiled else student
        self._network, self._optimizer = self.fabric.setup(network, self.optimizer)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.untold: list[float] = []
        """Losses of a restored run that its log does not tell yet."""
        self.due = False
        """Whether the validation of this step is still to be done."""

    def update(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the loss (a scalar tensor, MOS squared) of these rows."""
        waves_BT = to_waves(batch.pcm_BT, self.device)
        if self.config.augment:
            place = (self.fabric.global_rank, self.fabric.world_size)
            config = self.config
            waves_BT = augment(
                waves_BT, batch.lengths_B, config.seed, self.step, config.crops, *place
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self._network.train()
        with self._attention():
            predicted_B = self._network(waves_BT)
        loss = functional.mse_loss(predicted_B, batch.mos_B.to(self.device, non_blocking=True))
        self._optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_norm)
        self._optimizer.step()
        self.step += 1
        self._follow()
        return loss.detach()

    def _attention(self) -> AbstractContextManager[None]:
        # PyTorch's fused attention is slow backwards on a CPU at a student's size (41 of 250 ms).
        on_cpu = self.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averaged weights (and batch-norm statistics) towards the student's."""
        # A short memory at first, so that the random start is forgotten.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        if not self.config.ema:
            decay = 0.0
        ours, theirs = self.average.state_dict(), self.student.state_dict()
        floating = [name for name, tensor in ours.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [ours[name] for name in floating],
            [theirs[name] for name in floating],
            1 - decay,
        )
        for name in ours.keys() - set(floating):
            ours[name].copy_(theirs[name])

    @torch.inference_mode()
    def validate(self, samples: Samples) -> dict[str, float | None]:
        """Loss, PCC and RMSE of the averaged weights over all samples; every process has some."""
        rows = range(self.fabric.global_rank, len(samples), self.fabric.world_size)
        truth: list[float] = []
        predicted: list[Tensor] = []
        for start in range(0, len(rows), self.config.batch):
            read = [samples.read(row) for row in rows[start : start + self.config.batch]]
            pcm_BT = torch.from_numpy(np.stack([pcm for pcm, _ in read]))
            with self.fabric.autocast():
                predicted.append(self.average(to_waves(pcm_BT, self.device)).double())
            truth += [mos for _, mos in read]
        mine = torch.cat(predicted) if predicted else torch.zeros(0, device=self.device)
        values = torch.stack([torch.tensor(truth, device=self.device).double(), mine.double()])
        return _summary(*(whole(self.fabric, rows, v, len(samples)).tolist() for v in values))

    def checkpoint(self, order: Order) -> dict[str, Any]:
        """All state, as tensors and plain values; ``epoch`` and ``taken`` are for the reader."""
        epoch, taken = order.position(self.step)
        return {
            "config": self.config.model_dump(),
            "step": self.step,
            "epoch": epoch,
            "taken": taken,
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "best": self.best,
            "due": self.due,
        }

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; ``ValueError`` naming the field that is not the same."""
        content = load_checkpoint(path)
        require_same(path.parent, content.get("config", {}), self.config.model_dump())
        self.student.load_state_dict(content["student"])
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["rng"])
        self.step, self.best = content["step"], content["best"]
        self.untold, self.due = content["losses"], content.get("due", False)

    def keep_if_best(self, metrics: dict[str, float | None], out: Path) -> bool:
        """Write ``best.pt`` if the validation loss is the lowest so far."""
        loss, lowest = metrics["loss"], self.best["loss"] if self.best else None
        if loss is None or not math.isfinite(loss) or (lowest is not None and loss >= lowest):
            return False
        self.best = {"step": self.step, **metrics}
        save_checkpoint(
            out / "best.pt",
            {
                "student": self.config.student,
                "student_config": self.student.config.model_dump(),
                "recipe_hash": self.config.recipe_hash,
                "weights": self.average.state_dict(),
                "metrics": self.best,
            },
        )
        return True


def _summary(truth: list[float], predicted: list[float]) -> dict[str, float | None]:
    result = agreement(truth, predicted)
    loss = None if result.rmse is None else result.rmse**2
    return {
        "loss": loss,
        "pcc": result.pcc,
        "spearman": result.spearman,
        "rmse": result.rmse,
    }


def fit(
    config: FitConfig,
    sources: Sources,
    out: Path,
    host: Host | None = None,
    start: Student | None = None,
) -> None:
    """Train, or continue the run in ``out``, until all steps are done.

    From a student's weights (``config.start`` is their digest), or from random ones. Ctrl-C (and
    SIGTERM, where it raises too) comes out when ``last.pt`` is written: the same call continues.
    Ends by writing ``model.safetensors`` and ``model.json``. ``ValueError`` if ``out`` holds a run
    with another configuration or another command writes there, or if data is damaged.
    """
    host = host or Host()
    keep_freed_memory()
    with run_folder(out) if is_first_process() else nullcontext():
        bf16 = computed_in_bf16(config, host.device)
        fabric = make_fabric(host.device, host.devices, host.nodes, bf16)
        trainer = Trainer(config, fabric, start)
        if (out / "last.pt").is_file():
            trainer.restore(out / "last.pt")
        elif fabric.is_global_zero:
            require_heard([*sources.rated, *sources.rated_validation])
        run = _Run(trainer, sources, out, host)
        try:
            with worker_deaths_named():
                run.train()
        finally:
            run.close()
        if fabric.is_global_zero:
            export(out, config, sources.info)


class _Run:
    """A run folder that is being trained in: its data, its log, its checkpoints."""

    def __init__(self, trainer: Trainer, sources: Sources, out: Path, host: Host) -> None:
        self.trainer, self.out, self.host = trainer, out, host
        self.first = trainer.fabric.is_global_zero
        config = trainer.config
        train_samples, self.validation = sources.samples(host.cache_gb)
        self.order = Order(
            tuple(shard.samples for shard in sources.shards),
            len(sources.rated),
            config.seed,
            config.batch,
            config.rated_share,
            config.buffer,
        )
        place = (trainer.fabric.global_rank, trainer.fabric.world_size)
        self.batches = Batches(train_samples, self.order, sources.rated, *place)
        self.whole = False
        """Whether the state is that after an update, not within one."""
        self.meter = Meter()
        self.meter.losses += [torch.tensor(loss) for loss in trainer.untold]
        self.log: RunLog | None = None
        if self.first:
            about = config.model_dump()
            write_text(out / "config.json", json.dumps(about, indent=2) + "\n")
            self.log = RunLog(out, trainer.step, host.logger, about, trainer.due)
        self.bar = progress_bar(
            total=config.steps,
            initial=trainer.step,
            unit="step",
            desc=f"fit {config.student}",
            disable=not (host.progress and self.first),
        )

    def train(self) -> None:
        """All updates that are left; after a signal ``last.pt`` holds those that were done."""
        trainer, first = self.trainer, self.trainer.step
        pin = trainer.device.type == "cuda"
        feed = loader(self.batches, first, trainer.config.steps, self.host.workers, pin)
        # Several processes must agree on when to stop: there signals wait until they have.
        alone = trainer.fabric.world_size == 1
        waiting: AbstractContextManager[list[int]] = nullcontext([]) if alone else signals_wait()
        with waiting as came, closing(feed):
            try:
                self._train(feed, came)
            except KeyboardInterrupt:
                if alone and self.whole and trainer.step > first:
                    with signals_wait():
                        self._save()
                raise

    def _train(self, feed: Iterator[Batch], came: list[int]) -> None:
        trainer, config = self.trainer, self.trainer.config
        if trainer.due or (config.start and not trainer.step):
            self._validate()  # what it starts with may stay the best
        while trainer.step < config.steps:
            self._agree_to_stop(came)
            asked = time.monotonic()
            batch = next(feed)
            self.meter.waited += time.monotonic() - asked
            # To compile takes minutes: a signal does not wait for it, and nothing is lost.
            self.whole = self.whole or not trainer.compiled
            with signals_wait() if self.whole else nullcontext():
                self._update(batch)
            self.whole = True
            if trainer.due:
                self._validate()

    def _update(self, batch: Batch) -> None:
        trainer, config = self.trainer, self.trainer.config
        self.meter.losses.append(trainer.update(batch))
        self.meter.samples += config.batch
        self.bar.update()
        last = trainer.step == config.steps
        if trainer.step % self.host.log_every == 0 or last:
            self._log_interval()
        trainer.due = trainer.step % config.validate_every == 0 or last

    def close(self) -> None:
        """Flush the log, end the bar."""
        self.bar.close()
        if self.log:
            self.log.close()

    def _agree_to_stop(self, came: list[int]) -> None:
        """End all processes at one update, now and then, if a signal came to any of them."""
        fabric = self.trainer.fabric
        if fabric.world_size == 1 or self.trainer.step % STOP_EVERY:
            return
        number = largest(fabric, came[0] if came else 0)
        if number:
            came.clear()
            self._save()
            if not self.first:  # one process says it
                sys.exit(STOPPED[signal.Signals(number)])
            raise Stopped(number)

    def _save(self) -> None:
        """``last.pt``, with the losses that no line of the log tells yet."""
        trainer = self.trainer
        losses = joint_means(trainer.fabric, [float(loss) for loss in self.meter.losses])
        if self.first:
            content = trainer.checkpoint(self.order) | {"losses": losses}
            save_checkpoint(self.out / "last.pt", content)

    def _write(self, values: Mapping[str, float | None]) -> None:
        if self.log:
            self.log.write(self.trainer.step, values)

    def _log_interval(self) -> None:
        trainer, values = self.trainer, self.meter.read()
        loss = values["loss"]
        if loss is not None:
            (loss,) = joint_means(trainer.fabric, [loss])
            values["loss"] = loss
        if loss is not None and not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {trainer.step}: lower --lr")
        rate, wait = values["samples_per_s"] or 0.0, values["data_wait_share"] or 0.0
        self.bar.set_postfix_str(f"{rate:.0f} samples/s, data wait {wait:.0%}, loss {loss:.3f}")
        self._write({**values, "lr": learning_rate(trainer.config, trainer.step - 1)})
        self.meter.reset()

    def _validate(self) -> None:
        """Validate, keep the best, and write ``last.pt``."""
        trainer, began = self.trainer, time.monotonic()
        metrics = trainer.validate(self.validation)
        with signals_wait():
            trainer.due = False
            best = self.first and trainer.keep_if_best(metrics, self.out)
            # The log first: a run continued from here drops what was logged after it, not before.
            self._write({f"validation_{name}": value for name, value in metrics.items()})
            self._save()
        self.meter.start += time.monotonic() - began  # the log's rates are those of training
        figures = ", ".join(f"{name} {value or math.nan:.3f}" for name, value in metrics.items())
        if not self.bar.disable:
            told = f"step {trainer.step}: {figures}{' (best)' if best else ''}"
            self.bar.write(told, file=sys.stderr)


def export(out: Path, config: FitConfig, info: DatasetInfo) -> None:
    """Write ``model.safetensors`` and ``model.json`` from the run's best weights."""
    if not (out / "best.pt").is_file():
        raise UserError(f"{out}: no validation gave a finite loss, so there is no best model")
    best = load_checkpoint(out / "best.pt")
    path = out / "model.safetensors"
    parameters, macs = count(StudentConfig.model_validate(best["student_config"]))
    write_weights(path, best["weights"])
    about = {
        "student": config.student,
        "config": best["student_config"],
        "parameters": parameters,
        "macs_per_clip": macs,
        "recipe_hash": config.recipe_hash,
        "teacher": info.teacher,
        "metrics": best["metrics"],
        "fit": config.model_dump(),
        "weights_sha256": sha256_of(path),
        "version": version(),
    }
    write_about(out / "model.json", about)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train fit``."""
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--student", help="v1 to v10 (see: python -m train variants)")
    network.add_argument("--start", help="go on from a student's weights: v7, a run, a shrunk one")
    parser.add_argument("--shards", help="folder that the pipeline wrote, or its address")
    parser.add_argument(
        "--validation", help="shards to validate on (default: validation beside --shards)"
    )
    parser.add_argument(
        "--rated",
        type=path_here,
        help="CSV of rated clips to mix in; alone: the labelled-only baseline",
    )
    parser.add_argument(
        "--rated-validation",
        type=path_here,
        help="CSV of the clips to validate on, instead (without --shards the default: hold out)",
    )
    parser.add_argument(
        "--out", type=path_here, required=True, help="run folder; continued if it exists"
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="paper")
    for name in ("steps", "batch", "warmup", "validate-every"):
        parser.add_argument(f"--{name}", type=int, help="default: the preset's")
    for name in ("lr", "weight-decay", "clip-norm", "ema", "rated-share"):
        parser.add_argument(f"--{name}", type=float, help="default: the preset's")
    parser.add_argument("--crops", type=float, help="share of clips cut to 1 s or more in training")
    parser.add_argument("--schedule", choices=("constant", "cosine"))
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--buffer", type=int, help="places a sample may move in the shuffle")
    _add_host_arguments(parser)


def _add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and how a run goes: nothing that changes its result."""
    parser.add_argument("--workers", type=int, default=1, help="decoding processes (0: none)")
    parser.add_argument("--threads", type=int, help="of the training process (default: all cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--devices", type=int, default=1, help="processes on this machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines (torchrun says it itself)")
    parser.add_argument("--logger", choices=sorted(LOGGERS), default="tensorboard")
    parser.add_argument(
        "--cache-gb", type=float, default=4.0, help="decoded samples kept in memory"
    )
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--resume", action="store_true", help="refuse to start a new run")


def run(args: argparse.Namespace) -> int:
    """``python -m train fit``; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.resume and not (args.out / "last.pt").is_file():
        raise UserError(f"{args.out}: no last.pt to resume from")
    sources = open_sources(args.shards, args.validation, args.rated, args.rated_validation)
    fields = set(FitConfig.model_fields) & set(vars(args)) - {"student", "preset", "start"}
    changes = {name: getattr(args, name) for name in fields}
    start = None
    if args.start:
        scorer = load(args.start)
        start, args.student = student_in(scorer), Path(scorer.name).name
        changes["start"] = scorer.weights_sha256
    shape = start.config if start else variant(args.student)
    config = make_config(args.student, sources, args.preset, shape, **changes)
    host = Host(
        args.workers,
        args.device,
        args.cache_gb,
        args.log_every,
        devices=args.devices,
        nodes=args.nodes,
        logger=args.logger,
    )
    if is_first_process():
        print(_about(config, shape, args.device), flush=True)
    fit(config, sources, args.out, host, start)
    if is_first_process():
        print(f"done: {args.out / 'model.safetensors'}")
    return 0


def _about(config: FitConfig, shape: StudentConfig, device: str) -> str:
    parameters, macs = count(shape)
    precision = "bf16" if computed_in_bf16(config, device) else "fp32"
    return (
        f"{config.student}: {parameters:,} parameters, {macs / 1e6:.0f} M multiply-adds a clip; "
        f"{config.samples} samples and {config.rated_clips} rated clips, "
        f"{config.validation_samples} for validation "
        f"({CROP_SAMPLES / 16_000:.2f} s each), {precision}"
    )
