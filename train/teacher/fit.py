"""The teacher's head, trained on rated clips. ``python -m train teacher``.

Section IV-A: the encoder is frozen, so its features are taken once
(``train.teacher.feature_cache``); the head learns to predict the mean opinion score from them.
Datasets are drawn in proportion to their clips, counted up to a cap. Bias-aware (the default): the
logit of a clip goes through a scale and a shift of its dataset before the sigmoid, and both are
learned; a universal scale and shift are found after training (``train.teacher.calibrate``).

A run folder holds ``last.pt`` (all state; the same command continues from it), ``best.pt``, the
logs, and at the end ``head.safetensors``, ``head.json`` and ``validation.csv``: the folder is then
a teacher.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from data_specs.io.addresses import path_here
from data_specs.io.cli import signals_wait
from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of, write_text
from data_specs.io.hardware import keep_freed_memory
from data_specs.io.names import cell
from data_specs.io.progress import progress_bar
from data_specs.rated import RatedClip, read_rated
from data_specs.strict import checked, digest
from train.data.hold_out import hold_out
from train.data.sources import require_apart, require_once
from train.files import (
    load_checkpoint,
    require_same,
    run_folder,
    save_checkpoint,
    version,
    write_weights,
)
from train.loop.run_log import Meter, RunLog
from train.metrics import agreement
from train.models.front_end import load_front_end
from train.models.head import HeadConfig, build_head
from train.models.student import mos_of
from train.models.tensors import write_about
from train.teacher.calibrate import Affine, Calibration, Doubles, fit_universal
from train.teacher.feature_cache import (
    ROWS,
    About,
    Bits,
    FrameCache,
    bad_clips,
    from_bits,
    open_cache,
)

FEW_CLIPS = 300
"""Fewer, of a few conditions, say little about where a universal scale lies."""

VALIDATION_BATCH = 32

STREAM_BATCH, _, STREAM_DROPOUT = range(3)
"""Which decision a random generator is for: one stream each, so that none moves another."""

Rows = NDArray[np.int64]


class Settings(BaseModel):
    """What a user chooses; folders, threads and the device are not in it.

    The defaults are section IV-A's, and PyTorch's weight decay, because the paper gives none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    front_end: str = "xlsr-2b-l10"
    bias_aware: bool = True
    steps: Annotated[int, Field(ge=1)] = 72_000
    batch: Annotated[int, Field(ge=2)] = 12
    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    validate_every: Annotated[int, Field(ge=1)] = 3000
    cap: Annotated[int, Field(ge=1)] = 7000
    dim: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    heads: Annotated[int, Field(ge=1)] = 4
    layers: Annotated[int, Field(ge=1)] = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _divisible(self) -> Settings:
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        return self


class TeachConfig(Settings):
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
        """Dimensions of the head."""
        return HeadConfig.model_validate(self.model_dump(include=set(HeadConfig.model_fields)))


@dataclass(frozen=True)
class Host:
    """How a run uses the machine; none of it changes what is computed on one machine type."""

    device: str = "cpu"
    checkpoint_every: int = 500
    log_every: int = 50
    progress: bool = True


@dataclass(frozen=True)
class RatedFrames:
    """Rated clips with their features: N rows, of which M train and V validate.

    ``frames`` (N, L, C) holds bf16 bit patterns, in the order of ``clips``.
    """

    about: About
    frames: Bits
    clips: Sequence[RatedClip]
    train_rows: Rows
    validation_rows: Rows

    @cached_property
    def mos(self) -> NDArray[np.float32]:
        """Ratings, 1 to 5."""
        return np.array([clip.mos for clip in self.clips], np.float32)

    @cached_property
    def training_counts(self) -> dict[str, int]:
        """Training clips of every dataset, by name."""
        counts = Counter(self.clips[row].dataset for row in self.train_rows)
        return dict(sorted(counts.items()))

    @cached_property
    def validation_sets(self) -> dict[str, Rows]:
        """Places in ``validation_rows`` of every validation set, by name."""
        names = np.array([self.clips[row].dataset for row in self.validation_rows])
        return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}

    def read(self, rows_B: Rows) -> Tensor:
        """Features (B, L, C), bf16, of these rows."""
        return from_bits(self.frames[rows_B])


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, number])))


