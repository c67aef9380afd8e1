"""The settings of a pruning run, and the data that they are applied to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from data_specs.io.errors import UserError
from data_specs.io.options import options_of
from data_specs.rated import RatedClip
from data_specs.strict import Strict, checked
from train.data.hold_out import held_apart
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
from train.loop.loop import Count, Host
from train.models.calibration import Calibration
from train.models.student import Student
from train.pruning.select import DECAY, RateOf
from train.pruning.subject import Subject

Method = Literal["importance", "magnitude", "layer-drop"]
SIZES = (90.0, 70.0, 50.0, 29.0, 15.0, 7.0)

RATED_SHARE = 0.2
"""Of rated clips, where there are shards too (section IV-B, of the students)."""

Percent = Annotated[float, Field(gt=0, le=100)]


class PruneConfig(Strict):
    """Everything that decides what a run computes: a continued run must have the same.

    Sizes are percent of the weights that may be pruned. The defaults are the paper's, and
    PyTorch's weight decay, because it gives none.
    """

    model: str = ""
    model_sha256: str = ""
    method: Method = Field(default="importance", description="what goes first")
    what: str
    sizes: tuple[Percent, ...] = Field(default=SIZES, description="percent to keep models of")
    rate: float = Field(default=0.005, gt=0, lt=1, description="share removed a round")
    rate_of: RateOf = Field(
        default="living", description="of the weights left, or of all at the start"
    )
    steps: int = Field(default=30, ge=1, description="of fine-tuning a round")
    decay: float = Field(default=DECAY, ge=0, lt=1, description="of the scores' recursive average")
    lr: float = Field(default=2e-5, gt=0, description="AdamW's learning rate")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's")
    batch: int = Field(default=20, ge=2, description="clips a step")
    micro_batch: int = Field(default=20, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = Field(default="fp32", description="of the network")
    batch_norm: Literal["train", "frozen"] = Field(default="train", description="their statistics")
    train_head: bool = Field(
        default=False, description="fine-tune a teacher's head too (never pruned)"
    )
    seed: int = Field(default=0, ge=0, description="of order and dropout")
    rated_share: float = Field(default=1.0, ge=0, le=1)
    buffer: int = Field(default=4096, ge=1, description="places a sample may move in the shuffle")
    validate_every: int = Field(default=20, ge=1, description="rounds; besides at every size")
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


class PruneHost(Host):
    """As of any run; steps take longer, and ``last.pt`` holds a whole teacher."""

    checkpoint_every: Count = Field(default=30, description="steps between two last.pt")


def open_data(args: argparse.Namespace, calibration: Calibration | None) -> Sources:
    """What to train and to validate on.

    Ratings are mapped to the scale of a bias-aware teacher. A run validates on
    ``--rated-validation``, else on ``--validation`` shards, else on the recipe's validation split
    beside ``--shards``, without shards on held-out conditions of ``--rated``. ``ValueError`` naming
    what is missing or in both.
    """
    rated = _clips(args.rated, args.rated_set, calibration)
    held = _clips(args.rated_validation, args.rated_validation_set, calibration)
    if not rated and args.shards is None:
        raise UserError("nothing to fine-tune on: give --rated labels.csv, --shards DIR or both")
    if held and args.validation:
        raise UserError("give one of --validation and --rated-validation")
    require_once(rated)
    require_apart(rated, held)
    if args.shards is not None and not held:
        return replace(open_sources(args.shards, args.validation), rated=rated)
    if args.shards is not None:
        info, shards = read_dataset_info(args.shards), list_shards(args.shards)
        return Sources(info, shards, [], rated, digest_of(held), held)
    if args.validation is not None:
        of_shards = read_dataset_info(args.validation).recipe_hash
        return Sources(LABELLED_ONLY, [], list_shards(args.validation), rated, of_shards)
    if not held:
        rated, held = held_apart(rated, 0, args.rated_hold_out)
    return Sources(LABELLED_ONLY, [], [], rated, digest_of(held), held)


def _clips(
    table: Path | None, names: Sequence[str] | None, calibration: Calibration | None
) -> list[RatedClip]:
    return on_labels_scale(chosen(table, names), calibration) if table else []


def make_config(args: argparse.Namespace, subject: Subject, sources: Sources) -> PruneConfig:
    """The settings and what they are applied to. ``ValueError`` naming what is out of range."""
    is_student = isinstance(subject.network, Student)
    share = args.rated_share if args.rated_share is not None else RATED_SHARE
    if not sources.rated or sources.labelled_only:
        share = 1.0 if sources.labelled_only else 0.0
    return checked(
        PruneConfig,
        options_of(args, PruneConfig)
        | {
            "model": subject.name,
            "model_sha256": subject.sha256,
            "what": args.what or ("all" if is_student else "encoder"),
            "micro_batch": min(args.micro_batch or args.batch, args.batch),
            "train_head": is_student or args.train_head,
            "rated_share": share,
        }
        | sources.facts(),
        "options",
    )
