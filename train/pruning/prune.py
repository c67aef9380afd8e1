"""Pruning a trained network, round by round. ``python -m train prune``.

Sections IV-C and V-B. A round removes the 0.5 % of the weights that are still alive whose
importance is lowest over the whole encoder, then fine-tunes for 30 steps, during which importance
is gathered (``train.pruning.select``). Round 0 removes nothing. Baselines with the same rounds and
steps: ``magnitude``, per matrix and kernel, and ``layer-drop``. Of an XLS-R teacher the encoder is
pruned and its head stays; of a student the convolutions, the projection and the layers' matrices.

A run folder holds ``last.pt`` (the same command continues from it, within a round too), a folder
``pruned-P`` for every size of P percent, and ``results.json`` and ``.csv``. A size is reached at
the end of the first round that leaves at most so much: no round is cut short.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.options import add_options
from train.data.hold_out import HOLD_OUT
from train.data.sources import RatedSamples, Samples, Sources
from train.data.stream import Batch, batch_of, padded
from train.files import csv_text, run_folder
from train.loop.loop import (
    ONE_PROCESS,
    Host,
    Metrics,
    Task,
    attention_backward,
    errors_of,
    host_of,
    train_on,
)
from train.models.precision import resolve_precision
from train.models.pruned import save_pruned
from train.pruning.config import RATED_SHARE, PruneConfig, PruneHost, make_config, open_data
from train.pruning.layer_drop import keep_layers, layers_within, weights_by_layers
from train.pruning.masks import Masks, prunable
from train.pruning.select import (
    TaylorScores,
    remove_by_magnitude,
    remove_smallest,
    schedule,
    weights_at,
)
from train.pruning.subject import Subject, TeacherNetwork, load_subject

STREAM_DROPOUT = 4
"""The random generator's stream of this decision (``train.data.order`` has those before it)."""


# --- one run's state ------------------------------------------------------------------------------


