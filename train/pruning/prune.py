"""Pruning a trained network, round by round. ``python -m train prune``.

Sections IV-C and V-B. A round removes the 0.5 % of the weights that are still alive whose
importance is lowest over the whole encoder, then fine-tunes for 30 updates on rated clips, during
which the importances are gathered on (``train.pruning.scores``). Round 0 removes nothing: its
updates gather the first scores. Baselines with the same rounds and updates: ``magnitude``, per
matrix and kernel, and ``layer-drop``. Of an XLS-R teacher the encoder is pruned and its head left
as it is; of a student the convolutions, the projection and the layers' matrices.

A run folder holds ``last.pt`` (all state; the same command continues from it, within a round too),
``log.jsonl``, a folder ``pruned-P`` for every size of P percent, and ``results.json`` and ``.csv``.
A size is reached at the end of the first round that leaves at most so much: no round is cut short.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from data_specs.io.addresses import path_here
from data_specs.io.cli import signals_wait
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.hardware import keep_freed_memory
from data_specs.io.progress import progress_bar
from data_specs.rated import RatedClip, require_heard
from data_specs.strict import checked
from train.data.hold_out import HOLD_OUT, held_apart
from train.data.loading import loader, worker_deaths_named
from train.data.order import Order
from train.data.shards import list_shards, read_dataset_info
from train.data.sources import (
    LABELLED_ONLY,
    Sources,
    chosen,
    digest_of,
    on_labels_scale,
    open_sources,
    require_apart,
    require_once,
)
from train.data.stream import Batch, Batches, ShardSamples, batch_of, rated_pcm, to_waves
from train.data.tars import Pcm
from train.files import csv_text, load_checkpoint, require_same, run_folder, save_checkpoint
from train.loop.run_log import LOGGERS, RunLog
from train.metrics import agreement
from train.models.calibration import Affine, Calibration
from train.models.front_end import XlsrFrontEnd, centre_crop
from train.models.head import TransformerHead
from train.models.head_teacher import HeadTeacher, describe
from train.models.precision import resolve_precision
from train.models.student import Student, mos_of
from train.models.xlsr import Encoder
from train.pruning.layer_drop import keep_layers, layers_within, weights_by_layers
from train.pruning.masks import Masks, prunable
from train.pruning.scores import FACTOR, TaylorScores
from train.pruning.select import RateOf, remove_by_magnitude, remove_smallest, schedule, weights_at
from train.pruning.storage import save_pruned
from train.scoring.score import MIN_SAMPLES, TeacherScorer, load, student_in

Method = Literal["importance", "magnitude", "layer-drop"]
METHODS: tuple[Method, ...] = ("importance", "magnitude", "layer-drop")
SIZES = (90.0, 70.0, 50.0, 29.0, 15.0, 7.0)

RATED_SHARE = 0.2
"""Of rated clips, where there are shards too (section IV-B, of the students)."""

STREAM_DROPOUT = 4
"""The random generator's stream of this decision (``train.data.order`` has those before it)."""

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class PruneConfig(BaseModel):
    """Everything that decides what a run computes: a continued run must have the same.

    Sizes are percent of the weights that may be pruned. The defaults are the paper's, and
    PyTorch's weight decay, because it gives none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = ""
    model_sha256: str = ""
    method: Method = "importance"
    what: str
    sizes: tuple[Annotated[float, Field(gt=0, le=100)], ...] = SIZES
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.005
    rate_of: RateOf = "living"
    updates: Positive = 30
    factor: Annotated[float, Field(ge=0, lt=1)] = FACTOR
    lr: Annotated[float, Field(gt=0)] = 2e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch: Annotated[int, Field(ge=2)] = 20
    micro_batch: Positive = 20
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    batch_norm: Literal["train", "frozen"] = "train"
    train_head: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    rated_share: Share = 1.0
    buffer: Positive = 4096
    validate_every: Positive = 20
    recipe_hash: str = ""
    validation_hash: str = ""
    rated_hash: str = ""
    samples: int = 0
    rated_clips: int = 0
    validation_samples: int = 0

    @field_validator("sizes")
    @classmethod
    def _descending(cls, sizes: tuple[float, ...]) -> tuple[float, ...]:
        if not sizes:
            raise UserError("at least one size is needed")
        return tuple(sorted(set(sizes), reverse=True))


@dataclass(frozen=True)
class Host:
    """How a run uses the machine; none of it changes what is computed on one machine type."""

    device: str = "cpu"
    workers: int = 1
    cache_gb: float = 4.0
    checkpoint_every: int = 30
    progress: bool = True
    logger: str = "tensorboard"


# --- what is pruned -------------------------------------------------------------------------------


class TeacherNetwork(nn.Module):
    """An XLS-R teacher through which gradients flow: what ``HeadTeacher.logits`` computes."""

    def __init__(self, encoder: Encoder, head: TransformerHead, universal: Affine) -> None:
        super().__init__()
        self.encoder, self.head, self.universal = encoder, head, universal

    def forward(self, waves_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Mean opinion scores (B,), float32, of (B, T) waves at 16 kHz.

        Of each only the first ``lengths_B`` samples are heard, and zeros put behind its frames, as
        published: shorter clips go through the encoder one at a time.
        """
        frames_BLC = self._frames(waves_BT, lengths_B)
        with torch.autocast(waves_BT.device.type, enabled=False):  # the head is in float32
            logits_B: Tensor = self.head(frames_BLC)
        return mos_of(logits_B * self.universal.scale + self.universal.shift)

    def _frames(self, waves_BT: Tensor, lengths_B: Tensor) -> Tensor:
        samples = waves_BT.shape[1]
        lengths = [max(length, MIN_SAMPLES) for length in lengths_B.tolist()]
        whole = [row for row, length in enumerate(lengths) if length >= samples]
        if len(whole) == len(lengths):
            return self._hear(waves_BT)
        short = [row for row, length in enumerate(lengths) if length < samples]
        found = [self._hear(waves_BT[whole])] if whole else []
        found += [self._hear(waves_BT[row : row + 1, : lengths[row]]) for row in short]
        places = torch.tensor([*whole, *short], device=waves_BT.device).argsort()
        return torch.cat(found)[places]

    def _hear(self, waves_BT: Tensor) -> Tensor:
        hidden = [centre_crop(found.float()) for found in self.encoder(waves_BT)]
        return hidden[0] if len(hidden) == 1 else torch.stack(hidden, dim=-1)


