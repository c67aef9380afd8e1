"""The settings of a training run: the paper's, ours, and what a user changed."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field

from data_specs.io.errors import UserError
from data_specs.io.waves import Padding
from data_specs.strict import Strict, checked
from train.data.sources import Sources
from train.models.precision import resolve_precision
from train.models.student import StudentConfig, variant


class FitConfig(Strict):
    """Everything that decides what a run computes: a resumed run must have the same.

    Workers, threads, folders, the device and the number of processes are not in it, nor what
    "auto" means on a device: a run may go on on another.
    """

    student: str
    preset: str
    steps: int = Field(ge=1, description="training steps")
    batch: int = Field(ge=2, description="clips a step")
    lr: float = Field(gt=0, description="AdamW's learning rate")
    schedule: Literal["constant", "cosine"] = Field(description="of the learning rate")
    warmup: int = Field(ge=0, description="steps until the learning rate is reached")
    weight_decay: float = Field(ge=0, description="AdamW's")
    clip_norm: float = Field(ge=0, description="largest norm of the gradients (0: any)")
    ema: float = Field(ge=0, lt=1, description="decay of the averaged weights (0: none)")
    precision: Literal["auto", "fp32", "bf16"] = Field(description="auto: bf16 where it is fast")
    compile: bool | Literal["auto"] = Field(description="by torch.compile")
    augment: bool = Field(description="polarity and rotation")
    crops: float = Field(ge=0, le=1, description="share of clips cut to 1 s or more")
    padding: Padding = Field(description="behind short clips")
    start: str | None = None
    """SHA-256 of the weights that it starts with; None: random ones."""
    seed: int = Field(default=0, ge=0, description="of weights and order")
    rated_share: float = Field(ge=0, le=1, description="of rated clips among all")
    buffer: int = Field(default=4096, ge=1, description="places a sample may move in the shuffle")
    validate_every: int = Field(ge=1, description="steps")
    recipe_hash: str
    validation_hash: str
    rated_hash: str
    samples: int
    validation_samples: int
    rated_clips: int


PAPER: dict[str, Any] = {
    "steps": 250_000,
    "batch": 20,
    "lr": 2e-5,
    "schedule": "constant",
    "warmup": 0,
    "weight_decay": 0.01,
    "clip_norm": 0.0,
    "ema": 0.0,
    "precision": "fp32",
    "compile": False,
    "augment": False,
    "crops": 0.0,
    "padding": "zero",
    "validate_every": 5000,
    "rated_share": 0.2,
}
"""Section IV-B; PyTorch's default weight decay, because the paper gives none."""

FAST: dict[str, Any] = PAPER | {
    "steps": 5000,
    "lr": 2e-3,
    "schedule": "cosine",
    "warmup": 200,
    "clip_norm": 1.0,
    "ema": 0.999,
    "precision": "auto",
    "compile": "auto",
    "augment": True,
    "validate_every": 500,
}
"""A hundred times the paper's rate with warm-up and cosine: 5000 steps instead of 250 000. The rate
is for a head 64 wide (v2) or less."""

PRESETS = {"paper": PAPER, "fast": FAST}


def make_config(
    student: str,
    sources: Sources,
    preset: str = "paper",
    shape: StudentConfig | None = None,
    **changes: Any,
) -> FitConfig:
    """A preset with changes (those that are None are left out), for these sources.

    ``shape`` is that of a student which is no variant. ``ValueError`` naming the field that is
    unknown or out of range.
    """
    shape = shape or variant(student)
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: known are {', '.join(PRESETS)}")
    values = PRESETS[preset] | {key: value for key, value in changes.items() if value is not None}
    if preset == "fast" and changes.get("lr") is None:
        # v6 (192 wide) learns nothing at what suits v2 (64).
        values["lr"] *= min(1.0, 64 / shape.dim)
    if changes.get("padding") is None:
        values["padding"] = shape.padding  # what a student that it starts from was trained to hear
    values["rated_share"] = _rated_share(sources, values["rated_share"], changes)
    if values["crops"] and not values["augment"]:
        raise UserError("--crops is a part of --augment: give both, or neither")
    facts = {"student": student, "preset": preset, **sources.facts()}
    return checked(FitConfig, facts | values, "options")


def computed_in_bf16(config: FitConfig, device: str | torch.device) -> bool:
    """Whether a run computes in bf16 on a device: if asked for, or where the device is fast."""
    return resolve_precision(config.precision, torch.device(device)) == torch.bfloat16


def is_compiled(config: FitConfig, device: torch.device) -> bool:
    """Whether a run is compiled on a device; on a CPU that needs a C++ compiler: not by itself."""
    return device.type == "cuda" if config.compile == "auto" else config.compile


def _rated_share(sources: Sources, preset: float, changes: dict[str, Any]) -> float:
    asked = changes.get("rated_share")
    if sources.labelled_only:
        if asked not in (None, 1.0):
            raise UserError(f"--rated-share {asked}: without shards it is 1")
        return 1.0
    if not sources.rated:
        if asked:
            raise UserError("--rated-share needs rated clips: give --rated labels.csv")
        return 0.0
    return preset


def learning_rate(config: FitConfig, step: int) -> float:
    """Learning rate of update ``step`` (0-based): linear warm-up, then constant or half a cosine.

    The cosine ends at a hundredth of the peak.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
