"""What an experiment found: every model on every set, gaps, verdicts, and Figure 3.

A gap is what separates a student trained on ratings alone from the teacher; its share that is
closed by distillation is ``(distilled - labelled) / (teacher - labelled)``, in PCC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_specs.io.errors import UserError
from data_specs.rated import RatedClip
from train.data.hold_out import groups_of
from train.evaluation.bootstrap import Doubles, difference, draws, pearson, share_of_gap
from train.evaluation.records import SHARDS_SHORT, ClipScore
from train.evaluation.statistics import with_intervals
from train.pages import ranged

Kind = Literal["labelled", "distilled"]
KINDS: tuple[Kind, ...] = ("labelled", "distilled")
TITLES = {"labelled": "labelled-only", "distilled": "distilled", "teacher": "teacher"}

SMALL = 0.1
"""Share of the teacher's parameters up to which half of the gap is asked for."""

HALF = 0.5
PADDED = {"zero": ", short clips zero-padded", "repeat": ", short clips repeated", SHARDS_SHORT: ""}


@dataclass(frozen=True)
class Model:
    """A model under test: ``kind`` is labelled, distilled, teacher, or what was pruned how."""

    name: str
    variant: str | None
    kind: str
    parameters: int | None
    weights_sha256: str


@dataclass(frozen=True)
class TestSet:
    """One set, its short clips padded one way: the truth (N,) and every model's scores (N,).

    ``truth`` says whose ``ratings`` are; ``unit`` is what is resampled (condition, system or clip),
    ``groups`` (N,) each clip's. ``by_definition``: the ratings are the teacher's own.
    """

    __test__ = False  # not a test, whatever its name says to pytest

    name: str
    truth: Literal["people", "teacher"]
    short: str
    ratings: Doubles
    unit: str
    groups: list[str]
    scores: dict[str, Doubles]
    by_definition: bool = False

    @property
    def heading(self) -> str:
        """The set in words."""
        whom = "people" if self.truth == "people" else "the teacher's labels"
        return f"{self.name} ({whom}{PADDED[self.short]})"

    @property
    def size(self) -> str:
        """How many clips, and in how many conditions."""
        clips, groups = len(self.groups), len(set(self.groups))
        return f"{clips} clips" + ("" if self.unit == "clip" else f" in {groups} {self.unit}s")


@dataclass(frozen=True)
class ModelResult:
    """One model on one set: a record of ``results.csv``. 95 % intervals; MOS for ``rmse``."""

    model: str
    variant: str | None
    kind: str
    parameters: int | None
    set: str
    truth: str
    short: str
    clips: int
    resampled: str
    groups: int
    pcc: float | None
    pcc_low: float | None
    pcc_high: float | None
    spearman: float | None
    spearman_low: float | None
    spearman_high: float | None
    rmse: float | None
    rmse_low: float | None
    rmse_high: float | None
    by_definition: bool
    reason: str | None

    @property
    def pcc_text(self) -> str:
        """The correlation with its interval."""
        if self.by_definition:
            return "1 by definition"
        return ranged(self.pcc, self.pcc_low, self.pcc_high)


@dataclass(frozen=True)
class Gap:
    """One variant on one set: how far the distilled student is above its counterpart.

    ``share`` is of the gap between the labelled-only student and the teacher, in PCC.
    """

    variant: str
    parameters: int
    set: str
    truth: str
    short: str
    labelled: float | None
    distilled: float | None
    teacher: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    share: float | None
    share_low: float | None
    share_high: float | None
    reason: str | None

    @property
    def share_text(self) -> str:
        """The share of the gap with its interval, or why it has none."""
        if self.share is None:
            return self.reason or "–"
        why = f" ({self.reason})" if self.share_low is None and self.reason else ""
        return ranged(self.share, self.share_low, self.share_high) + why

    @property
    def difference_text(self) -> str:
        """The difference with its interval."""
        return ranged(self.difference, self.difference_low, self.difference_high, sign="+")


@dataclass(frozen=True)
class Verdict:
    """A question of the experiment on one set; ``answer`` is None where there is none."""

    set: str
    short: str
    answer: bool | None
    text: str