@dataclass
class Subject:
    """A network that is pruned, and what it is called; ``teacher`` is None for a student."""

    network: Student | TeacherNetwork
    name: str
    sha256: str
    teacher: HeadTeacher | None = None

    @property
    def calibration(self) -> Calibration | None:
        """Between its scale and those of rated sets."""
        return self.teacher.calibration if self.teacher else None

    def describe(self) -> dict[str, Any]:
        """What is needed to build the network again."""
        if isinstance(self.network, Student):
            return {"kind": "student", "config": self.network.config.model_dump(mode="json")}
        if self.teacher is None:
            raise ValueError(f"{self.name}: a network without its teacher cannot be written")
        return describe(self.teacher)


def load_subject(model: str | Path, device: str = "cpu") -> Subject:
    """A student ("v7", a run) or an XLS-R teacher by name, on a device, ready to be trained.

    ``ValueError`` for a model that cannot be pruned.
    """
    scorer = load(model, device)
    name = Path(scorer.name).name
    if isinstance(scorer, TeacherScorer):
        return teacher_subject(scorer.teacher, name)
    student = student_in(scorer).requires_grad_(True)
    student.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Subject(student, name, scorer.weights_sha256)


def teacher_subject(teacher: object, name: str) -> Subject:
    """A teacher with an XLS-R encoder, in float32. ``ValueError`` for another teacher."""
    if not isinstance(teacher, HeadTeacher) or not isinstance(teacher.front_end, XlsrFrontEnd):
        raise UserError(
            f"teacher {name!r} has no XLS-R encoder: give one that has, or a student (v7, a run)"
        )
    universal = teacher.calibration.universal if teacher.calibration else Affine()
    network = TeacherNetwork(teacher.front_end.encoder, teacher.head, universal)
    return Subject(network.requires_grad_(True), name, teacher.weights_sha256, teacher)


# --- one run's state ------------------------------------------------------------------------------


