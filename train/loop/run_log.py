"""The log of a training run: ``log.jsonl`` always, and a logger beside it.

``log.jsonl`` is what a resume needs: it is cut back to the step that the checkpoint holds. Fabric's
CSV logger cannot do that (it deletes the file of an earlier process), so it is not offered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from lightning_fabric.loggers import TensorBoardLogger
from torch import Tensor

from data_specs.io.files import write_text
from data_specs.io.parse import json_field, json_object

Logger = Literal["tensorboard", "none"]
"""Beside ``log.jsonl``: TensorBoard's event files in the folder ``tb`` of the run."""


class RunLog:
    """``log.jsonl`` and a logger, continued at a step: lines after it are dropped.

    With ``due``, the step's validation is still to be done: a line of it is dropped too.
    """

    def __init__(
        self, out: Path, step: int, logger: Logger = "tensorboard", due: bool = False
    ) -> None:
        self.path = out / "log.jsonl"
        kept = [line for line in _lines(self.path) if _is_kept(line, self.path, step, due)]
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._board: TensorBoardLogger | None = None
        if logger == "tensorboard":
            purge = step + 1 if step else None
            self._board = TensorBoardLogger(out, name="", version="tb", purge_step=purge)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log values at a step (steps done)."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board:
            known = {name: value for name, value in values.items() if value is not None}
            self._board.log_metrics(known, step)

    def close(self) -> None:
        if self._board:
            self._board.finalize("")


def _is_kept(line: str, path: Path, step: int, due: bool) -> bool:
    values = json_object(line, path, "remove the line")
    at: int = json_field(values, "step", int, path)
    return at <= step and not (due and at == step and "validation_loss" in values)


def _lines(path: Path) -> list[str]:
    """The whole lines of a log: a last one that was cut by a crash is left out."""
    if not path.is_file():
        return []
    return [line for line in path.read_text("utf-8").split("\n")[:-1] if line.endswith("}")]


@dataclass
class Meter:
    """Mean loss, samples a second and the share of time spent waiting for data, of an interval."""

    losses: list[Tensor] = field(default_factory=list)
    samples: int = 0
    waited: float = 0.0
    start: float = field(default_factory=time.monotonic)

    def read(self) -> dict[str, float]:
        """The interval's figures; at least one loss is needed."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        return {
            "loss": float(torch.stack(self.losses).mean()),
            "samples_per_s": self.samples / seconds,
            "data_wait_share": self.waited / seconds,
        }
