"""What a task is to the grid: a file with clips, a model that judges them, and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from data_specs.io.waves import Resampler
from train.audio import Wave
from train.bootstrap import Doubles

FLOAT, INT8 = "fp32", "int8"
BITS = (FLOAT, "8", "6", "4", "3", "2")
METHODS = ("magnitude", "importance")


@dataclass(frozen=True)
class Cell:
    """One way to compress: bits a weight, percent of the weights that are zero, chosen how."""

    bits: str = FLOAT
    sparsity: float = 0.0
    by: str = ""

    @property
    def label(self) -> str:
        """In words: ``4 bits, 50 % by importance``."""
        bits = f"{self.bits} bits" if self.bits.isdigit() else self.bits
        return f"{bits}, {self.sparsity:g} % by {self.by}" if self.sparsity else bits


DENSE = Cell()
"""What all others are compared with."""


@dataclass(frozen=True)
class Clip:
    """One clip: its condition, what it is drawn with, and what is known of it."""

    path: Path
    sha256: str
    """Of its bytes and of what it is held against: its clean twin's, its text."""
    condition: str
    group: str
    mos: float | None = None
    text: str | None = None
    clean: Path | None = None


Values = Mapping[str, Doubles]
"""By name: a number of every clip (N,)."""


@dataclass(frozen=True)
class Metric:
    """``of(counts_RN, truth_N, values)`` is the metric in every resample (R,).

    ``sign`` is 1 where higher is worse, -1 where higher is better.
    """

    sign: int
    of: Callable[[Doubles, Doubles, Values], Doubles]


class Judged(ABC):
    """A model at a task, whose ``network`` the grid compresses in place, at the weights ``names``.

    The first column is what a clip's rating is held against; where clips have none, the dense
    model's is the truth.
    """

    metrics: ClassVar[Mapping[str, Metric]]
    """The first is the one that cells are ordered by."""
    columns: ClassVar[tuple[str, ...]]
    """Names of what ``judge`` gives."""

    name: str
    weights_sha256: str
    version: str
    """Of the code and of what runs it."""
    network: nn.Module
    names: Sequence[str]
    megabytes: float
    resampler: Resampler = "soft"
    """Of the clips to calibrate on."""

    @abstractmethod
    def prepare(self, clips: Sequence[Clip]) -> None:
        """Do once what needs the network as it was; called before it is compressed."""

    @abstractmethod
    def judge(self, clips: Sequence[Clip]) -> Iterator[dict[str, float]]:
        """Every clip's values, in order. ``UserError`` naming a clip that cannot be judged."""

    @abstractmethod
    def influence(self, wave_T: Wave) -> Tensor:
        """A scalar of a window (122880,) whose gradient says what the weights do."""

    @abstractmethod
    def hear(self, wave_T: Wave) -> None:
        """Do all the work for one window: what is timed."""

    @abstractmethod
    def int8(self, waves: Sequence[Wave], folder: Path) -> Judged:
        """The same model in real int8, calibrated on windows; files go into ``folder``."""