class Pruner:
    """A network, its masks, scores and optimiser: everything that a checkpoint holds.

    ``step`` counts updates, ``round`` removals. ``ValueError`` for sizes that cannot be had, or for
    micro-batches where a batch norm counts the whole batch.
    """

    def __init__(self, subject: Subject, config: PruneConfig) -> None:
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
            self.scores = TaylorScores(self.network, self.masks.masks, config.factor)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.network.parameters() if p.requires_grad],
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._held = self.masks.hold(self.optimizer, self.network)
        self._require_apart()
        self.step = self.round = 0
        self.rows: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []
        """Of the round that is being done."""
        self.seconds = 0.0
        """Spent on the run before this process took it up."""

    def _smallest(self) -> int:
        """Weights of the smallest size that can be reached."""
        smallest = weights_at(self.config.sizes[-1], self.total)
        if smallest < 1:
            raise UserError(f"a size of {self.config.sizes[-1]:g} % leaves no weight")
        if self.config.method != "layer-drop":
            return smallest
        least = weights_by_layers(self.network, self.masks.masks)[0]
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

    @cached_property
    def steps(self) -> int:
        """Updates of the whole run: round 0 and one round a removal."""
        return len(self.left) * self.config.updates

    @property
    def alive(self) -> int:
        """Prunable weights that are left."""
        return self.masks.alive()

    @property
    def must_remove(self) -> bool:
        """Whether the next update is the first of a round whose weights are still there."""
        return self.step // self.config.updates > self.round

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
        with ExitStack() as stack:
            if (
                self.device.type == "cpu"
            ):  # as in train.student.fit: the fused one is slow backwards there
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.bf16:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if isinstance(self.network, TeacherNetwork):
                mos_B: Tensor = self.network(waves_BT, lengths_B)
            else:
                mos_B = self.network(waves_BT)
        return mos_B.float()

    def gradients(self, batch: Batch) -> Tensor:
        """Forward and backward; the loss (a scalar tensor, MOS squared), the batch's mean."""
        self.training_mode()
        torch.manual_seed(self._dropout_seed())  # so that a continued run drops the same
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(*(part.split(self.config.micro_batch) for part in batch), strict=True)
        losses = []
        for pcm_BT, mos_B, lengths_B in parts:
            waves_BT = to_waves(pcm_BT, self.device)
            errors_B = self.predict(waves_BT, lengths_B) - mos_B.to(self.device, non_blocking=True)
            loss = errors_B.square().sum() / len(batch.mos_B)
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _dropout_seed(self) -> int:
        sequence = np.random.SeedSequence([self.config.seed, STREAM_DROPOUT, self.step])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(2))

    def update(self, batch: Batch) -> Tensor:
        """One update: gradients, scores, the optimiser's step; returns the loss."""
        loss = self.gradients(batch)
        if self.scores:
            self.scores.gather(self.network)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss)
        return loss

    def remove(self) -> None:
        """Begin a round: remove what goes in it."""
        self.round += 1
        self.select(self.left[self.round])
        self.hold()

    def select(self, target: int) -> None:
        """Clear masks so that ``target`` weights are left, or a few less (see the methods)."""
        if self.scores:
            remove_smallest(self.scores.averages, self.masks.masks, self.alive - target)
            self.scores.forget(self.masks)
        elif self.config.method == "magnitude":
            remove_by_magnitude(self.network, self.masks, target)
        else:
            by_layers = weights_by_layers(self.network, self.masks.masks)
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

    @torch.no_grad()
    def validate(self, held: Held) -> dict[str, float | None]:
        """Loss, PCC, Spearman and RMSE on the clips that validate."""
        self.network.eval()
        truth: list[float] = []
        predicted: list[float] = []
        for batch in held.batches(self.config.micro_batch):
            waves_BT = to_waves(batch.pcm_BT, self.device)
            predicted += self.predict(waves_BT, batch.lengths_B).tolist()
            truth += batch.mos_B.tolist()
        if not np.isfinite(predicted).all():
            raise UserError(f"predictions are not finite at step {self.step}: lower --lr")
        found = agreement(truth, predicted)
        loss = None if found.rmse is None else found.rmse**2
        return {"loss": loss, "pcc": found.pcc, "spearman": found.spearman, "rmse": found.rmse}

    def checkpoint(self) -> dict[str, Any]:
        """All state, as tensors and plain values."""
        layers = None
        if self.config.method == "layer-drop":
            layers = len(weights_by_layers(self.network, self.masks.masks))
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "round": self.round,
            "layers": layers,
            "masks": self.masks.state_dict(),
            "scores": self.scores.averages if self.scores else {},
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows,
            "losses": [float(loss) for loss in self.losses],
        }

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; ``ValueError`` naming the field that is not the same."""
        content = load_checkpoint(path)
        require_same(path.parent, content.get("config", {}), self.config.model_dump(mode="json"))
        if content["layers"] is not None:
            self.keep_layers(content["layers"])
        self.masks = Masks.from_state_dict(content["masks"]).to(self.device)
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scores:
            self.scores.load(content["scores"])
        self.step, self.round = content["step"], content["round"]
        self.rows, self.seconds = content["rows"], content["seconds"]
        self.losses = [torch.tensor(loss, device=self.device) for loss in content["losses"]]
        self.hold()


# --- data -----------------------------------------------------------------------------------------


@dataclass
class Held:
    """The clips that validate: rated ones (the middle 7.68 s of each), or samples of shards."""

    samples: ShardSamples
    rated: Sequence[RatedClip]
    _kept: dict[int, tuple[Pcm, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rated) or len(self.samples)

    def batches(self, size: int) -> Iterator[Batch]:
        """All clips in order, in batches of at most ``size``."""
        for start in range(0, len(self), size):
            read = [self._read(n) for n in range(start, min(start + size, len(self)))]
            pcm_BT = torch.from_numpy(np.stack([clip.pcm for clip in read]))
            yield batch_of(pcm_BT, [clip.mos for clip in read], [clip.length for clip in read])

    def _read(self, number: int) -> _Clip:
        if not self.rated:
            pcm_T, mos = self.samples.read(number)
            return _Clip(pcm_T, mos, len(pcm_T))
        clip = self.rated[number]
        if number not in self._kept:
            self._kept[number] = rated_pcm(clip, 0.5)
        pcm_T, length = self._kept[number]
        return _Clip(pcm_T, clip.mos, length)


class _Clip(NamedTuple):
    pcm: Pcm
    mos: float
    length: int


def open_data(args: argparse.Namespace, calibration: Calibration | None) -> Sources:
    """What to train and to validate on.

    Ratings are mapped to the scale of a bias-aware teacher. A run validates on
    ``--rated-validation``, else on ``--validation`` shards, else on the recipe's validation split
    beside ``--shards``, without shards on held-out conditions of ``--rated``. ``ValueError`` naming
    what is missing or in both.
    """
    rated = _clips(args.rated, args.rated_set, calibration)
    held = _clips(args.rated_validation, args.rated_validation_set, calibration)
    require_once(rated)
    if not rated and args.shards is None:
        raise UserError("nothing to fine-tune on: give --rated labels.csv, --shards DIR or both")
    if held and args.validation:
        raise UserError("give one of --validation and --rated-validation")
    if args.shards is not None and held:
        info, shards = read_dataset_info(args.shards), list_shards(args.shards)
        sources = Sources(info, shards, [], rated, "", held)
    elif args.shards is not None:
        on = open_sources(args.shards, args.validation)
        sources = Sources(on.info, on.shards, on.validation, rated, on.validation_hash)
    elif args.validation is not None:
        of_shards = read_dataset_info(args.validation).recipe_hash
        sources = Sources(LABELLED_ONLY, [], list_shards(args.validation), rated, of_shards)
    else:
        if not held:
            rated, held = held_apart(rated, 0, args.rated_hold_out)
        sources = Sources(LABELLED_ONLY, [], [], rated, "", held)
    require_apart(rated, held)
    return sources


def _clips(
    table: Path | None, names: Sequence[str] | None, calibration: Calibration | None
) -> list[RatedClip]:
    return on_labels_scale(chosen(table, names), calibration) if table else []


def make_config(args: argparse.Namespace, subject: Subject, sources: Sources) -> PruneConfig:
    """The settings and what they are applied to. ``ValueError`` naming what is out of range."""
    is_student = isinstance(subject.network, Student)
    given = set(PruneConfig.model_fields) & set(vars(args)) - {"model"}
    values = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    share = args.rated_share if args.rated_share is not None else RATED_SHARE
    if not sources.rated or sources.labelled_only:
        share = 1.0 if sources.labelled_only else 0.0
    held = sources.rated_validation
    return checked(
        PruneConfig,
        values
        | {
            "model": subject.name,
            "model_sha256": subject.sha256,
            "what": args.what or ("all" if is_student else "encoder"),
            "micro_batch": min(args.micro_batch or args.batch, args.batch),
            "train_head": is_student or args.train_head,
            "rated_share": share,
            "recipe_hash": sources.info.recipe_hash,
            "validation_hash": digest_of(held) if held else sources.validation_hash,
            "rated_hash": digest_of(sources.rated),
            "samples": sum(shard.samples for shard in sources.shards),
            "rated_clips": len(sources.rated),
            "validation_samples": len(held) or sum(s.samples for s in sources.validation),
        },
        "options",
    )


# --- the run --------------------------------------------------------------------------------------


def prune(
    config: PruneConfig,
    subject: Subject,
    sources: Sources,
    out: Path,
    host: Host | None = None,
) -> None:
    """Prune, or continue the run in ``out``, until all sizes are there.

    Ctrl-C (and SIGTERM, where it raises too) comes out when ``last.pt`` is written, and the same
    call continues; so it does after a kill at any point, and on a CPU to the same masks and
    weights, bit for bit. ``ValueError`` if ``out`` holds a run with another configuration or
    another command writes there.
    """
    host = host or Host()
    keep_freed_memory()
    with run_folder(out):
        pruner = Pruner(subject, config)
        if (out / "last.pt").is_file():
            pruner.restore(out / "last.pt")
        else:
            require_heard([*sources.rated, *sources.rated_validation])
        if host.progress:
            print(_about(pruner), flush=True)
        run = _Run(pruner, sources, out, host)
        try:
            with worker_deaths_named():
                run.work()
        finally:
            run.close()


class _Run:
    """A run folder that is being pruned in: its data, its log, its checkpoints."""

    def __init__(self, pruner: Pruner, sources: Sources, out: Path, host: Host) -> None:
        self.pruner, self.out, self.host = pruner, out, host
        config = pruner.config
        train_samples, _ = sources.samples(host.cache_gb)
        self.held = Held(ShardSamples(sources.validation), sources.rated_validation)
        counts = tuple(shard.samples for shard in sources.shards)
        order = Order(
            counts, len(sources.rated), config.seed, config.batch, config.rated_share, config.buffer
        )
        self.batches = Batches(train_samples, order, sources.rated)
        self.began, self.saved = time.monotonic(), pruner.step
        about = config.model_dump(mode="json")
        write_text(out / "config.json", json.dumps(about, indent=2) + "\n")
        # Of a round whose end is still to be done the log may have a line already.
        self.log = RunLog(out, pruner.step - self._ends_round(), host.logger, about)
        self.told: dict[str, float | None] = pruner.rows[-1] if pruner.rows else {}
        self.bar = progress_bar(
            total=pruner.steps,
            initial=pruner.step,
            unit="update",
            desc=f"prune {config.model} ({config.method})",
            disable=not host.progress,
        )

    def work(self) -> None:
        """All that is left to do; after a signal ``last.pt`` holds the updates that were done."""
        pruner, first = self.pruner, self.pruner.step
        pin = pruner.device.type == "cuda"
        with closing(loader(self.batches, first, pruner.steps, self.host.workers, pin)) as feed:
            try:
                self._work(feed)
            except KeyboardInterrupt:
                if pruner.step > first:
                    with signals_wait():
                        self._save()
                raise
        self._write_results()

    def _work(self, feed: Iterator[Batch]) -> None:
        pruner, config = self.pruner, self.pruner.config
        if not pruner.rows:
            self._row(None, pruner.validate(self.held))
        if self._ends_round():  # a signal came first
            self._end_round()
            self._save()
        while pruner.step < pruner.steps:
            batch = next(feed)
            with signals_wait():
                if pruner.must_remove:
                    pruner.remove()
                pruner.update(batch)
                self.bar.update()
            if pruner.step % config.updates == 0:
                self._end_round()
            elif pruner.step - self.saved >= self.host.checkpoint_every:
                with signals_wait():
                    self._save()

    def close(self) -> None:
        """Flush the log, end the bar."""
        self.bar.close()
        self.log.close()

    def _ends_round(self) -> bool:
        """Whether a round's updates are done, and its end is not."""
        return bool(self.pruner.losses) and self.pruner.step % self.pruner.config.updates == 0

    def _end_round(self) -> None:
        """Log; validate where it is due; write the sizes that are reached, and ``last.pt``."""
        pruner, config = self.pruner, self.pruner.config
        loss = float(torch.stack(pruner.losses).mean())
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} in round {pruner.round}: lower --lr")
        due, last = self._sizes_due(), pruner.step == pruner.steps
        validates = bool(due) or last or pruner.round % config.validate_every == 0
        metrics = pruner.validate(self.held) if validates else {}  # a signal may end it
        with signals_wait():
            self._keep_round(loss, due, metrics)
        self._tell(loss)

    def _keep_round(
        self, loss: float, due: list[float], metrics: Mapping[str, float | None]
    ) -> None:
        pruner = self.pruner
        pruner.losses = []
        values: dict[str, float | None] = {"round": pruner.round, "loss": loss}
        values["left"] = pruner.alive / pruner.total
        if metrics:
            values |= {f"validation_{name}": value for name, value in metrics.items()}
            self.told = dict(metrics)
        for size in due:
            self._reach(size, metrics)
        # The log first: a run that is continued from here drops what was logged after it.
        self.log.write(pruner.step, values)
        waited = pruner.step - self.saved >= self.host.checkpoint_every
        if due or pruner.step == pruner.steps or waited:
            self._save()

    def _sizes_due(self) -> list[float]:
        """Sizes that the schedule and the network have come down to, and that have no row yet.

        The schedule too: dropping layers is ahead of it, and is judged after as many updates.
        """
        pruner = self.pruner
        have = {row["size"] for row in pruner.rows}
        sizes, left = (100.0, *pruner.config.sizes), max(pruner.alive, pruner.left[pruner.round])
        reached = [size for size in sizes if left <= weights_at(size, pruner.total)]
        return [size for size in dict.fromkeys(reached) if size not in have]

    def _reach(self, size: float, metrics: Mapping[str, float | None]) -> None:
        """A row of the results, and the checkpoint if it was asked for."""
        pruner = self.pruner
        row = self._row(size, metrics)
        if size in pruner.config.sizes:
            about = {
                **pruner.subject.describe(),
                "parameters": row["parameters_left"],
                # Without the seconds, so that the same run writes the same bytes.
                "metrics": {name: value for name, value in row.items() if name != "seconds"},
                "prune": pruner.config.model_dump(mode="json"),
            }
            folder = self.out / f"pruned-{size:g}"
            save_pruned(folder, pruner.network.state_dict(), pruner.masks, about)
        if not self.bar.disable:
            self.bar.write(_line(row), file=sys.stderr)

    def _row(self, size: float | None, metrics: Mapping[str, float | None]) -> dict[str, Any]:
        pruner, alive = self.pruner, self.pruner.alive
        parameters = sum(p.numel() for p in pruner.network.parameters())
        row = {
            "size": size,
            "left": alive / pruner.total,
            "weights_left": alive,
            "parameters_left": parameters - (pruner.masks.total() - alive),
            "round": pruner.round,
            "updates": pruner.step,
            **metrics,
            "seconds": round(self._seconds(), 1),
        }
        pruner.rows.append(row)
        return row

    def _seconds(self) -> float:
        return self.pruner.seconds + time.monotonic() - self.began

    def _save(self) -> None:
        content = self.pruner.checkpoint() | {"seconds": self._seconds()}
        save_checkpoint(self.out / "last.pt", content)
        self.saved = self.pruner.step
        self._write_results()

    def _write_results(self) -> None:
        rows = self.pruner.rows
        content = {"config": self.pruner.config.model_dump(mode="json"), "rows": rows}
        write_text(self.out / "results.json", json.dumps(content, indent=2) + "\n")
        write_text(self.out / "results.csv", csv_text(rows))

    def _tell(self, loss: float) -> None:
        pruner, rmse = self.pruner, self.told.get("rmse")
        self.bar.set_postfix_str(
            f"round {pruner.round}/{len(pruner.left) - 1}, {pruner.alive / pruner.total:.1%} left, "
            f"loss {loss:.3f}, validation RMSE {'-' if rmse is None else format(rmse, '.3f')}"
        )


