"""What ``train prune`` left in a run folder: models of one network, smaller and smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_specs.io.errors import UserError
from data_specs.io.parse import json_object
from train.models.pruned import ABOUT_FILE


@dataclass(frozen=True)
class PrunedModel:
    """One ``pruned-P`` folder; ``parameters`` are those that are left."""

    network: str
    method: str
    percent: float
    parameters: int
    weights_sha256: str
    folder: Path

    @property
    def name(self) -> str:
        """``v7-importance-50``."""
        return f"{self.network}-{self.method}-{self.percent:g}"

    @property
    def series(self) -> str:
        """What the models of its run are called together."""
        return f"{self.network} pruned by {self.method}"


def pruned_models(runs: Sequence[Path]) -> list[PrunedModel]:
    """The models of runs of ``train prune``, largest first within a run.

    ``UserError`` naming a folder without any, or two that would have one name.
    """
    found: list[PrunedModel] = []
    for run in runs:
        models = [_read(path) for path in run.glob(f"pruned-*/{ABOUT_FILE}")]
        if not models:
            raise UserError(f"{run}: holds no pruned-P folder: give the --out of train prune")
        found += sorted(models, key=lambda model: -model.percent)
    names = [model.name for model in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two runs hold a model {min(twice)}: give one of them")
    return found


def _read(path: Path) -> PrunedModel:
    about = json_object(path.read_bytes(), path)
    try:
        return PrunedModel(
            Path(about["prune"]["model"]).name,
            about["prune"]["method"],
            float(about["metrics"]["size"]),
            int(about["parameters"]),
            about["weights_sha256"],
            path.parent,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not of train prune ({error!r})") from error
