"""What an experiment found: every model on every set, gaps and verdicts.

A gap is what separates a student trained on ratings alone from the teacher; its share that is
closed by distillation is ``(distilled - labelled) / (teacher - labelled)``, in PCC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from data_specs.io.errors import UserError
from train.bootstrap import Doubles, Interval, difference, draws, pearson, share_of_gap
from train.evaluation.common_clips import clips_of
from train.evaluation.records import SHARDS_PADDING, ClipScore, CommonClips
from train.evaluation.statistics import with_intervals

Kind = Literal["labelled", "distilled"]
KINDS: tuple[Kind, ...] = ("labelled", "distilled")
TITLES = {"labelled": "labelled-only", "distilled": "distilled", "teacher": "teacher"}

SMALL = 0.1
"""Share of the teacher's parameters up to which half of the gap is asked for."""

HALF = 0.5
PADDED = {
    "zero": ", short clips zero-padded",
    "repeat": ", short clips repeated",
    SHARDS_PADDING: "",
}


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
    """One set, its short clips padded one way, with every model's scores by name.

    ``by_definition``: the ratings are the teacher's own.
    """

    __test__ = False  # not a test, whatever its name says to pytest

    clips: CommonClips
    padding: str
    by_definition: bool = False

    @property
    def truth(self) -> Literal["people", "teacher"]:
        """Whose the ratings are."""
        return "people" if self.clips.kind == "rated" else "teacher"

    @property
    def heading(self) -> str:
        """The set in words."""
        whom = "people" if self.truth == "people" else "the teacher's labels"
        return f"{self.clips.name} ({whom}{PADDED[self.padding]})"

    @property
    def named(self) -> dict[str, str]:
        """The set in records."""
        return {"set": self.clips.name, "truth": self.truth, "padding": self.padding}

    @property
    def size(self) -> str:
        """How many clips, and in how many conditions."""
        clips, unit = f"{len(self.clips.keys)} clips", self.clips.unit
        return clips if unit == "clip" else f"{clips} in {len(set(self.clips.groups))} {unit}s"