HEADING = (
    f"{'size %':>7} {'left %':>7} {'weights':>12} {'parameters':>12} {'round':>6} {'updates':>8} "
    f"{'PCC':>6} {'RMSE':>6} {'seconds':>9}"
)


def _line(row: Mapping[str, Any]) -> str:
    pcc, rmse = ("-" if row[name] is None else f"{row[name]:.3f}" for name in ("pcc", "rmse"))
    size = "loaded" if row["size"] is None else f"{row['size']:g}"
    return (
        f"{size:>7} {100 * row['left']:7.2f} {row['weights_left']:12,} "
        f"{row['parameters_left']:12,} {row['round']:6} {row['updates']:8} {pcc:>6} {rmse:>6} "
        f"{row['seconds']:9.0f}"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results of a run as text: the model as it was loaded, then every size."""
    return "\n".join([HEADING, *map(_line, rows)])


# --- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train prune``."""
    add = parser.add_argument
    add("--model", default="v7", help="v7, a run, or an XLS-R teacher (default: v7)")
    add("--method", choices=METHODS, default="importance")
    add("--what", help="of a student: all (default) or convolutions; of a teacher: encoder")
    add("--sizes", nargs="+", type=float, default=list(SIZES), help="percent to keep models of")
    add("--rate", type=float, default=0.005, help="removed a round (default %(default)s)")
    add(
        *("--rate-of",),
        choices=("living", "start"),
        default="living",
        help="the rate is a share of the weights that are left, or of all at the start",
    )
    add("--updates", type=int, default=30, help="of fine-tuning a round (default %(default)s)")
    add("--factor", type=float, default=FACTOR, help="of the scores' recursive average")
    add("--lr", type=float, default=2e-5, help="AdamW's (default %(default)s)")
    add("--weight-decay", type=float, default=0.01)
    add("--batch", type=int, default=20, help="clips (default %(default)s)")
    add("--micro-batch", type=int, help="clips at a time, where memory is short (default: all)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="fp32")
    add("--batch-norm", choices=("train", "frozen"), default="train", help="their statistics")
    add("--train-head", action="store_true", help="fine-tune a teacher's head too (never pruned)")
    _add_data_arguments(parser)
    add("--validate-every", type=int, default=20, help="rounds; besides at every size")
    add("--out", type=path_here, required=True, help="run folder; continued if it exists")
    add("--checkpoint-every", type=int, default=30, help="updates between two last.pt")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=1, help="decoding processes (0: none)")
    add("--threads", type=int, help="of the training process (default: all cores)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--logger", choices=sorted(LOGGERS), default="tensorboard")
    add("--cache-gb", type=float, default=4.0, help="decoded samples kept in memory")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rated", type=path_here, help="CSV of rated clips to fine-tune on")
    add("--rated-set", nargs="+", metavar="NAME", help="take these datasets of it only")
    add("--shards", type=path_here, help="pseudo-labelled shards to fine-tune on")
    add("--rated-share", type=float, help=f"with both: of rated clips (default {RATED_SHARE})")
    add("--buffer", type=int, default=4096, help="places a sample may move in the shuffle")
    add("--validation", type=path_here, help="shards to validate on")
    add("--rated-validation", type=path_here, help="CSV of rated clips to validate on")
    add("--rated-validation-set", nargs="+", metavar="NAME", help="these datasets of it only")
    add(
        *("--rated-hold-out",),
        type=float,
        default=HOLD_OUT,
        help="without any of these: share of the conditions of --rated (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """``python -m train prune``; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.checkpoint_every < 1:
        raise UserError(f"--checkpoint-every {args.checkpoint_every}: must be at least 1")
    subject = load_subject(args.model, args.device)
    sources = open_data(args, subject.calibration)
    config = make_config(args, subject, sources)
    host = Host(
        device=args.device,
        workers=args.workers,
        cache_gb=args.cache_gb,
        checkpoint_every=args.checkpoint_every,
        logger=args.logger,
    )
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
        f"({config.what}); {config.method}, {rounds} rounds of {config.updates} updates of "
        f"{config.batch} down to {pruner.left[-1]:,}; {config.samples} samples and "
        f"{config.rated_clips} rated clips, {config.validation_samples} for validation"
    )