def gather(
    rated: Sequence[Path], validation: Sequence[Path], seed: int
) -> tuple[list[RatedClip], list[bool]]:
    """Clips of all CSV files, and which of them validate: those of ``validation``, or a hold-out.

    Sorted by dataset and file name, so that one cache of features serves any split of the same
    clips. ``ValueError`` for a file that both trains and validates, or a CSV that is wrong.
    """
    training = [clip for path in rated for clip in read_rated(path)]
    judging = [clip for path in validation for clip in read_rated(path)]
    require_apart(training, judging)
    require_once([*training, *judging])
    held = [False] * len(training) if judging else hold_out(training, seed)
    pairs = [*zip(training, held, strict=True), *((clip, True) for clip in judging)]
    pairs.sort(key=lambda pair: (pair[0].dataset, pair[0].path.name, str(pair[0].path)))
    return [clip for clip, _ in pairs], [validates for _, validates in pairs]


def usable(cache: FrameCache, clips: Sequence[RatedClip], held: Sequence[bool]) -> RatedFrames:
    """The clips that have features.

    ``ValueError`` if none is left to train on, or less than the two that a universal scale needs.
    """
    rows = [row for row in range(len(clips)) if row not in cache.bad]
    train = np.array([row for row in rows if not held[row]], np.int64)
    validation = np.array([row for row in rows if held[row]], np.int64)
    for what, found, least in (("train on", train, 1), ("validate on", validation, 2)):
        if len(found) < least:
            told = _told(cache, clips)
            raise UserError(
                f"{len(found)} clips to {what}, at least {least} needed{': ' if told else ''}{told}"
            )
    return RatedFrames(cache.about, cache.frames, clips, train, validation)


def make_config(settings: Settings, data: RatedFrames) -> TeachConfig:
    """The settings and what they are applied to."""
    about = data.about
    return TeachConfig(
        **(settings.model_dump() | {"front_end": about.front_end}),
        front_end_sha256=about.weights_sha256,
        precision=about.precision,
        tokens=about.tokens,
        features=about.channels,
        train_sha256=_digest(data, data.train_rows),
        validation_sha256=_digest(data, data.validation_rows),
        train_clips=len(data.train_rows),
        validation_clips=len(data.validation_rows),
    )


def _digest(data: RatedFrames, rows: Rows) -> str:
    clips = [data.clips[row] for row in rows]
    return digest([[clip.dataset, clip.path.name, clip.mos] for clip in clips])


class Batch(NamedTuple):
    """What one update learns from: features (B, L, C) in bf16, ratings (B,), dataset numbers (B,).

    The numbers count the training datasets by name.
    """

    frames: Tensor
    mos: Tensor
    datasets: Tensor


class Draws:
    """Which clips make a batch: a pure function of (seed, step).

    A dataset is drawn with a probability in proportion to its clips, counted up to ``cap``
    (section IV-A: 7000), then one of its clips uniformly.
    """

    def __init__(self, data: RatedFrames, cap: int, batch: int, seed: int) -> None:
        self._data, self._batch, self._seed = data, batch, seed
        names_M = np.array([data.clips[row].dataset for row in data.train_rows])
        self._members = [data.train_rows[names_M == name] for name in data.training_counts]
        weights_D = np.minimum([len(rows) for rows in self._members], cap)
        self.probabilities_D: Doubles = weights_D / weights_D.sum()

    def rows(self, step: int) -> tuple[Rows, Rows]:
        """(rows (B,), dataset numbers (B,)) of the batch of update ``step`` (0-based)."""
        draw = _generator(self._seed, STREAM_BATCH, step)
        datasets_B = draw.choice(len(self._members), self._batch, p=self.probabilities_D)
        places_B = draw.random(self._batch)
        rows = [
            self._members[dataset][int(place * len(self._members[dataset]))]
            for dataset, place in zip(datasets_B, places_B, strict=True)
        ]
        return np.array(rows, np.int64), datasets_B.astype(np.int64)

    def read(self, step: int) -> Batch:
        """The batch of update ``step``."""
        rows_B, datasets_B = self.rows(step)
        mos_B = torch.from_numpy(self._data.mos[rows_B])
        return Batch(self._data.read(rows_B), mos_B, torch.from_numpy(datasets_B))


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