class Pruner(Task):
    """A network, its masks, scores and optimiser: everything that a checkpoint holds.

    ``round`` counts removals; a round is ``config.steps`` steps. ``UserError`` for sizes that
    cannot be had, or for micro-batches where a batch norm counts the whole batch.
    """

    validates_first = True

    def __init__(self, subject: Subject, config: PruneConfig) -> None:
        super().__init__()
        self.name = f"prune {config.model} ({config.method})"
        self.subject, self.config = subject, config
        self.network = subject.network
        if isinstance(self.network, TeacherNetwork):
            self.network.head.requires_grad_(config.train_head)
        self.device = next(self.network.parameters()).device
        self.bf16 = resolve_precision(config.precision, self.device) == torch.bfloat16
        self.masks = Masks.full(self.network, prunable(self.network, config.what))
        self.total = self.masks.total()
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self.left = schedule(self.total, config.rate, config.rate_of, self._smallest())
        self.scores: TaylorScores | None = None
        if config.method == "importance":
            self.scores = TaylorScores(self.network, self.masks, config.decay)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.network.parameters() if p.requires_grad],
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.parts = {"network": self.network, "optimizer": self.optimizer}
        self._held = self.masks.hold(self.optimizer, self.network)
        self._require_apart()
        self.steps = len(self.left) * config.steps
        self.round = 0
        self.rows: list[dict[str, Any]] = []
        self.seconds, self.began = 0.0, time.monotonic()
        """Spent on the run before this process continued it, and when that was."""

    def _smallest(self) -> int:
        """Weights of the smallest size that can be reached."""
        smallest = weights_at(self.config.sizes[-1], self.total)
        if smallest < 1:
            raise UserError(f"a size of {self.config.sizes[-1]:g} % leaves no weight")
        if self.config.method != "layer-drop":
            return smallest
        least = weights_by_layers(self.network, self.masks)[0]
        within = [weights_at(s, self.total) for s in self.config.sizes]
        reached = [left for left in within if left >= least]
        if not reached:
            raise UserError(
                f"one layer and what is not in layers are {least / self.total:.1%} of the weights: "
                f"dropping layers reaches none of the sizes {list(self.config.sizes)}"
            )
        return reached[-1]

    def _require_apart(self) -> None:
        self.training_mode()
        counts = any(isinstance(m, _BatchNorm) and m.training for m in self.network.modules())
        if counts and self.config.micro_batch < self.config.batch:
            raise UserError(
                "--micro-batch: a batch norm counts the whole batch, so it cannot be shared out: "
                "leave it out, or give --batch-norm frozen"
            )

    @property
    def alive(self) -> int:
        return self.masks.alive()

    def training_mode(self) -> None:
        """As in training: batch norms follow the batches, unless they are frozen.

        What is left after a removal has other statistics, which they must follow. A teacher's head
        that is not trained stays as it was when it was loaded, statistics and all.
        """
        self.network.train()
        if isinstance(self.network, TeacherNetwork) and not self.config.train_head:
            self.network.head.eval()
        if self.config.batch_norm == "frozen":
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def predict(self, waves_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Mean opinion scores (B,), float32."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        lengths = [lengths_B] if isinstance(self.network, TeacherNetwork) else []
        with attention_backward(self.device), autocast:
            mos_B: Tensor = self.network(waves_BT, *lengths)
        return mos_B.float()

    def gradients(self, batch: Batch) -> Tensor:
        """Forward and backward; the loss (a scalar tensor, MOS squared), the batch's mean."""
        self.training_mode()
        torch.manual_seed(self._dropout_seed())  # so that a continued run drops the same
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(*(part.split(self.config.micro_batch) for part in batch), strict=True)
        losses = []
        for pcm_BT, mos_B, lengths_B in parts:
            waves_BT = padded(pcm_BT, self.subject.padding, self.device)
            errors_B = self.predict(waves_BT, lengths_B) - mos_B.to(self.device, non_blocking=True)
            loss = errors_B.square().sum() / len(batch.mos_B)
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _dropout_seed(self) -> int:
        sequence = np.random.SeedSequence([self.config.seed, STREAM_DROPOUT, self.step])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(2))

    def update(self, batch: Batch) -> Tensor:
        """One step, after the removal where it is a round's first; returns the loss."""
        if self.step // self.config.steps > self.round:
            self.remove()
        loss = self.gradients(batch)
        if self.scores:
            self.scores.gather(self.network)
        self.optimizer.step()
        self.step += 1
        return loss

    def remove(self) -> None:
        """Begin a round: remove what goes in it."""
        self.round += 1
        self.select(self.left[self.round])
        self.hold()

    def select(self, target: int) -> None:
        """Clear masks so that ``target`` weights are left, or a few less (see the methods)."""
        if self.scores:
            remove_smallest(self.scores.averages, self.masks, self.alive - target)
            self.scores.forget(self.masks)
        elif self.config.method == "magnitude":
            remove_by_magnitude(self.network, self.masks, target)
        else:
            by_layers = weights_by_layers(self.network, self.masks)
            self.keep_layers(layers_within(by_layers, target))

    def keep_layers(self, count: int) -> None:
        """Drop the layers above; the optimiser passes over what has no gradient."""
        keep_layers(self.network, count)
        self.masks = Masks.full(self.network, prunable(self.network, self.config.what))

    def hold(self) -> None:
        """Set the dead weights to zero, and keep them there."""
        self._held.remove()
        self.masks.apply_(self.network)
        self._held = self.masks.hold(self.optimizer, self.network)

    def is_due(self) -> bool:
        """Validate at the end of a round: of the last, of every so many, and at every size."""
        if self.step % self.config.steps:
            return False
        regular = self.round % self.config.validate_every == 0 or self.step == self.steps
        return regular or bool(self._sizes_due())

    @torch.no_grad()
    def validate(self, held: Samples) -> Metrics:
        self.network.eval()
        truth: list[float] = []
        predicted: list[float] = []
        for start in range(0, len(held), self.config.micro_batch):
            batch = _batch(held, range(start, min(start + self.config.micro_batch, len(held))))
            waves_BT = padded(batch.pcm_BT, self.subject.padding, self.device)
            predicted += self.predict(waves_BT, batch.lengths_B).tolist()
            truth += batch.mos_B.tolist()
        if not np.isfinite(predicted).all():
            raise UserError(f"predictions are not finite at step {self.step}: lower --lr")
        return errors_of(truth, predicted)

    def keep(self, metrics: Metrics, out: Path) -> str:
        """Write the sizes that are reached, and the results; returns what to say."""
        reached = self._sizes_due() if self.step else [None]
        for size in reached:
            row = self._add_row(size, metrics)
            if size in self.config.sizes:
                about = {
                    **self.subject.describe(),
                    "parameters": row["parameters_left"],
                    # Without the seconds, so that the same run writes the same bytes.
                    "metrics": {name: value for name, value in row.items() if name != "seconds"},
                    "prune": self.config.model_dump(mode="json"),
                }
                weights = self.network.state_dict()
                save_pruned(out / f"pruned-{size:g}", weights, self.masks, about)
        self.write_results(out)
        return "".join(f", reached {size:g} %" for size in reached if size)

    def _sizes_due(self) -> list[float | None]:
        """Sizes that the schedule and the network have come down to, and that have no row yet.

        The schedule too: dropping layers is ahead of it, and is validated after as many steps.
        """
        have = {row["size"] for row in self.rows}
        sizes, left = (100.0, *self.config.sizes), max(self.alive, self.left[self.round])
        reached = [size for size in sizes if left <= weights_at(size, self.total)]
        return [size for size in dict.fromkeys(reached) if size not in have]

    def _add_row(self, size: float | None, metrics: Metrics) -> dict[str, Any]:
        """A row of the results; ``size`` is None for the model as it was loaded."""
        alive = self.alive
        parameters = sum(p.numel() for p in self.network.parameters())
        row = {
            "size": size,
            "left": alive / self.total,
            "weights_left": alive,
            "parameters_left": parameters - (self.masks.total() - alive),
            "round": self.round,
            "steps": self.step,
            **metrics,
            "seconds": round(self._seconds(), 1),
        }
        self.rows.append(row)
        return row

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def write_results(self, out: Path) -> None:
        content = {"config": self.config.model_dump(mode="json"), "rows": self.rows}
        write_text(out / "results.json", json.dumps(content, indent=2) + "\n")
        write_text(out / "results.csv", csv_text(self.rows))

    def figures(self) -> dict[str, float]:
        return {"round": self.round, "left": self.alive / self.total}

    def state(self) -> dict[str, Any]:
        """Masks, scores, weights, moments, results."""
        layers = None
        if self.config.method == "layer-drop":
            layers = len(weights_by_layers(self.network, self.masks))
        return {
            "round": self.round,
            "layers": layers,
            "masks": dict(self.masks),
            "scores": self.scores.averages if self.scores else {},
            **super().state(),
            "rows": self.rows,
            "seconds": self._seconds(),
        }

    def load_state(self, content: Mapping[str, Any]) -> None:
        if content["layers"] is not None:
            self.keep_layers(content["layers"])
        self.masks = Masks({name: mask.to(self.device) for name, mask in content["masks"].items()})
        super().load_state(content)
        if self.scores:
            self.scores.load(content["scores"])
        self.round, self.rows = content["round"], content["rows"]
        self.seconds = content["seconds"]
        self.hold()


