"""Published results, not measured here: the paper's Table I, of its own models and of others'.

``data_specs/table1.csv`` has a row a model and a column a test set: Pearson's correlation per clip,
as printed (Stahl and Gamper, "Distillation and Pruning for Scalable Self-Supervised
Representation-Based Speech Quality Assessment", 2025, Table I), with the means over the sets and
the models' sizes.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

from data_specs.rated import rated_sets
from data_specs.strict import HERE

FILE = HERE / "table1.csv"
MARK = "published, not measured here"
MEANS = ("weighted_mean", "unweighted_mean")


@dataclass(frozen=True)
class Published:
    """A row of Table I: PCC by set, as printed; parameters in millions."""

    model: str
    parameters_m: float
    pcc: dict[str, float | None]
    weighted: float
    unweighted: float

    @property
    def parameters(self) -> int:
        """Parameters, to the table's digits."""
        return round(self.parameters_m * 1e6)


@cache
def table1() -> tuple[tuple[Published, ...], dict[str, int]]:
    """The rows, and the number of clips of every set."""
    with FILE.open(newline="", encoding="utf-8") as file:
        first, *rows = csv.DictReader(file)
    clips = {name: int(first[name]) for name in first if name not in ("model", "params_m", *MEANS)}
    return tuple(
        Published(
            row["model"],
            float(row["params_m"]),
            {name: float(row[name]) if row[name] else None for name in clips},
            *(float(row[name]) for name in MEANS),
        )
        for row in rows
    ), clips


def published_for(dataset: str) -> list[tuple[Published, float]]:
    """What Table I says of a rated set; nothing for a set that it does not have.

    A set is known by its name in Table I or in ``data_specs/rated`` (upper and lower case alike).
    """
    rows, clips = table1()
    names = {name.lower(): name for name in clips}
    for file_name, rated in rated_sets().items():
        if rated.table1:
            names[file_name.lower()] = names[rated.name.lower()] = rated.table1
    column = names.get(dataset.lower())
    if column is None:
        return []
    return [(row, value) for row in rows if (value := row.pcc[column]) is not None]