class HeadTrainer:
    """A head, its datasets' scales and their optimiser: everything that a checkpoint holds."""

    def __init__(
        self, config: TeachConfig, training_counts: Mapping[str, int], device: str = "cpu"
    ) -> None:
        self.config, self.counts = config, dict(training_counts)
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
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.due = False
        """Whether the validation of this step is still to be done."""

    def update(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the loss (a scalar tensor, MOS squared)."""
        frames_BLC = head_input(batch.frames, self.device)
        mos_B, datasets_B = batch.mos.to(self.device), batch.datasets.to(self.device)
        if self.config.dropout:  # seeded anew, so that a continued run drops the same
            torch.manual_seed(
                int(_generator(self.config.seed, STREAM_DROPOUT, self.step).integers(1 << 62))
            )
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

    def checkpoint(self) -> dict[str, Any]:
        """All state, as tensors and plain values."""
        return {
            "config": self.config.model_dump(),
            "step": self.step,
            "head": self.head.state_dict(),
            "scales": self.scales.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "due": self.due,
        }

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; ``ValueError`` naming the field that is not the same."""
        content = load_checkpoint(path)
        require_same(path.parent, content.get("config", {}), self.config.model_dump())
        self.load_weights(content)
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.best = content["step"], content["best"]
        self.due = content.get("due", False)

    def load_weights(self, content: Mapping[str, Any]) -> None:
        """Head and scales of a checkpoint."""
        self.head.load_state_dict(content["head"])
        self.scales.load_state_dict(content["scales"])

    def keep_if_best(self, metrics: dict[str, float | None], out: Path) -> bool:
        """Write ``best.pt`` if the validation loss is the lowest so far."""
        loss, lowest = metrics["loss"], self.best["loss"] if self.best else math.inf
        if loss is None or not loss < lowest:
            return False
        self.best = {"step": self.step, **metrics}
        content = self.checkpoint()
        save_checkpoint(
            out / "best.pt", {name: content[name] for name in ("config", "head", "scales", "best")}
        )
        return True


def head_input(frames_BLC: Tensor, device: torch.device) -> Tensor:
    """Features in bf16 as float32 on a device, (B, L, C), in memory (B, C, L).

    The head's first batch norms go along the frames of a channel: on a CPU they are faster so, by
    more than this costs.
    """
    frames_BCL = frames_BLC.to(device).transpose(1, 2)
    frames_BCL = frames_BCL.to(torch.float32, memory_format=torch.contiguous_format)
    return frames_BCL.transpose(1, 2)


def teach(
    config: TeachConfig,
    data: RatedFrames,
    out: Path,
    host: Host | None = None,
) -> None:
    """Train a head, or continue the run in ``out``, until all is done.

    Ctrl-C (and SIGTERM, where it raises too) comes out when ``last.pt`` is written, and the same
    call continues; so it does after a kill at any point, and on a CPU to the same bits. Ends by
    writing ``head.safetensors``, ``head.json`` and ``validation.csv``. ``ValueError`` if ``out``
    holds a run with another configuration.
    """
    host = host or Host()
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    trainer = HeadTrainer(config, data.training_counts, host.device)
    if (out / "last.pt").is_file():
        trainer.restore(out / "last.pt")
    write_text(out / "config.json", json.dumps(config.model_dump(), indent=2) + "\n")
    log, first = RunLog(out, trainer.step, due=trainer.due), trainer.step
    try:
        _run(trainer, data, out, host, log)
    except KeyboardInterrupt:
        if trainer.step > first:
            with signals_wait():
                save_checkpoint(out / "last.pt", trainer.checkpoint())
        raise
    finally:
        log.close()
    export(trainer, data, out)


def _run(trainer: HeadTrainer, data: RatedFrames, out: Path, host: Host, log: RunLog) -> None:
    config, meter = trainer.config, Meter()
    draws = Draws(data, config.cap, config.batch, config.seed)
    bar = progress_bar(
        total=config.steps,
        initial=trainer.step,
        unit="step",
        desc=f"teacher ({config.front_end})",
        disable=not host.progress,
    )
    with bar, ThreadPoolExecutor(1) as reader:  # reads one batch ahead
        if trainer.due:
            _validate(trainer, data, out, log, bar)
        ahead = reader.submit(draws.read, trainer.step)
        while trainer.step < config.steps:
            asked = time.monotonic()
            batch = ahead.result()
            meter.waited += time.monotonic() - asked
            ahead = reader.submit(draws.read, trainer.step + 1)
            with signals_wait():
                meter.losses.append(trainer.update(batch))
                meter.samples += config.batch
                bar.update()
                _after_update(trainer, out, host, log, meter, bar)
            if trainer.due:
                _validate(trainer, data, out, log, bar)
                meter.reset()


def _after_update(
    trainer: HeadTrainer, out: Path, host: Host, log: RunLog, meter: Meter, bar: tqdm[Any]
) -> None:
    """Log and write ``last.pt``, each where it is due."""
    last = trainer.step == trainer.config.steps
    if trainer.step % host.log_every == 0 or last:
        _log_interval(trainer, meter, log, bar)
    trainer.due = trainer.step % trainer.config.validate_every == 0 or last
    if trainer.step % host.checkpoint_every == 0 and not trainer.due:
        save_checkpoint(out / "last.pt", trainer.checkpoint())


def _log_interval(trainer: HeadTrainer, meter: Meter, log: RunLog, bar: tqdm[Any]) -> None:
    values = meter.read()
    if values["loss"] is not None and not math.isfinite(values["loss"]):
        raise UserError(f"the loss is {values['loss']} at step {trainer.step}: lower --lr")
    rate, wait = values["samples_per_s"] or 0.0, values["data_wait_share"] or 0.0
    bar.set_postfix_str(f"{rate:.0f} clips/s, data wait {wait:.0%}, loss {values['loss']:.3f}")
    log.write(trainer.step, {**values, "lr": trainer.config.lr})
    meter.reset()


def _validate(
    trainer: HeadTrainer, data: RatedFrames, out: Path, log: RunLog, bar: tqdm[Any]
) -> None:
    """Validate, keep the best, and write ``last.pt``."""
    metrics = judge(trainer, data, trainer.raw_logits(data))
    with signals_wait():
        trainer.due = False
        best = trainer.keep_if_best(metrics, out)
        # The log first: a run that is continued from here drops what was logged after it.
        log.write(trainer.step, {f"validation_{name}": value for name, value in metrics.items()})
        save_checkpoint(out / "last.pt", trainer.checkpoint())
    figures = ", ".join(
        f"{name} {'-' if metrics[name] is None else format(metrics[name], '.3f')}"
        for name in ("loss", "rmse", "pcc")
    )
    if not bar.disable:
        bar.write(f"step {trainer.step}: {figures}{' (best)' if best else ''}", file=sys.stderr)


def judge(trainer: HeadTrainer, data: RatedFrames, logits_V: Doubles) -> dict[str, float | None]:
    """Errors of raw validation logits, every set under its own scale and shift.

    ``loss`` is the mean squared error over all clips (so weighted by clips), ``rmse`` its root,
    ``pcc`` the plain mean over the sets; ``pcc/NAME`` and ``rmse/NAME`` are one set's.
    """
    errors, of_sets = [], {}
    for name, places in data.validation_sets.items():
        truth = data.mos[data.validation_rows[places]]
        predicted = trainer.own(name).mos(logits_V[places])
        errors.append((predicted - truth) ** 2)
        found = agreement(truth, predicted)
        of_sets[f"pcc/{name}"], of_sets[f"rmse/{name}"] = found.pcc, found.rmse
    loss = float(np.concatenate(errors).mean())
    defined = [v for key, v in of_sets.items() if key.startswith("pcc/") and v is not None]
    pcc = float(np.mean(defined)) if defined else None
    return {"loss": loss, "rmse": math.sqrt(loss), "pcc": pcc, **of_sets}


def export(trainer: HeadTrainer, data: RatedFrames, out: Path) -> None:
    """Write ``validation.csv``, ``head.safetensors`` and ``head.json`` from the best weights.

    The weights are the raw head's: no scale is folded in. ``ValueError`` if no validation gave a
    finite loss.
    """
    if not (out / "best.pt").is_file():
        raise UserError(f"{out}: no validation gave a finite loss, so there is no best head")
    best = load_checkpoint(out / "best.pt")
    trainer.load_weights(best)
    logits_V = trainer.raw_logits(data)
    calibration, universal = None, Affine()
    if trainer.config.bias_aware:
        universal = fit_universal(logits_V, data.mos[data.validation_rows])
        calibration = Calibration(universal=universal, datasets=trainer.affines())
    write_text(out / "validation.csv", _predictions(trainer, data, logits_V, universal))
    path = out / "head.safetensors"
    weights = trainer.head.state_dict()
    write_weights(path, weights)
    config = trainer.config
    about = {
        "format": 1,
        "front_end": config.front_end,
        "front_end_sha256": config.front_end_sha256,
        "head": config.head().model_dump(),
        "calibration": calibration.model_dump() if calibration else None,
        "metrics": {
            **{name: best["best"][name] for name in ("step", "loss", "rmse", "pcc")},
            "sets": results(trainer, data, logits_V, universal),
        },
        "fit": config.model_dump(),
        "weights_sha256": sha256_of(path),
        "version": version(),
    }
    write_about(out / "head.json", about)


def results(
    trainer: HeadTrainer, data: RatedFrames, logits_V: Doubles, universal: Affine
) -> list[dict[str, Any]]:
    """Every validation set under its own and under the universal scale and shift."""
    rows = []
    for name, places in data.validation_sets.items():
        truth = data.mos[data.validation_rows[places]]
        own, all_one = (
            agreement(truth, affine.mos(logits_V[places]))
            for affine in (trainer.own(name), universal)
        )
        rows.append(
            {
                "dataset": name,
                "clips": own.clips,
                "pcc": own.pcc,
                "rmse": own.rmse,
                "pcc_universal": all_one.pcc,
                "rmse_universal": all_one.rmse,
            }
        )
    return rows


def _predictions(
    trainer: HeadTrainer, data: RatedFrames, logits_V: Doubles, universal: Affine
) -> str:
    """Every validation clip as a line of CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "path", "mos", "logit", "own", "universal"])
    for name, places in data.validation_sets.items():
        own_S, universal_S = (
            trainer.own(name).mos(logits_V[places]),
            universal.mos(logits_V[places]),
        )
        for place, own, all_one in zip(places, own_S, universal_S, strict=True):
            clip = data.clips[data.validation_rows[place]]
            writer.writerow(
                [cell(name), cell(str(clip.path)), clip.mos, logits_V[place], own, all_one]
            )
    return text.getvalue()


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
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    parser.add_argument("--front-end", default=defaults["front_end"], help="default: %(default)s")
    parser.add_argument(
        "--rated",
        type=path_here,
        action="append",
        required=True,
        help="CSV to train on; repeatable",
    )
    parser.add_argument(
        "--validation",
        type=path_here,
        action="append",
        default=[],
        help="CSV to validate on; repeatable (default: a tenth of every dataset's conditions, "
        "else systems, else clips)",
    )
    parser.add_argument(
        "--out", type=path_here, required=True, help="run folder; continued if it exists"
    )
    parser.add_argument(
        "--cache", type=path_here, help="folder of features (default: OUT/features)"
    )
    parser.add_argument(
        "--bias-aware",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a learned scale and shift for every dataset",
    )
    for name in ("steps", "batch", "validate-every", "cap", "dim", "heads", "layers", "seed"):
        default = defaults[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    for name in ("lr", "weight-decay", "dropout"):
        default = defaults[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=float, default=default, help="default: %(default)s")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps")
    parser.add_argument("--log-every", type=int, default=50, help="steps")


def run(args: argparse.Namespace) -> int:
    """``python -m train teacher``; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in Settings.model_fields}
    settings = checked(Settings, given, "options")
    for name in ("checkpoint_every", "log_every"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} {getattr(args, name)}: must be at least 1")
    clips, held = gather(args.rated, args.validation, settings.seed)
    with run_folder(args.out):
        return _teach(args, settings, clips, held)


