"""Simulated rooms: what sizes, decays and positions ``python -m pipeline corpora rooms`` draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from data_specs.distributions import Distribution, support, within
from data_specs.io.errors import UserError
from data_specs.strict import Name, Strict, load_named

Side = Annotated[Distribution, within(1, 100, "m")]

MIXING_M = 10.0
"""Path beyond the direct one that image sources must cover before noise continues them."""


class RoomSpec(Strict):
    """A corpus of shoebox rooms with one source and one microphone each.

    ``wall_margin_m`` is the least distance of both from every wall. Image sources go up to
    ``max_image_order``, a diffuse tail continues them. A room counts where its decay by 60 dB comes
    out within ``rt60_tolerance`` (relative) of what was drawn; else it is drawn again, at most
    ``tries`` times.
    """

    name: Name
    about: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    width_m: Side
    depth_m: Side
    height_m: Side
    rt60_s: Annotated[Distribution, within(0.05, 10, "s")]
    distance_m: Annotated[Distribution, within(0.05, 100, "m")]
    wall_margin_m: Annotated[float, Field(ge=0.05, le=10)] = 0.3
    max_image_order: Annotated[int, Field(ge=1, le=60)] = 20
    rt60_tolerance: Annotated[float, Field(gt=0, le=1)] = 0.2
    tries: Annotated[int, Field(ge=1, le=1000)] = 50

    @model_validator(mode="after")
    def _both_have_a_place(self) -> RoomSpec:
        for name, side in self._sides().items():
            if support(side)[0] <= 2 * self.wall_margin_m:
                raise UserError(
                    f"wall_margin_m: {self.wall_margin_m:g} m on both sides leave no place "
                    f"where {name} is {support(side)[0]:g} m"
                )
        inside_m = [support(side)[1] - 2 * self.wall_margin_m for side in self._sides().values()]
        if support(self.distance_m)[0] >= math.hypot(*inside_m):
            raise UserError(
                f"distance_m: {support(self.distance_m)[0]:g} m does not fit in the largest room"
            )
        return self

    @model_validator(mode="after")
    def _images_reach_past_the_direct_sound(self) -> RoomSpec:
        shortest_m = min(support(side)[0] for side in self._sides().values())
        needed_m = support(self.distance_m)[1] + MIXING_M
        if self.max_image_order * shortest_m < needed_m:
            raise UserError(
                f"max_image_order: {self.max_image_order} is too low for distances up to "
                f"{support(self.distance_m)[1]:g} m where a side is {shortest_m:g} m; "
                f"at least {math.ceil(needed_m / shortest_m)}"
            )
        return self

    def _sides(self) -> dict[str, Distribution]:
        return {"width_m": self.width_m, "depth_m": self.depth_m, "height_m": self.height_m}


def load_rooms(path: Path | str, seed: int | None = None) -> RoomSpec:
    """Read a room spec, with another seed if given; a bare name means one of this package's."""
    spec = load_named(RoomSpec, "rooms", path)
    return spec if seed is None else spec.model_copy(update={"seed": seed})
