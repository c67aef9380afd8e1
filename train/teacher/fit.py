"""The teacher's head, trained on rated clips. ``python -m train teacher``.

Section IV-A: the head learns mean opinion scores from a frozen encoder's features, which are taken
once (``train.teacher.feature_cache``). Bias-aware (the default): the logit of a clip goes through a
scale and a shift of its dataset before the sigmoid, and both are learned; a universal scale and
shift are found after training (``train.teacher.calibrate``). With ``head.safetensors`` and
``head.json``, which the end of a run writes, its folder is a teacher.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.options import add_options, options_of
from data_specs.strict import Strict, checked
from train.data.order import generator
from train.files import csv_text, run_folder, write_model
from train.loop.loop import ONE_PROCESS, Host, Metrics, Task, host_of, load_best, train
from train.metrics import agreement
from train.models.calibration import Affine, Calibration, Doubles
from train.models.front_end import load_front_end
from train.models.head import HeadConfig, build_head
from train.models.student import mos_of
from train.teacher.calibrate import fit_universal
from train.teacher.feature_cache import ROWS, FrameCache, left_out, open_cache
from train.teacher.rated_frames import (
    STREAM_DROPOUT,
    Batch,
    Draws,
    RatedFrames,
    gather,
    usable,
)

FEW_CLIPS = 300
"""Fewer, of a few conditions, say little about where a universal scale lies."""

VALIDATION_BATCH = 32


class Settings(Strict):
    """What a user chooses; folders, threads and the device are not in it.

    The defaults are section IV-A's, and PyTorch's weight decay, because the paper gives none.
    """

    front_end: str = Field(default="xlsr-2b-l10", description="whose features the head reads")
    bias_aware: bool = Field(
        default=True, description="a learned scale and shift for every dataset"
    )
    steps: int = Field(default=72_000, ge=1, description="training steps")
    batch: int = Field(default=12, ge=2, description="clips a step")
    lr: float = Field(default=1e-4, gt=0, description="AdamW's learning rate")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's")
    validate_every: int = Field(default=3000, ge=1, description="steps")
    cap: int = Field(default=7000, ge=1, description="clips for which a dataset counts at most")
    dim: int = Field(default=32, ge=2, multiple_of=2, description="width of the head")
    heads: int = Field(default=4, ge=1, description="attention heads")
    layers: int = Field(default=4, ge=1, description="Transformer layers")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="in the Transformer")
    seed: int = Field(default=0, ge=0, description="of weights, order and what is held out")

    @model_validator(mode="after")
    def _divisible(self) -> Settings:
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        return self


class TeacherConfig(Settings):
    """Everything that decides what a run computes: a continued run must have the same."""

    front_end_sha256: str
    precision: str
    tokens: int
    features: int
    train_sha256: str
    validation_sha256: str
    train_clips: int
    validation_clips: int

    def head(self) -> HeadConfig:
        return HeadConfig.model_validate(self.model_dump(include=set(HeadConfig.model_fields)))


def make_config(settings: Settings, data: RatedFrames) -> TeacherConfig:
    """The settings and what they are applied to."""
    about = data.about
    return TeacherConfig(
        **(settings.model_dump() | {"front_end": about.front_end}),
        front_end_sha256=about.weights_sha256,
        precision=about.precision,
        tokens=about.tokens,
        features=about.channels,
        train_sha256=data.digest(data.train_rows),
        validation_sha256=data.digest(data.validation_rows),
        train_clips=len(data.train_rows),
        validation_clips=len(data.validation_rows),
    )


class DatasetScales(nn.Module):
    """One scale and one shift a dataset: logits (B,), dataset numbers (B,) -> logits (B,).

    The logarithm of the scale is what is learned, so that the scale stays positive.
    """

    def __init__(self, datasets: int) -> None:
        super().__init__()
        self.log_scale_D = nn.Parameter(torch.zeros(datasets))
        self.shift_D = nn.Parameter(torch.zeros(datasets))

    def forward(self, logits_B: Tensor, datasets_B: Tensor) -> Tensor:
        scaled_B: Tensor = self.log_scale_D.exp()[datasets_B] * logits_B + self.shift_D[datasets_B]
        return scaled_B


class HeadTrainer(Task):
    """A head, its datasets' scales and their optimiser: everything that a checkpoint holds."""

    def __init__(
        self, config: TeacherConfig, training_counts: Mapping[str, int], device: str = "cpu"
    ) -> None:
        super().__init__()
        self.name, self.config, self.steps = f"teacher {config.front_end}", config, config.steps
        self.counts = dict(training_counts)
        self.device = torch.device(device)
        torch.manual_seed(config.seed)
        self.head = build_head(config.head()).to(self.device)
        # Without bias awareness the scales stay 1 and the shifts 0.
        self.scales = DatasetScales(len(self.counts)).to(self.device)
        self.scales.requires_grad_(config.bias_aware)
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters())}]
        if config.bias_aware:
            groups.append({"params": list(self.scales.parameters()), "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.parts = {"head": self.head, "scales": self.scales, "optimizer": self.optimizer}

    def update(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the loss (a scalar tensor, MOS squared)."""
        frames_BLC = head_input(batch.frames, self.device)
        mos_B, datasets_B = batch.mos.to(self.device), batch.datasets.to(self.device)
        if self.config.dropout:  # seeded anew, so that a continued run drops the same
            draw = generator(self.config.seed, STREAM_DROPOUT, self.step)
            torch.manual_seed(int(draw.integers(1 << 62)))
        self.head.train()
        logits_B = self.scales(self.head(frames_BLC), datasets_B)
        loss = functional.mse_loss(mos_of(logits_B), mos_B)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    @torch.inference_mode()
    def raw_logits(self, data: RatedFrames) -> Doubles:
        """Logits (V,) of the validation clips, before any dataset's scale."""
        self.head.eval()
        rows_V, found = data.validation_rows, []
        for start in range(0, len(rows_V), VALIDATION_BATCH):
            frames_BLC = data.read(rows_V[start : start + VALIDATION_BATCH])
            logits_B = self.head(head_input(frames_BLC, self.device))
            found.append(logits_B.double().cpu().numpy())
        logits_V: Doubles = np.concatenate(found)
        if not np.isfinite(logits_V).all():
            raise UserError(f"logits are not finite at step {self.step}: lower --lr")
        return logits_V

    def affines(self) -> dict[str, Affine]:
        """Scale and shift of every training dataset."""
        scales, shifts = self.scales.log_scale_D.exp().tolist(), self.scales.shift_D.tolist()
        return {
            name: Affine(scale=scale, shift=shift)
            for name, scale, shift in zip(self.counts, scales, shifts, strict=True)
        }

    def own(self, dataset: str) -> Affine:
        """A dataset's scale and shift; for one that did not train, the others' mean.

        Weighted by training clips; of the scales the geometric mean.
        """
        known = self.affines()
        if dataset in known:
            return known[dataset]
        weights = [self.counts[name] for name in known]
        log_scale = np.average(
            [math.log(affine.scale) for affine in known.values()], weights=weights
        )
        shift = np.average([affine.shift for affine in known.values()], weights=weights)
        return Affine(scale=math.exp(log_scale), shift=float(shift))

    def validate(self, held: RatedFrames) -> Metrics:
        """Errors on the validation clips, every set under its own scale and shift.

        ``loss`` is the mean squared error over all clips (so weighted by clips), ``rmse`` its root,
        ``pcc`` the plain mean over the sets; ``pcc/NAME`` and ``rmse/NAME`` are one set's.
        """
        logits_V = self.raw_logits(held)
        errors, of_sets = [], {}
        for name, places in held.validation_sets.items():
            truth = held.mos[held.validation_rows[places]]
            predicted = self.own(name).mos(logits_V[places])
            errors.append((predicted - truth) ** 2)
            found = agreement(truth, predicted)
            of_sets[f"pcc/{name}"], of_sets[f"rmse/{name}"] = found.pcc, found.rmse
        loss = float(np.concatenate(errors).mean())
        defined = [v for key, v in of_sets.items() if key.startswith("pcc/") and v is not None]
        pcc = float(np.mean(defined)) if defined else None
        return {"loss": loss, "rmse": math.sqrt(loss), "pcc": pcc, **of_sets}

    def figures(self) -> dict[str, float]:
        return {"lr": self.config.lr}

    def best_model(self) -> dict[str, Any]:
        """Head and scales, without the moments."""
        head, scales = self.head.state_dict(), self.scales.state_dict()
        config = self.config.model_dump()
        return {"config": config, "head": head, "scales": scales, "best": self.best}


def head_input(frames_BLC: Tensor, device: torch.device) -> Tensor:
    """Features in bf16 as float32 on a device, (B, L, C), in memory (B, C, L).

    The head's first batch norms go along the frames of a channel: on a CPU they are faster so, by
    more than this costs.
    """
    frames_BCL = frames_BLC.to(device).transpose(1, 2)
    frames_BCL = frames_BCL.to(torch.float32, memory_format=torch.contiguous_format)
    return frames_BCL.transpose(1, 2)


def train_teacher(config: TeacherConfig, data: RatedFrames, out: Path, host: Host) -> None:
    """Train a head, or continue the run in ``out``, until all is done.

    Ends by writing ``head.safetensors``, ``head.json`` and ``validation.csv``. What a signal does,
    ``train.loop.loop.train`` says.
    """
    out.mkdir(parents=True, exist_ok=True)
    task = HeadTrainer(config, data.training_counts, host.device)
    train(task, Draws(data, config.cap, config.batch, config.seed).feed, data, out, host)
    export(task, data, out)


def export(trainer: HeadTrainer, data: RatedFrames, out: Path) -> None:
    """Write ``validation.csv``, ``head.safetensors`` and ``head.json`` from the best weights.

    The weights are the raw head's: no scale is folded in. ``UserError`` if no validation gave a
    finite loss.
    """
    best = load_best(out)
    trainer.head.load_state_dict(best["head"])
    trainer.scales.load_state_dict(best["scales"])
    logits_V = trainer.raw_logits(data)
    calibration, universal = None, Affine()
    if trainer.config.bias_aware:
        universal = fit_universal(logits_V, data.mos[data.validation_rows])
        calibration = Calibration(universal=universal, datasets=trainer.affines())
    write_text(out / "validation.csv", _predictions(trainer, data, logits_V, universal))
    config = trainer.config
    about = {
        "format": 1,
        "front_end": config.front_end,
        "front_end_sha256": config.front_end_sha256,
        "head": config.head().model_dump(),
        "calibration": calibration.model_dump() if calibration else None,
        "metrics": {
            **{name: best["best"][name] for name in ("step", "loss", "rmse", "pcc")},
            "sets": results(data, logits_V, universal, best["best"]),
        },
        "fit": config.model_dump(),
    }
    write_model(out / "head.safetensors", trainer.head.state_dict(), about)


def results(
    data: RatedFrames, logits_V: Doubles, universal: Affine, best: Metrics
) -> list[dict[str, Any]]:
    """Every validation set under its own scale and shift, as validated, and the universal one."""
    rows = []
    for name, places in data.validation_sets.items():
        truth = data.mos[data.validation_rows[places]]
        found = agreement(truth, universal.mos(logits_V[places]))
        own = {"dataset": name, "clips": found.clips}
        own |= {key: best[f"{key}/{name}"] for key in ("pcc", "rmse")}
        rows.append(own | {"pcc_universal": found.pcc, "rmse_universal": found.rmse})
    return rows


def _predictions(
    trainer: HeadTrainer, data: RatedFrames, logits_V: Doubles, universal: Affine
) -> str:
    """Every validation clip as a line of CSV."""
    rows = []
    for name, places in data.validation_sets.items():
        own_S = trainer.own(name).mos(logits_V[places])
        universal_S = universal.mos(logits_V[places])
        for place, own, all_one in zip(places, own_S, universal_S, strict=True):
            clip = data.clips[data.validation_rows[place]]
            rows.append(
                {"dataset": name, "path": str(clip.path), "mos": clip.mos}
                | {"logit": logits_V[place], "own": own, "universal": all_one}
            )
    return csv_text(rows)


def table(sets: Sequence[Mapping[str, Any]]) -> str:
    """The results of all validation sets as text."""
    width = max(len("validation set"), *(len(row["dataset"]) for row in sets))
    lines = [
        f"{'':{width}} {'':>7} {'own scale':>15} {'universal scale':>15}",
        f"{'validation set':{width}} {'clips':>7} {'PCC':>8}{'RMSE':>7} {'PCC':>8}{'RMSE':>7}",
    ]
    for row in sets:
        figures = [row[key] for key in ("pcc", "rmse", "pcc_universal", "rmse_universal")]
        pcc, rmse, pcc_all, rmse_all = ("-" if v is None else f"{v:.3f}" for v in figures)
        lines.append(
            f"{row['dataset']:{width}} {row['clips']:7} {pcc:>8}{rmse:>7} {pcc_all:>8}{rmse_all:>7}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train teacher``."""
    add = partial(parser.add_argument, type=path_here)
    add("--rated", action="append", required=True, help="CSV to train on; repeatable")
    held = "CSV to validate on; repeatable (default: a tenth of every dataset's conditions, else "
    add("--validation", action="append", default=[], help=f"{held}systems, else clips)")
    add("--out", required=True, help="run folder; continued if it exists")
    add("--cache", help="folder of features (default: OUT/features)")
    add_options(parser, Settings)
    kinds = ("auto", "bf16", "fp32")
    parser.add_argument("--precision", choices=kinds, default="auto", help="of the features")
    add_options(parser, Host, [*ONE_PROCESS, "workers", "cache_gb"])


def run(args: argparse.Namespace) -> int:
    """``python -m train teacher``; returns the exit code."""
    host = host_of(args, Host)
    settings = checked(Settings, options_of(args, Settings), "options")
    clips, held = gather(args.rated, args.validation, settings.seed)
    with run_folder(args.out):
        cache = open_cache(
            args.cache or args.out / "features",
            clips,
            load_front_end(args.front_end, args.device, args.precision),  # no longer held after it
        )
        data = usable(cache, clips, held)
        config = make_config(settings, data)
        print(_summary(config, data), flush=True)
        _warn(config, data, cache)
        train_teacher(config, data, args.out, host)
    print(table(json.loads((args.out / "head.json").read_text("utf-8"))["metrics"]["sets"]))
    print(f"done: {args.out / 'head.safetensors'}")
    return 0


def _warn(config: TeacherConfig, data: RatedFrames, cache: FrameCache) -> None:
    """Say now, not after the training, what it cannot do."""
    if config.bias_aware and len(data.validation_rows) < FEW_CLIPS:
        print(
            f"warning: the universal scale is fitted on {len(data.validation_rows)} validation "
            f"clips; with fewer than {FEW_CLIPS} it may be far off: give more --validation",
            file=sys.stderr,
        )
    if why := left_out(cache, data.clips):
        print(f"left out: {why}; see {ROWS} in the folder of features", file=sys.stderr)


def _summary(config: TeacherConfig, data: RatedFrames) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in data.training_counts.items())
    validation = ", ".join(f"{name} {len(v)}" for name, v in data.validation_sets.items())
    scales = "a scale and shift a dataset" if config.bias_aware else "no scales"
    return f"{config.front_end}, {scales}; training on {counts}; validating on {validation}"