@dataclass(frozen=True)
class ModelResult:
    """One model on one set. 95 % intervals; MOS for ``rmse``."""

    model: Model
    pcc: Interval
    spearman: Interval
    rmse: Interval
    by_definition: bool
    reason: str | None

    @property
    def pcc_text(self) -> str:
        """The correlation with its interval."""
        return "1 by definition" if self.by_definition else self.pcc.text()

    def record(self, test: TestSet) -> dict[str, Any]:
        """A row of ``results.csv``."""
        return {
            "model": self.model.name,
            "variant": self.model.variant,
            "kind": self.model.kind,
            "parameters": self.model.parameters,
            **test.named,
            "clips": len(test.clips.keys),
            "resampled": test.clips.unit,
            "groups": len(set(test.clips.groups)),
            **self.pcc.named("pcc"),
            **self.spearman.named("spearman"),
            **self.rmse.named("rmse"),
            "by_definition": self.by_definition,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Gap:
    """One variant on one set: how far the distilled student is above its counterpart, in PCC.

    ``share`` is of the gap between the labelled-only student and the teacher.
    """

    variant: str
    parameters: int
    labelled: float | None
    distilled: float | None
    teacher: float | None
    difference: Interval
    share: Interval

    @property
    def reason(self) -> str | None:
        """Why something is not defined."""
        return self.difference.reason or self.share.reason

    @property
    def share_text(self) -> str:
        """The share of the gap with its interval, or why it has none."""
        if self.share.value is None:
            return self.reason or "–"
        why = f" ({self.reason})" if self.share.low is None and self.reason else ""
        return self.share.text() + why

    def record(self, test: TestSet) -> dict[str, Any]:
        """An entry of ``results.json``."""
        return {
            "variant": self.variant,
            "parameters": self.parameters,
            **test.named,
            "labelled": self.labelled,
            "distilled": self.distilled,
            "teacher": self.teacher,
            **self.difference.named("difference"),
            **self.share.named("share"),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Verdict:
    """A question of the experiment on one set; ``answer`` is None where there is none."""

    set: str
    padding: str
    answer: bool | None
    text: str


@dataclass(frozen=True)
class SetOutcome:
    """Every model's result, every variant's gap, and both answers on one set."""

    test: TestSet
    results: list[ModelResult]
    gaps: list[Gap]
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Outcome:
    """Everything that was found."""

    models: list[Model]
    sets: list[SetOutcome]

    @property
    def teacher(self) -> Model:
        """The model that the students are measured by."""
        return next(model for model in self.models if model.kind == "teacher")

    @property
    def kinds(self) -> list[str]:
        """The lines of Figure 3: distilled, labelled-only, and one a pruned network and method."""
        kinds = dict.fromkeys(model.kind for model in self.models)
        return ["distilled", "labelled", *(kind for kind in kinds if kind not in TITLES)]


# --- the sets -------------------------------------------------------------------------------------


def test_sets(scores: Sequence[ClipScore], models: Sequence[Model]) -> list[TestSet]:
    """The sets in order of appearance. ``ValueError`` if a model's scores are not all there."""
    tables: dict[tuple[str, str], dict[str, dict[str, ClipScore]]] = {}
    for row in scores:
        table = tables.setdefault((row.set, row.padding), {})
        table.setdefault(row.model, {})[row.path_or_key] = row
    return [_test_set(*key, table, models) for key, table in tables.items()]


def _test_set(
    name: str, padding: str, table: Mapping[str, Mapping[str, ClipScore]], models: Sequence[Model]
) -> TestSet:
    first = next(iter(table.values()))
    scores: dict[str, Mapping[str, ClipScore]] = {}
    for model in models:
        own = table.get(model.name)
        if own is None and model.kind == "teacher" and padding == SHARDS_PADDING:
            own = {key: replace(row, score=row.truth) for key, row in first.items()}
        elif own is None or own.keys() != first.keys():
            raise UserError(f"scores of {model.name} on {name} are missing: score again")
        elif {row.weights_sha256 for row in own.values()} != {model.weights_sha256}:
            raise UserError(f"scores of {model.name} are of other weights: score again")
        scores[model.name] = own
    clips = clips_of(list(first), "shards" if padding == SHARDS_PADDING else "rated", scores)
    return TestSet(clips, padding, any(model.name not in table for model in models))


# --- models on a set ------------------------------------------------------------------------------


def find(tests: Sequence[TestSet], models: Sequence[Model], seed: int) -> Outcome:
    """Evaluate all models on all sets and answer both questions on each."""
    return Outcome(list(models), [evaluate_set(test, models, seed) for test in tests])


def evaluate_set(test: TestSet, models: Sequence[Model], seed: int) -> SetOutcome:
    """Every model's metrics and every variant's gap, all from the same resamples."""
    counts_RN = draws(test.clips.groups, seed)
    resampled = {
        model.name: pearson(counts_RN, test.clips.truth, test.clips.scores[model.name])
        for model in models
    }
    results = {model.name: _result(test, model, counts_RN) for model in models}
    teacher = next(model for model in models if model.kind == "teacher")
    gaps = []
    for model in models:
        if model.kind == "distilled" and model.variant:
            names = f"{model.variant}-labelled", model.name, teacher.name
            pcc = [results[name].pcc.value for name in names]
            gaps.append(_gap(model, pcc, [resampled[name] for name in names]))
    verdicts = [beats(test, gaps), closes_half(test, gaps, teacher)]
    return SetOutcome(test, list(results.values()), gaps, verdicts)


def _result(test: TestSet, model: Model, counts_RN: Doubles) -> ModelResult:
    by_definition = test.by_definition and model.kind == "teacher"
    metrics, reason = with_intervals(
        test.clips.truth, test.clips.scores[model.name], counts_RN, ("pcc", "spearman", "rmse")
    )
    return ModelResult(model, **metrics, by_definition=by_definition, reason=reason)


def _gap(model: Model, pcc: Sequence[float | None], resampled: Sequence[Doubles]) -> Gap:
    """``pcc`` of the labelled-only, the distilled and the teacher, with those resampled (R,)."""
    labelled, distilled, teacher = pcc
    above = difference(distilled, labelled, resampled[1], resampled[0])
    share = share_of_gap(labelled, distilled, teacher, resampled)
    name, size = model.variant or "", model.parameters or 0
    return Gap(name, size, labelled, distilled, teacher, above, share)


# --- verdicts -------------------------------------------------------------------------------------


def beats(test: TestSet, gaps: Sequence[Gap]) -> Verdict:
    """Whether the distilled student is above its counterpart at every size."""
    question = f"distilled beats labelled-only at every size on {test.heading}"
    verdict = partial(Verdict, test.clips.name, test.padding)
    for gap in gaps:
        if gap.difference.value is None:
            return verdict(None, f"{question}: not defined ({gap.variant}: {gap.reason})")
    least = min(gaps, key=lambda gap: gap.difference.value or 0.0)
    clear = sum((gap.difference.low or 0.0) > 0 for gap in gaps)
    answer = (least.difference.value or 0.0) > 0
    text = (
        f"{question}: {_word(answer)}; smallest difference {least.difference.text('+')} "
        f"({least.variant}); the whole interval is above 0 at {clear} of {len(gaps)} sizes"
    )
    return verdict(answer, text)


def closes_half(test: TestSet, gaps: Sequence[Gap], teacher: Model) -> Verdict:
    """Whether half of the gap is closed by a student of a tenth of the teacher's size or less."""
    question = "closes half of the gap at a tenth of the teacher's size"
    verdict = partial(Verdict, test.clips.name, test.padding)
    if teacher.parameters is None:
        unknown = f"how large {teacher.name} is is not known"
        return verdict(None, f"{question} on {test.heading}: not defined ({unknown})")
    limit = SMALL * teacher.parameters
    question += f" (<= {limit / 1e6:.2f} M parameters) on {test.heading}"
    small = [gap for gap in gaps if gap.parameters <= limit]
    if not small:
        return verdict(None, f"{question}: not tried (no variant is that small)")
    best = max(small, key=lambda gap: -math.inf if gap.share.value is None else gap.share.value)
    if best.share.value is None:
        return verdict(None, f"{question}: not defined ({small[0].reason})")
    answer = best.share.value >= HALF
    text = f"{question}: {_word(answer)}; best such variant: {best.variant}, share "
    return verdict(answer, text + best.share.text())


def _word(answer: bool) -> str:
    return "yes" if answer else "no"