@dataclass(frozen=True)
class Outcome:
    """Everything that was found."""

    models: list[Model]
    results: list[ModelResult]
    gaps: list[Gap]
    verdicts: list[Verdict]

    @property
    def teacher(self) -> Model:
        """The model that the students are measured by."""
        return next(model for model in self.models if model.kind == "teacher")

    @property
    def kinds(self) -> list[str]:
        """The lines of Figure 3: distilled, labelled-only, and one a pruned network and method."""
        kinds = dict.fromkeys(model.kind for model in self.models)
        return ["distilled", "labelled", *(kind for kind in kinds if kind not in TITLES)]

    def results_on(self, test: TestSet) -> list[ModelResult]:
        """Every model's result on one set."""
        return [one for one in self.results if (one.set, one.short) == (test.name, test.short)]

    def gaps_on(self, test: TestSet) -> list[Gap]:
        """Every variant's gap on one set."""
        return [one for one in self.gaps if (one.set, one.short) == (test.name, test.short)]


# --- the sets -------------------------------------------------------------------------------------


def test_sets(
    scores: Sequence[ClipScore], clips: Sequence[RatedClip], models: Sequence[Model]
) -> list[TestSet]:
    """The sets in order of appearance. ``ValueError`` if a model's scores are not all there."""
    tables: dict[tuple[str, str], dict[str, dict[str, ClipScore]]] = {}
    for row in scores:
        table = tables.setdefault((row.set, row.short), {})
        table.setdefault(row.model, {})[row.path_or_key] = row
    return [_test_set(*key, table, clips, models) for key, table in tables.items()]


def _test_set(
    name: str,
    short: str,
    table: Mapping[str, Mapping[str, ClipScore]],
    clips: Sequence[RatedClip],
    models: Sequence[Model],
) -> TestSet:
    first = next(iter(table.values()))
    keys, truth_N = list(first), np.array([row.truth for row in first.values()])
    scores: dict[str, Doubles] = {}
    for model in models:
        own = table.get(model.name)
        if own is None and model.kind == "teacher" and short == SHARDS_SHORT:
            scores[model.name] = truth_N
            continue
        if own is None or own.keys() != first.keys():
            raise UserError(f"scores of {model.name} on {name} are missing: score again")
        if {row.weights_sha256 for row in own.values()} != {model.weights_sha256}:
            raise UserError(f"scores of {model.name} are of other weights: score again")
        scores[model.name] = np.array([own[key].score for key in keys])
    truth: Literal["people", "teacher"] = "teacher" if short == SHARDS_SHORT else "people"
    unit, groups = _groups(name, keys, clips) if truth == "people" else ("clip", keys)
    own_labels = any(model.name not in table for model in models)
    return TestSet(name, truth, short, truth_N, unit, groups, scores, own_labels)


def _groups(name: str, keys: Sequence[str], clips: Sequence[RatedClip]) -> tuple[str, list[str]]:
    by_path = {str(clip.path): clip for clip in clips if clip.dataset == name}
    missing = [key for key in keys if key not in by_path]
    if missing:
        raise UserError(f"{missing[0]}: scored, but not in --test-rated: score again")
    return groups_of([by_path[key] for key in keys])


# --- models on a set ------------------------------------------------------------------------------


def find(tests: Sequence[TestSet], models: Sequence[Model], seed: int) -> Outcome:
    """Evaluate all models on all sets and answer both questions on each."""
    outcome = Outcome(list(models), [], [], [])
    for test in tests:
        results, gaps = evaluate_set(test, models, seed)
        outcome.results.extend(results)
        outcome.gaps.extend(gaps)
        outcome.verdicts.append(beats(test.heading, gaps))
        outcome.verdicts.append(closes_half(test.heading, gaps, outcome.teacher))
    return outcome


def evaluate_set(
    test: TestSet, models: Sequence[Model], seed: int
) -> tuple[list[ModelResult], list[Gap]]:
    """Every model's metrics and every variant's gap, all from the same resamples."""
    counts_RN = draws(test.groups, seed)
    results = {model.name: _result(test, model, counts_RN) for model in models}
    correlations = {
        name: (result.pcc, pearson(counts_RN, test.ratings, test.scores[name]))
        for name, result in results.items()
    }
    teacher = next(model.name for model in models if model.kind == "teacher")
    gaps = []
    for model in models:
        if model.kind == "distilled" and model.variant:
            names = f"{model.variant}-labelled", model.name, teacher
            gaps.append(_gap(test, model, [correlations[name] for name in names]))
    return list(results.values()), gaps


