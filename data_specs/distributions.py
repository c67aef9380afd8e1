"""What a recipe may say about a drawn value."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from data_specs.io.errors import UserError
from data_specs.strict import Strict


class Constant(Strict):
    """Always the same value."""

    distribution: Literal["constant"] = "constant"
    value: float


class Uniform(Strict):
    """Uniform in [low, high)."""

    distribution: Literal["uniform"] = "uniform"
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if self.low > self.high:
            raise UserError(f"low {self.low} is above high {self.high}")
        return self


class LogUniform(Uniform):
    """Uniform on a logarithmic scale in [low, high)."""

    distribution: Literal["log_uniform"] = "log_uniform"  # type: ignore[assignment]

    @model_validator(mode="after")
    def _positive(self) -> LogUniform:
        if self.low <= 0:
            raise UserError(f"low must be above 0, not {self.low}")
        return self


class Normal(Strict):
    """Gaussian with a mean and either a variance or a standard deviation."""

    distribution: Literal["normal"] = "normal"
    mean: float
    variance: Annotated[float, Field(ge=0)] | None = None
    std: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_spread(self) -> Normal:
        if (self.variance is None) == (self.std is None):
            raise UserError("give either variance or std, not both and not neither")
        return self

    @property
    def sigma(self) -> float:
        """Standard deviation."""
        return self.std if self.std is not None else math.sqrt(self.variance or 0.0)


class Choice(Strict):
    """One of a list of values, equally likely unless ``weights`` says otherwise."""

    distribution: Literal["choice"] = "choice"
    values: Annotated[tuple[float, ...], Field(min_length=1)]
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @model_validator(mode="after")
    def _one_weight_each(self) -> Choice:
        if self.weights is not None and len(self.weights) != len(self.values):
            raise UserError(f"{len(self.values)} values but {len(self.weights)} weights")
        return self


def _number_is_constant(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"distribution": "constant", "value": value}
    return value


AnyDistribution = Constant | Uniform | LogUniform | Normal | Choice
Distribution = Annotated[
    Annotated[AnyDistribution, Field(discriminator="distribution")],
    BeforeValidator(_number_is_constant),
]
"""A number (constant), or a mapping with the key ``distribution``."""


def values(distribution: AnyDistribution) -> tuple[float, ...]:
    """All that a constant or a choice can draw, lowest first; of any other nothing."""
    if isinstance(distribution, Constant):
        return (distribution.value,)
    return tuple(sorted(set(distribution.values))) if isinstance(distribution, Choice) else ()


def support(distribution: AnyDistribution) -> tuple[float, float]:
    """Lowest and highest value that can be drawn."""
    if isinstance(distribution, Constant):
        return distribution.value, distribution.value
    if isinstance(distribution, Choice):
        return min(distribution.values), max(distribution.values)
    if isinstance(distribution, Normal):
        return -math.inf, math.inf
    return distribution.low, distribution.high


def within(low: float, high: float, unit: str = "") -> AfterValidator:
    """Check that all a distribution can draw lies in [low, high]."""

    def check(distribution: AnyDistribution) -> AnyDistribution:
        lowest, highest = support(distribution)
        if lowest < low or highest > high:
            drawn = f"can draw {lowest:g} to {highest:g} {unit}"
            raise UserError(f"{drawn}; must stay within {low:g} to {high:g}")
        return distribution

    return AfterValidator(check)


def require_among(distribution: AnyDistribution, allowed: tuple[float, ...]) -> AnyDistribution:
    """``UserError`` where a distribution draws anything but some values."""
    drawn = values(distribution)
    if not drawn or not set(drawn) <= set(allowed):
        known = ", ".join(f"{value:g}" for value in allowed)
        raise UserError(f"must be a constant or a choice among {known}")
    return distribution


def one_of(*allowed: float) -> AfterValidator:
    """Check that a distribution draws only from a set of values."""
    return AfterValidator(partial(require_among, allowed=allowed))