def _batch(samples: Samples, numbers: range) -> Batch:
    """Samples as a batch; of rated clips with how many samples are the clip's own."""
    pcm, mos = zip(*map(samples.read, numbers), strict=True)
    lengths = [len(pcm_T) for pcm_T in pcm]
    if isinstance(samples, RatedSamples):
        lengths = [samples.length(number) for number in numbers]
    return batch_of(torch.from_numpy(np.stack(pcm)), list(mos), lengths)


# --- the run --------------------------------------------------------------------------------------


def prune(config: PruneConfig, subject: Subject, sources: Sources, out: Path, host: Host) -> None:
    """Prune, or continue the run in ``out``, until all sizes are there.

    What a signal does, and errors, as of ``train``; ``UserError`` too if another command writes to
    ``out``.
    """
    host = host.model_copy(update={"log_every": config.steps})  # once a round
    with run_folder(out):
        task = Pruner(subject, config)
        if host.progress:
            print(_about(task), flush=True)
        train_on(task, sources.resampled_by(subject.resampler), out, host)
        task.write_results(out)


LINE = "{:>7} {:>7} {:>12} {:>12} {:>6} {:>8} {:>6} {:>6} {:>9}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results of a run as text: the model as it was loaded, then every size."""
    heads = (
        "size %",
        "left %",
        "weights",
        "parameters",
        "round",
        "steps",
        "PCC",
        "RMSE",
        "seconds",
    )
    lines = [LINE.format(*heads)]
    for row in rows:
        size = "loaded" if row["size"] is None else f"{row['size']:g}"
        left = (
            f"{100 * row['left']:.2f}",
            f"{row['weights_left']:,}",
            f"{row['parameters_left']:,}",
        )
        errors = ("-" if row[name] is None else f"{row[name]:.3f}" for name in ("pcc", "rmse"))
        seconds = f"{row['seconds']:.0f}"
        lines.append(LINE.format(size, *left, row["round"], row["steps"], *errors, seconds))
    return "\n".join(lines)


