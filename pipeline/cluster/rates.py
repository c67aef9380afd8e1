"""What a sample of a recipe costs, and what a whole dataset therefore takes.

Pure multiplication. Assumed: a worker is one core and makes whole shards one after the other,
waiting for its teacher; cores, GPUs and the store work at the same time and the slowest decides;
all are as fast as what was measured; nothing fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.recipe import Recipe
from data_specs.strict import Strict, digest, load

COSTS_NOTHING = {"name", "about", "seed", "allow_noncommercial", "max_dropped_share"}
"""Of a recipe, what does not change how long a sample takes."""

TAIL = 1.25
"""A job that takes so much longer than its cores' work has too few shards for its workers."""

Seconds = Annotated[float, Field(ge=0)]


class Rates(Strict):
    """Seconds of a core, and of a GPU, that an average sample takes in each stage.

    ``start_s`` is what a job takes before its first sample, ``sample_bytes`` what a sample takes in
    its shard. ``recipe_sha256`` says on which recipe all was measured; a file that was written by
    hand need not have it.
    """

    about: str = ""
    recipe: str = ""
    recipe_sha256: str = ""
    start_s: Seconds = 0.0
    core_s: dict[str, Seconds]
    gpu_s: dict[str, Seconds] = Field(default_factory=dict)
    sample_bytes: float = Field(ge=0)


@dataclass(frozen=True)
class Estimate:
    """Of a whole job; ``parts`` are the seconds of what it could be waiting for."""

    seconds: float
    bottleneck: str
    parts: Mapping[str, float]
    written_bytes: float


def predict(
    rates: Rates,
    samples: int,
    shard_samples: int,
    workers: int,
    gpus: float = 0,
    store_bytes_s: float = 0,
) -> Estimate:
    """Multiply. A store's rate of 0 is no limit. Raises ``UserError`` where a GPU is needed."""
    if rates.gpu_s and not gpus:
        raise UserError(
            "these rates are of a teacher on a GPU and the machines have none: say how many GPUs, "
            "or measure with --teacher-device cpu"
        )
    core_s, gpu_s = sum(rates.core_s.values()), sum(rates.gpu_s.values())
    rounds = math.ceil(samples / shard_samples / workers)
    busy_s = samples * (core_s + gpu_s) / workers
    longest_s = min(rounds * shard_samples, samples) * (core_s + gpu_s)
    written = samples * rates.sample_bytes
    parts = {
        "too few shards" if longest_s > TAIL * busy_s else "cores": longest_s,
        "GPUs": samples * gpu_s / gpus if gpus else 0.0,
        "store": written / store_bytes_s if store_bytes_s else 0.0,
    }
    bottleneck = max(parts, key=lambda name: parts[name])
    return Estimate(rates.start_s + parts[bottleneck], bottleneck, parts, written)


def cost_sha256(recipe: Recipe) -> str:
    """Two recipes with the same one have the same rates."""
    return digest(recipe.model_dump(mode="json", exclude=COSTS_NOTHING))


def save(rates: Rates, path: Path) -> None:
    """Write rates as YAML."""
    write_text(path, yaml.safe_dump(rates.model_dump(mode="json"), sort_keys=False))


def read(path: Path, recipe: Recipe) -> Rates:
    """Read a file's rates. Raises ``UserError`` naming the field that is wrong, or the recipe."""
    rates = load(Rates, path)
    if rates.recipe_sha256 not in ("", cost_sha256(recipe)):
        version = "another version of " if rates.recipe == recipe.name else ""
        raise UserError(
            f"--rates {path}: was measured on {version}recipe {rates.recipe!r}, this is "
            f"{recipe.name!r}: measure it (python -m pipeline estimate ... --save FILE)"
        )
    return rates
