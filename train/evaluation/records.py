"""What a comparison finds: the records of ``scores.csv``, ``results.csv`` and ``pairs.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from train.bootstrap import Doubles

SHARDS_PADDING = "none"
"""What stands in the column ``padding`` for shards: their clips are never short."""

OWN_PADDING = "own"
"""What stands there for external scorers: they pad short clips in their own way."""

Kind = Literal["rated", "shards"]
METRICS = ("pcc", "spearman", "kendall", "rmse", "rmse_mapped")


@dataclass(frozen=True)
class ClipScore:
    """One scored clip: a record of ``scores.csv``."""

    model: str
    set: str
    path_or_key: str
    truth: float
    score: float
    padding: str
    weights_sha256: str = ""
    condition: str = ""
    system: str = ""
    clip_sha256: str = ""


@dataclass(frozen=True)
class SetResult:
    """One model on one set at one level: a record of ``results.csv``.

    ``kind`` is "rated" or "shards". ``level`` is clip, condition or system: what ``points`` counts,
    while ``clips`` stay clips. Ends of 95 % intervals are over resamples of ``groups`` groups of
    the kind ``resampled``. RMSE in MOS; ``rmse_mapped`` after a monotone third-order map.
    """

    model: str
    set: str
    clips: int
    pcc: float | None
    spearman: float | None
    rmse: float | None
    padding: str
    kind: str
    reason: str | None = None
    weights_sha256: str = ""
    kendall: float | None = None
    rmse_mapped: float | None = None
    level: str = "clip"
    points: int = 0
    resampled: str = ""
    groups: int = 0
    pcc_low: float | None = None
    pcc_high: float | None = None
    spearman_low: float | None = None
    spearman_high: float | None = None
    kendall_low: float | None = None
    kendall_high: float | None = None
    rmse_low: float | None = None
    rmse_high: float | None = None
    rmse_mapped_low: float | None = None
    rmse_mapped_high: float | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Entry:
    """A model with one padding of short clips: what is compared. ``label`` names it in tables.

    ``mos_scale`` is False for scores of another unit (dB, PESQ): they have no RMSE in MOS.
    """

    label: str
    model: str
    padding: str
    weights_sha256: str
    parameters: int | None = None
    mos_scale: bool = True


@dataclass(frozen=True)
class CommonClips:
    """The clips of one set that all of its entries scored.

    ``truth`` (N,) and each entry's ``scores`` (N,) by label; ``conditions`` and ``systems`` (N,)
    are empty where the set has none for every clip.
    """

    name: str
    kind: Kind
    keys: list[str]
    truth: Doubles
    scores: Mapping[str, Doubles]
    entries: list[Entry]
    conditions: list[str] = field(default_factory=list)
    systems: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What is resampled: conditions where clips have them, else systems, else clips."""
        if self.conditions:
            return "condition"
        return "system" if self.systems else "clip"

    @property
    def groups(self) -> list[str]:
        """Every clip's group (N,)."""
        return self.conditions or self.systems or self.keys


@dataclass(frozen=True)
class Pair:
    """Two entries on the clips of one set: a record of ``pairs.csv``.

    ``difference`` is the PCC of ``one`` less that of ``other``, with its interval. ``p`` is of the
    paired bootstrap, two-sided, ``p_holm`` adjusted over the set's pairs; ``williams_p`` is of
    Williams' test, which takes clips as independent.
    """

    set: str
    one: str
    other: str
    clips: int
    resampled: str
    groups: int
    difference: float | None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    williams_t: float | None = None
    williams_p: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Failure:
    """A clip that a model could not score."""

    model: str
    set: str
    path_or_key: str
    error: str


@dataclass(frozen=True)
class Output:
    """A number that a scorer gives of a clip: ``name`` in tables, ``key`` in what it returns.

    ``mos_scale`` is False where it is not a mean opinion score from 1 to 5. ``parameters`` of a
    network that does not tell its size (ONNX) is the paper's, Table I.
    """

    name: str
    key: str
    about: str
    mos_scale: bool = True
    parameters: int | None = None


Scored = dict[str, float] | str
"""What a scorer gave for one clip: its outputs' values by name, or why there are none."""


@dataclass(frozen=True)
class Unavailable:
    """A scorer that was asked for and cannot be had here: why, and what would get it."""

    model: str
    reason: str
    command: str


@dataclass(frozen=True)
class Comparison:
    """Everything that was found. ``scores`` are all, ``sets`` the clips that count."""

    unavailable: list[Unavailable] = field(default_factory=list)
    scores: list[ClipScore] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    sets: list[CommonClips] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    results: list[SetResult] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def per_clip(self) -> list[SetResult]:
        """The results at the level of clips, in the order in which they were scored."""
        scored = dict.fromkeys((one.model, one.padding, one.set) for one in self.scores)
        order = {key: place for place, key in enumerate(scored)}
        found = [result for result in self.results if result.level == "clip"]
        return sorted(found, key=lambda r: order[r.model, r.padding, r.set])
