"""What a training run tells: ``log.jsonl`` always, and a logger by name beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.parse import json_field, json_object
from data_specs.strict import unknown


class Board(Protocol):
    """A logger: numbers by name and step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of a step."""
        ...

    def close(self) -> None:
        """Flush."""
        ...


class TensorBoard:
    """Event files in ``tb`` of the run folder."""

    def __init__(self, out: Path, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tb"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, continued by an id kept in the run folder; needs ``wandb``."""

    def __init__(self, out: Path, step: int, config: Mapping[str, Any]) -> None:
        wandb = _package("wandb")
        path = out / "wandb_id"
        known = path.read_text("utf-8").strip() if path.is_file() else None
        self._run = wandb.init(
            dir=str(out), name=out.name, id=known, resume="allow", config=dict(config)
        )
        if known is None:
            write_text(path, f"{self._run.id}\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, continued by an id kept in the run folder; needs ``mlflow``."""

    def __init__(self, out: Path, step: int, config: Mapping[str, Any]) -> None:
        self._mlflow = _package("mlflow")
        path = out / "mlflow_id"
        known = path.read_text("utf-8").strip() if path.is_file() else None
        run = self._mlflow.start_run(run_id=known, run_name=None if known else out.name)
        if known is None:
            self._mlflow.log_params(dict(config))
            write_text(path, f"{run.info.run_id}\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Nothing:
    """No logger: ``log.jsonl`` alone."""

    def __init__(self, out: Path, step: int, config: Mapping[str, Any]) -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


LOGGERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Board]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "none": Nothing,
}


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--logger {name} needs a package: pip install {name}") from error


class RunLog:
    """``log.jsonl`` and a logger, continued at a step: lines after it are dropped.

    With ``due``, the step's validation is still to be done: a line of it is dropped too.

    ``ValueError`` for an unknown logger, or one whose package is missing.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        logger: str = "tensorboard",
        config: Mapping[str, Any] | None = None,
        due: bool = False,
    ) -> None:
        if logger not in LOGGERS:
            raise UserError(unknown("logger", logger, LOGGERS))
        self.path = out / "log.jsonl"
        kept = [line for line in _lines(self.path) if _is_kept(line, self.path, step, due)]
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._board = LOGGERS[logger](out, step, config or {})

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log values at a step (updates done)."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self._board.log(step, {name: value for name, value in values.items() if value is not None})

    def close(self) -> None:
        """Flush the logger."""
        self._board.close()


def _is_kept(line: str, path: Path, step: int, due: bool) -> bool:
    values = json_object(line, path, "remove the line")
    at: int = json_field(values, "step", int, path)
    return at <= step and not (due and at == step and "validation_loss" in values)


def _lines(path: Path) -> list[str]:
    """The whole lines of a log: a last one that was cut by a crash is left out."""
    if not path.is_file():
        return []
    return [line for line in path.read_text("utf-8").split("\n")[:-1] if line.endswith("}")]


class Meter:
    """Mean loss, samples a second and the share of time spent waiting for data, since ``reset``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.losses: list[Tensor] = []
        self.samples, self.waited, self.start = 0, 0.0, time.monotonic()

    def read(self) -> dict[str, float | None]:
        """The interval's figures."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        loss = float(torch.stack(self.losses).mean()) if self.losses else None
        return {
            "loss": loss,
            "samples_per_s": self.samples / seconds,
            "data_wait_share": self.waited / seconds,
        }
