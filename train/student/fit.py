"""Training of a student: shards in, a trained student out. ``python -m train fit``.

Section IV-B: mean squared error on the teacher's MOS, AdamW, validation every N steps, the best
kept. ``--preset paper`` (the default) is the paper's setting; ``--preset fast`` reaches the same
error with a fraction of the compute. Without ``--shards`` a run is on rated clips alone: the
paper's labelled-only baseline. On several devices or nodes (``--devices``, ``--nodes`` or
``torchrun``) a batch stays one batch: every process takes its rows of it (``train.loop.parallel``).
"""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.options import add_options, options_of
from data_specs.sample import CROP_SAMPLES
from train.data.augment import augment
from train.data.shards import DatasetInfo
from train.data.sources import Samples, Sources, open_sources
from train.data.stream import Batch, padded, to_waves
from train.files import run_folder, write_model
from train.loop.launch import is_first_process
from train.loop.loop import (
    Host,
    Metrics,
    Task,
    attention_backward,
    errors_of,
    host_of,
    load_best,
    train_on,
)
from train.loop.parallel import make_fabric, synchronise_batch_norm, whole
from train.models.loading import find_student
from train.models.student import Student, StudentConfig, count, training_layout, variant
from train.student.presets import (
    PRESETS,
    FitConfig,
    computed_in_bf16,
    is_compiled,
    learning_rate,
    make_config,
)


