"""What a finetuning is asked for, and what it is applied to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from data_specs.io.errors import UserError
from data_specs.strict import Strict
from train.models.distil import DistilLoss

Hears = Literal["same", "clean"]
By = Literal["l0", "low-rank", "importance"]
Share = Annotated[float, Field(gt=0, le=1)]


class Settings(Strict):
    """What a user chooses; folders, threads and the device are not in it."""

    encoder: str = Field(
        description="log-mel, v7, conformer or a YAML file of its sizes, a folder (checkpoint of "
        "transformers, finetuned model, student's run), or org/name of the hub"
    )
    tasks: tuple[str, ...] = Field(
        min_length=1,
        description="keywords, speakers, quality, words, words-ctc, self (a conformer, without "
        "labels); NAME:2 is drawn twice as often",
    )
    start: Literal["pretrained", "random"] = Field(
        default="pretrained", description="the encoder's weights, or fresh ones of its shape"
    )
    frozen: bool = Field(default=False, description="train the tasks' heads alone")
    distil_from: str | None = Field(
        default=None, description="encoder whose states are learned, too: as --encoder, or self"
    )
    distil_weight: float = Field(default=1.0, gt=0, description="of the distillation")
    distil_loss: DistilLoss = Field(default="log-sigmoid", description="of the states' cosine")
    teacher_hears: Hears = Field(
        default="same", description="clean: the clean twins of the clips (column clean)"
    )
    keep: Share | None = Field(
        default=None, description="share of the encoder's multiply-adds that is left"
    )
    by: By = Field(default="l0", description="what is cut")
    gates_lr: float = Field(default=0.1, gt=0, description="Adam's, of the gates")
    chunk_ms: int | None = Field(
        default=None, ge=1, description="hear so much at a time: streaming"
    )
    steps: int = Field(default=2000, ge=1, description="updates")
    batch: int = Field(default=32, ge=1, description="clips an update")
    seconds: float = Field(default=7.68, gt=0, description="longest part of a clip that is heard")
    lr: float = Field(default=1e-4, gt=0, description="AdamW's learning rate for the encoder")
    head_lr: float = Field(default=1e-3, gt=0, description="for the tasks' heads")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's")
    warmup: int = Field(
        default=100, ge=0, description="updates; then the rate falls to 0 by cosine"
    )
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    validate_every: int = Field(default=250, ge=1, description="updates")
    seed: int = Field(default=0, ge=0, description="of fresh weights, order and crops")

    @field_validator("tasks")
    @classmethod
    def _spelled(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        names = [task.partition(":")[0] for task in tasks]
        if len(set(names)) < len(names):
            raise UserError(f"a task is given twice: {' '.join(tasks)}")
        return tasks

    @property
    def shares(self) -> dict[str, float]:
        """How often each task is drawn, as parts of 1."""
        weights = {}
        for task in self.tasks:
            name, _, weight = task.partition(":")
            try:
                weights[name] = float(weight or 1)
            except ValueError:
                weights[name] = 0.0
            if not 0 < weights[name] < float("inf"):
                raise UserError(f"--tasks {task}: write a task as NAME or NAME:2")
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        if self.frozen and (self.keep or self.distil_from):
            raise UserError("--frozen leaves the encoder as it is: no --keep, no --distil-from")
        return self


class FinetuneConfig(Settings):
    """Everything that decides what a run computes: a continued run must have the same."""

    encoder_sha256: str
    clips_sha256: str