# --- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train prune``."""
    add = parser.add_argument
    add("--model", default="v7", help="v7, a run, or an XLS-R teacher (default: v7)")
    add("--what", help="of a student: all (default) or convolutions; of a teacher: encoder")
    add("--micro-batch", type=int, help="clips at a time, where memory is short (default: all)")
    add("--rated", type=path_here, help="CSV of rated clips to fine-tune on")
    add("--rated-set", nargs="+", metavar="NAME", help="take these datasets of it only")
    add("--shards", type=path_here, help="pseudo-labelled shards to fine-tune on")
    add("--rated-share", type=float, help=f"with both: of rated clips (default {RATED_SHARE})")
    add("--validation", type=path_here, help="shards to validate on")
    add("--rated-validation", type=path_here, help="CSV of rated clips to validate on")
    add("--rated-validation-set", nargs="+", metavar="NAME", help="these datasets of it only")
    held = "without any of these: share of the conditions of --rated (default %(default)s)"
    add("--rated-hold-out", type=float, default=HOLD_OUT, help=held)
    add("--out", type=path_here, required=True, help="run folder; continued if it exists")
    add_options(parser, PruneConfig)
    add_options(parser, PruneHost, [*ONE_PROCESS, "log_every"])


def run(args: argparse.Namespace) -> int:
    """``python -m train prune``; returns the exit code."""
    host = host_of(args, PruneHost)
    subject = load_subject(args.model, host.device)
    sources = open_data(args, subject.calibration)
    config = make_config(args, subject, sources)
    prune(config, subject, sources, args.out, host)
    rows = json.loads((args.out / "results.json").read_text("utf-8"))["rows"]
    print(table(rows))
    if missing := [f"{s:g}" for s in config.sizes if s not in {row["size"] for row in rows}]:
        print(f"{config.method} cannot reach {', '.join(missing)} %: other weights are more")
    print(f"done: {args.out / 'results.csv'}")
    return 0


def _about(pruner: Pruner) -> str:
    config, rounds = pruner.config, len(pruner.left) - 1
    return (
        f"{config.model}: {pruner.total:,} of {pruner.parameters:,} parameters can be pruned "
        f"({config.what}); {config.method}, {rounds} rounds of {config.steps} steps of "
        f"{config.batch} down to {pruner.left[-1]:,}; {config.samples} samples and "
        f"{config.rated_clips} rated clips, {config.validation_samples} for validation"
    )