def _result(test: TestSet, model: Model, counts_RN: Doubles) -> ModelResult:
    metrics, reason = with_intervals(
        test.ratings, test.scores[model.name], counts_RN, ("pcc", "spearman", "rmse")
    )
    return ModelResult(
        model=model.name,
        variant=model.variant,
        kind=model.kind,
        parameters=model.parameters,
        set=test.name,
        truth=test.truth,
        short=test.short,
        clips=len(test.ratings),
        resampled=test.unit,
        groups=len(set(test.groups)),
        by_definition=test.by_definition and model.kind == "teacher",
        reason=reason,
        **metrics,
    )


def _gap(test: TestSet, model: Model, correlations: Sequence[tuple[float | None, Doubles]]) -> Gap:
    """``correlations`` of the labelled-only, the distilled and the teacher, with resampled (R,)."""
    (labelled, labelled_R), (distilled, distilled_R), (teacher, teacher_R) = correlations
    above = difference(distilled, labelled, distilled_R, labelled_R)
    resampled = labelled_R, distilled_R, teacher_R
    share = share_of_gap(labelled, distilled, teacher, resampled)
    return Gap(
        variant=model.variant or "",
        parameters=model.parameters or 0,
        set=test.name,
        truth=test.truth,
        short=test.short,
        labelled=labelled,
        distilled=distilled,
        teacher=teacher,
        difference=above.value,
        difference_low=above.low,
        difference_high=above.high,
        share=share.value,
        share_low=share.low,
        share_high=share.high,
        reason=above.reason or share.reason,
    )


# --- verdicts -------------------------------------------------------------------------------------


def beats(heading: str, gaps: Sequence[Gap]) -> Verdict:
    """Whether the distilled student is above its counterpart at every size."""
    question = f"distilled beats labelled-only at every size on {heading}"
    name, short = gaps[0].set, gaps[0].short
    for gap in gaps:
        if gap.difference is None:
            return Verdict(
                name, short, None, f"{question}: not defined ({gap.variant}: {gap.reason})"
            )
    least = min(gaps, key=lambda gap: gap.difference or 0.0)
    clear = sum((gap.difference_low or 0.0) > 0 for gap in gaps)
    answer = (least.difference or 0.0) > 0
    text = (
        f"{question}: {_word(answer)}; smallest difference {least.difference_text} "
        f"({least.variant}); the whole interval is above 0 at {clear} of {len(gaps)} sizes"
    )
    return Verdict(name, short, answer, text)


def closes_half(heading: str, gaps: Sequence[Gap], teacher: Model) -> Verdict:
    """Whether half of the gap is closed by a student of a tenth of the teacher's size or less."""
    question = "closes half of the gap at a tenth of the teacher's size"
    name, short = gaps[0].set, gaps[0].short
    if teacher.parameters is None:
        text = f"{question} on {heading}: not defined (how large {teacher.name} is is not known)"
        return Verdict(name, short, None, text)
    limit = SMALL * teacher.parameters
    question += f" (<= {limit / 1e6:.2f} M parameters) on {heading}"
    small = [gap for gap in gaps if gap.parameters <= limit]
    if not small:
        return Verdict(name, short, None, f"{question}: not tried (no variant is that small)")
    defined = [gap for gap in small if gap.share is not None]
    if not defined:
        return Verdict(name, short, None, f"{question}: not defined ({small[0].reason})")
    best = max(defined, key=lambda gap: gap.share or 0.0)
    answer = (best.share or 0.0) >= HALF
    shown = ranged(best.share, best.share_low, best.share_high)
    text = f"{question}: {_word(answer)}; best such variant: {best.variant}, share {shown}"
    return Verdict(name, short, answer, text)


def _word(answer: bool) -> str:
    return "yes" if answer else "no"
