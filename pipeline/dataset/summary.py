"""What is in a shard, counted when it is committed, so that a card of millions of samples reads
records alone and no tar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from data_specs.strict import Strict

MOS_BINS = 40
"""Scores are counted in steps of 0.1 from 1 to 5."""

UNKNOWN = "unknown"
"""The language of a recording for which the corpus names none."""


class Summary(Strict):
    """Samples by what they were made of, and their scores.

    ``corpora`` counts a sample once for each corpus that it draws from (speech, noise, room),
    ``processors`` once for each processor that it went through.
    """

    corpora: dict[str, int] = Field(default_factory=dict)
    languages: dict[str, int] = Field(default_factory=dict)
    processors: dict[str, int] = Field(default_factory=dict)
    mos: Annotated[tuple[int, ...], Field(min_length=MOS_BINS, max_length=MOS_BINS)] = (
        0,
    ) * MOS_BINS
    mos_sum: float = 0.0


def summarise(records: Iterable[Mapping[str, Any]]) -> Summary:
    """Count the samples of a shard by their records (JSON, as ``SampleRecord``)."""
    corpora: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    processors: Counter[str] = Counter()
    bins = [0] * MOS_BINS
    total = 0.0
    for record in records:
        plan = record["plan"]
        parts = [plan.get(part) or {} for part in ("speech", "noise", "room")]
        corpora.update({part["corpus"] for part in parts if part.get("corpus")})
        languages[parts[0].get("language") or UNKNOWN] += 1
        processors.update({step["kind"] for step in plan.get("steps") or ()})
        bins[mos_bin(record["mos"])] += 1
        total += record["mos"]
    return Summary(
        corpora=dict(sorted(corpora.items())),
        languages=dict(sorted(languages.items())),
        processors=dict(sorted(processors.items())),
        mos=tuple(bins),
        mos_sum=round(total, 6),
    )


def mos_bin(mos: float) -> int:
    """Which step of 0.1 a score is in; 5 itself is in the last."""
    return min(max(int((mos - 1) * 10 + 1e-9), 0), MOS_BINS - 1)
