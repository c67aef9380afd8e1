"""What a processor is: parameters (data_specs.processors), ``draw`` (plan side), ``process``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.distributions import Choice, Constant, LogUniform, Normal, Uniform
from data_specs.io.rng import Floats, spelled_out
from data_specs.io.rng import Uniform as UniformSource
from data_specs.processors import Processor as Spec
from pipeline.audio import Wave
from pipeline.draw import sample

Waves = NDArray[np.float32]
"""(B, T), 16 kHz."""

Params = dict[str, float]
Columns = dict[str, Floats]
Draw = Callable[[Any, UniformSource, str], Columns]
Process = Callable[[Waves, Sequence[Params]], Waves]
Run = Callable[[str, Waves, Sequence[Params]], Waves]
"""``processors.run``, or the same behind a ``guard.Guard``."""


def noncommercial(licence: str) -> bool:
    """Whether an SPDX licence expression has a non-commercial part (CC-BY-NC and its kin)."""
    return "-NC" in licence.upper()


DISTRIBUTIONS = (Constant, Uniform, LogUniform, Normal, Choice)


def draw_fields(spec: Spec, uniform: UniformSource, prefix: str) -> Columns:
    """Draw every distribution of ``spec``: one column a field, one row a sample."""
    return {
        name: sample(value, uniform(f"{prefix}.{name}"))
        for name, value in spec
        if isinstance(value, DISTRIBUTIONS)
    }


def draw_pattern(spec: Spec, uniform: UniformSource, prefix: str) -> Columns:
    """Draw as ``draw_fields`` does, and the number that a random pattern is spelled out from."""
    pattern = np.floor(uniform(f"{prefix}.pattern") * 2**32)
    return draw_fields(spec, uniform, prefix) | {"pattern": pattern}


def arrives(count: int, params: Params) -> NDArray[np.bool_]:
    """Which of ``count`` packets (count,) arrive: a ``loss`` of them does not, each on its own."""
    loss = params.get("loss", 0.0)
    if not loss:
        return np.ones(count, dtype=bool)
    return spelled_out(params["pattern"]).random(count) >= loss


def each(process_one: Callable[[Wave, Params], Wave]) -> Process:
    """Process a group one wave (T,) after the other, each with its own parameters."""

    def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
        rows = [process_one(wave_T, p) for wave_T, p in zip(waves_BT, params, strict=True)]
        return np.stack(rows)

    return process


@dataclass(frozen=True)
class Processor:
    """One row of the table.

    ``process`` takes a group of waves (B, T) and their parameters and returns as many of the same
    length: finite float32, delay compensated, nothing drawn, no file touched. ``packages`` are the
    distributions whose versions its output depends on, ``weights`` finds the files whose content it
    depends on, of what ``spec`` may draw. ``licence`` is that of foreign code and weights together,
    as an SPDX expression; empty where there are none. ``libraries`` says which builds of libraries
    outside of packages its output depends on; ``require`` raises ``UserError`` where those here
    lack what a recipe asks for.
    """

    process: Process
    draw: Draw = draw_fields
    packages: tuple[str, ...] = ()
    licence: str = ""
    weights: Callable[[Any], Sequence[Path]] = lambda spec: ()
    libraries: Callable[[], dict[str, str]] = dict
    require: Callable[[Any], object] = bool
