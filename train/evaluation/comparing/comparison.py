"""Everything that a comparison of scorers found, as its tables and its page take it."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.evaluation.comparing.judges import Judge
from train.evaluation.comparing.rows import (
    ClipScore,
    CommonClips,
    Failure,
    Pair,
    SetResult,
    Unavailable,
)


@dataclass(frozen=True)
class Comparison:
    """Everything that was found. ``rows`` are all scores, ``sets`` the clips that count."""

    judges: list[Judge]
    unavailable: list[Unavailable] = field(default_factory=list)
    rows: list[ClipScore] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    sets: list[CommonClips] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    results: list[SetResult] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def per_clip(self) -> list[SetResult]:
        """The results at the level of clips, in the order in which they were scored."""
        scored = dict.fromkeys((row.model, row.short, row.set) for row in self.rows)
        order = {key: place for place, key in enumerate(scored)}
        found = [result for result in self.results if result.level == "clip"]
        return sorted(found, key=lambda r: order[r.model, r.short, r.set])