def _teach(
    args: argparse.Namespace, settings: Settings, clips: Sequence[RatedClip], held: Sequence[bool]
) -> int:
    cache = _features(args, clips)
    data = usable(cache, clips, held)
    config = make_config(settings, data)
    print(_summary(config, data), flush=True)
    if config.bias_aware and len(data.validation_rows) < FEW_CLIPS:
        print(
            f"warning: the universal scale is fitted on {len(data.validation_rows)} validation "
            f"clips; with fewer than {FEW_CLIPS} it may be far off: give more --validation",
            file=sys.stderr,
        )
    if told := _told(cache, clips):  # now, not after the training
        print(f"left out: {told}; see {ROWS} in the folder of features", file=sys.stderr)
    teach(config, data, args.out, Host(args.device, args.checkpoint_every, args.log_every))
    print(table(json.loads((args.out / "head.json").read_text("utf-8"))["metrics"]["sets"]))
    print(f"done: {args.out / 'head.safetensors'}")
    return 0


def _features(args: argparse.Namespace, clips: Sequence[RatedClip]) -> FrameCache:
    """The clips' features; the front end is dropped when they are there: it may fill the memory."""
    front_end = load_front_end(args.front_end, args.device, args.precision)
    return open_cache(args.cache or args.out / "features", clips, front_end)


def _summary(config: TeachConfig, data: RatedFrames) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in data.training_counts.items())
    validation = ", ".join(f"{name} {len(v)}" for name, v in data.validation_sets.items())
    scales = "a scale and shift a dataset" if config.bias_aware else "no scales"
    return f"{config.front_end}, {scales}; training on {counts}; validating on {validation}"


def _told(cache: FrameCache, clips: Sequence[RatedClip], most: int = 10) -> str:
    """What was left out and why."""
    if not cache.bad:
        return ""
    lines = bad_clips(cache, clips, most)
    return "\n".join([f"{len(cache.bad)} clips that have no features:", *lines])
