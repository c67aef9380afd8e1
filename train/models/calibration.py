"""Maps between the universal MOS scale and the scale of one rated dataset (section IV-A).

Two listening tests give the same clip different ratings. A bias-aware teacher has one raw logit z a
clip and, for every dataset, a scale and a shift of it; what it says on that dataset's scale is
``1 + 4 * sigmoid(scale * z + shift)``. One more pair makes the universal scale, on which unlabelled
clips get their labels. Going from one scale to another is therefore affine in the logit of
``(mos - 1) / 4``, and can be undone.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import expit, logit

from data_specs.io.errors import UserError
from data_specs.strict import Strict, unknown

Doubles = NDArray[np.float64]


class Affine(Strict):
    """``scale * z + shift`` of a logit; the scale is positive, so the order of clips is kept."""

    scale: Annotated[float, Field(gt=0)] = 1.0
    shift: float = 0.0

    def mos(self, logits: ArrayLike) -> Doubles:
        """Raw logits z, any shape, to MOS."""
        mapped: Doubles = 1 + 4 * expit(self.scale * np.asarray(logits, np.float64) + self.shift)
        return mapped

    def raw_logit(self, mos: ArrayLike) -> Doubles:
        """MOS, any shape, to raw logits z; 1 and 5 to minus and plus infinity.

        ``ValueError`` for a value that is not within 1 to 5.
        """
        values = np.asarray(mos, np.float64)
        wrong = values[~((values >= 1) & (values <= 5))]
        if wrong.size:
            raise UserError(f"MOS {wrong.flat[0]}: must be within 1 to 5")
        raw: Doubles = (logit((values - 1) / 4) - self.shift) / self.scale
        return raw


class Calibration(Strict):
    """The universal scale of a teacher, and the scales of the datasets that it was trained on."""

    universal: Affine = Affine()
    datasets: dict[str, Affine] = Field(default_factory=dict)

    def to_universal(self, rating: ArrayLike, dataset: str) -> Doubles:
        """A dataset's ratings, any shape, to MOS on the universal scale.

        A student learns from ratings mapped by this (section IV-B). 1 and 5 stay: they are the
        limits. ``UserError`` for values that are not within 1 to 5 and for an unknown dataset.
        """
        if dataset not in self.datasets:
            raise UserError(
                f"{unknown('dataset', dataset, self.datasets)} "
                f"(the teacher was trained on: {', '.join(sorted(self.datasets)) or 'none'})"
            )
        return self.universal.mos(self.datasets[dataset].raw_logit(rating))