class Trainer(Task):
    """A student, its averaged copy and its optimiser: everything that a checkpoint holds."""

    def __init__(
        self, config: FitConfig, fabric: Fabric | None = None, start: Student | None = None
    ) -> None:
        super().__init__()
        self.name, self.config, self.steps = f"fit {config.student}", config, config.steps
        # What it starts with may stay the best.
        self.validates_first = config.start is not None
        self.fabric: Fabric = fabric or make_fabric(bf16=computed_in_bf16(config, "cpu"))
        self.device = self.fabric.device
        torch.manual_seed(config.seed)
        student = copy.deepcopy(start) if start else Student(variant(config.student))
        hears: dict[str, str] = {"padding": config.padding}
        if start is None:  # else as what it starts from was trained
            hears["resampler"] = "sharp"
        student.config = student.config.model_copy(update=hears)
        student.requires_grad_(True)
        student.lay_out(torch.channels_last)
        self.average = copy.deepcopy(student).requires_grad_(False).eval().to(self.device)
        student.lay_out(training_layout(student.config, self.device))
        if self.fabric.world_size > 1:
            synchronise_batch_norm(student)
        self.student = student
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.compiled = is_compiled(config, self.device)
        network: Any = torch.compile(student) if self.compiled else student
        self._network, self._optimizer = self.fabric.setup(network, self.optimizer)
        self.parts = {"student": student, "average": self.average, "optimizer": self.optimizer}

    def update(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the loss (a scalar tensor, MOS squared) of these rows."""
        waves_BT = self._waves(batch)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, self.step)
        self._network.train()
        with attention_backward(self.device):
            loss = self.loss(waves_BT, batch.mos_B.to(self.device, non_blocking=True))
        self._optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_norm)
        self._optimizer.step()
        self.step += 1
        self._follow()
        return loss.detach()

    def loss(self, waves_BT: Tensor, mos_B: Tensor) -> Tensor:
        """What is minimised, of waves and their scores (a scalar tensor)."""
        return functional.mse_loss(self._network(waves_BT), mos_B)

    def score(self, waves_BT: Tensor) -> Tensor:
        """Scores (B,) by the averaged weights."""
        mos_B: Tensor = self.average(waves_BT)
        return mos_B

    def _waves(self, batch: Batch) -> Tensor:
        config = self.config
        if not config.augment:
            return padded(batch.pcm_BT, config.padding, self.device)
        options = (config.seed, self.step, config.crops, self.rank, self.world, config.padding)
        return augment(to_waves(batch.pcm_BT, self.device), batch.lengths_B, *options)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averaged weights (and batch-norm statistics) towards the student's."""
        # A short memory at first, so that the random start is forgotten.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
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
    def validate(self, held: Samples) -> Metrics:
        """Loss, PCC and RMSE of the averaged weights over all samples; every process has some."""
        rows = range(self.rank, len(held), self.world)
        truth: list[float] = []
        predicted: list[Tensor] = []
        for start in range(0, len(rows), self.config.batch):
            read = [held.read(row) for row in rows[start : start + self.config.batch]]
            pcm_BT = torch.from_numpy(np.stack([pcm for pcm, _ in read]))
            waves_BT = padded(pcm_BT, self.config.padding, self.device)
            with self.fabric.autocast():
                predicted.append(self.score(waves_BT).double())
            truth += [mos for _, mos in read]
        mine = torch.cat(predicted) if predicted else torch.zeros(0, device=self.device)
        values = torch.stack([torch.tensor(truth, device=self.device).double(), mine.double()])
        return errors_of(*(whole(self.fabric, rows, v, len(held)).tolist() for v in values))

    def figures(self) -> dict[str, float]:
        return {"lr": learning_rate(self.config, self.step - 1)}

    def best_model(self) -> dict[str, Any]:
        """The averaged weights, and what is needed to build the student again."""
        return {
            "student": self.config.student,
            "student_config": self.student.config.model_dump(),
            "recipe_hash": self.config.recipe_hash,
            "weights": self.average.state_dict(),
            "metrics": self.best,
        }


def fit(
    config: FitConfig,
    sources: Sources,
    out: Path,
    host: Host,
    start: Student | None = None,
) -> None:
    """Train, or continue the run in ``out``, until all steps are done.

    From a student's weights (``config.start`` is their digest), or from random ones. Ends by
    writing ``model.safetensors`` and ``model.json``. What a signal does, and errors, as of
    ``train``; ``UserError`` too if another command writes to ``out``.
    """
    with run_folder(out) if is_first_process() else nullcontext():
        bf16 = computed_in_bf16(config, host.device)
        task = Trainer(config, make_fabric(host.device, host.devices, host.nodes, bf16), start)
        train_on(task, sources.resampled_by(task.student.config.resampler), out, host)
        if task.rank == 0:
            export(out, config, sources.info)


def export(out: Path, config: FitConfig, info: DatasetInfo) -> None:
    """Write ``model.safetensors`` and ``model.json`` from the run's best weights."""
    best = load_best(out)
    parameters, macs = count(StudentConfig.model_validate(best["student_config"]))
    about = {
        "student": config.student,
        "config": best["student_config"],
        "parameters": parameters,
        "macs_per_clip": macs,
        "recipe_hash": config.recipe_hash,
        "teacher": info.teacher,
        "metrics": best["metrics"],
        "fit": config.model_dump(),
    }
    write_model(out / "model.safetensors", best["weights"], about)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train fit``."""
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--student", help="v1 to v10 (see: python -m train variants)")
    network.add_argument("--start", help="go on from a student's weights: v7, a run, a model file")
    add = parser.add_argument
    add("--shards", help="folder that the pipeline wrote, or its address")
    add("--validation", help="shards to validate on (default: validation beside --shards)")
    rated = "CSV of rated clips to mix in; alone: the labelled-only baseline"
    add("--rated", type=path_here, help=rated)
    held = "CSV of the clips to validate on, instead (without --shards the default: hold out)"
    add("--rated-validation", type=path_here, help=held)
    add("--out", type=path_here, required=True, help="run folder; continued if it exists")
    add("--preset", choices=sorted(PRESETS), default="paper", help="of what follows")
    add_options(parser, FitConfig)
    add_options(parser, Host)
    add("--resume", action="store_true", help="refuse to start a new run")


def run(args: argparse.Namespace) -> int:
    """``python -m train fit``; returns the exit code."""
    host = host_of(args, Host)
    if args.resume and not (args.out / "last.pt").is_file():
        raise UserError(f"{args.out}: no last.pt to resume from")
    sources = open_sources(args.shards, args.validation, args.rated, args.rated_validation)
    changes = options_of(args, FitConfig)
    for name in ("student", "preset", "start"):
        changes.pop(name, None)
    start = None
    if args.start:
        start, changes["start"] = find_student(args.start)
        args.student = Path(args.start).name
    shape = start.config if start else variant(args.student)
    config = make_config(args.student, sources, args.preset, shape, **changes)
    if is_first_process():
        print(_about(config, shape, host.device), flush=True)
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
