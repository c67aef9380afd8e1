"""A finetuned model's folder: ``encoder.*`` as ``load_encoder`` reads it, and ``tasks.*``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from data_specs.io.errors import UserError
from train.files import write_model
from train.finetune.tasks.table import TASKS
from train.finetune.tasks.task import SpeechTask
from train.models.encoders.interface import SpeechEncoder
from train.models.encoders.loading import load_encoder, save_encoder
from train.models.tensors import read_about, read_weights

NAME = "tasks"


def save_model(
    folder: Path,
    encoder: SpeechEncoder,
    tasks: Mapping[str, SpeechTask],
    more: Mapping[str, Any] = {},
) -> None:
    """Write an encoder and its heads; ``more`` goes into ``tasks.json``, which is written last."""
    save_encoder(folder, encoder)
    about = {"tasks": {name: task.about for name, task in tasks.items()}, **more}
    write_model(folder / f"{NAME}.safetensors", nn.ModuleDict(tasks).state_dict(), about)


def load_model(folder: Path) -> tuple[SpeechEncoder, dict[str, SpeechTask], dict[str, Any]]:
    """The encoder, its heads and ``tasks.json``, in eval mode.

    ``UserError`` naming what is missing, damaged or does not fit.
    """
    path = folder / f"{NAME}.safetensors"
    about = read_about(path.with_suffix(".json"))
    try:
        tasks = {name: TASKS[name](**one) for name, one in about["tasks"].items()}
        nn.ModuleDict(tasks).load_state_dict(read_weights(path, about))
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: does not fit its description: {error}") from error
    return load_encoder(folder), {name: task.eval() for name, task in tasks.items()}, about
