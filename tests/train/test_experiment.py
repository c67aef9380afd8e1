"""Students with and without distillation: planned, trained, resumed, evaluated and drawn."""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from data_specs.io.files import sha256_of
from tests.train.test_report import WholePage
from tests.train_helpers import tone_mos, tone_pcm, write_dataset
from train import bootstrap, charts
from train.bootstrap import Interval, draws, interval, share_of_gap
from train.evaluation import experiment, experiment_figure
from train.evaluation.experiment import results_md
from train.evaluation.experiment_results import (
    KINDS,
    Gap,
    Model,
    Outcome,
    SetOutcome,
    TestSet,
    beats,
    closes_half,
    evaluate_set,
    find,
)
from train.evaluation.records import CommonClips
from train.files import csv_rows, csv_text
from train.metrics import agreement
from train.models.pruned import save_pruned
from train.models.student import Student, count, variant
from train.pruning.masks import Masks, prunable
from train.pruning.runs import pruned_models
from train.scoring.score import load
from train.student import fit as fitting

# --- intervals ------------------------------------------------------------------------------------


def test_groups_are_drawn_whole_and_the_same_again():
    groups = ["a", "a", "b", "c", "c", "c"]
    counts_RN = draws(groups, seed=0, resamples=500)
    assert np.array_equal(counts_RN, draws(groups, seed=0, resamples=500))
    assert not np.array_equal(counts_RN, draws(groups, seed=1, resamples=500))
    assert (counts_RN[:, 0] == counts_RN[:, 1]).all()
    assert (counts_RN[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert counts_RN[:, 0].mean() == pytest.approx(1, abs=0.15)


def test_the_interval_covers_the_correlation_it_was_drawn_from():
    rng, rho, clips = np.random.default_rng(2), 0.7, 100
    counts_RN = draws([str(n) for n in range(clips)], seed=0, resamples=400)
    covered, widths = 0, []
    for _ in range(300):
        truth, noise = rng.standard_normal((2, clips))
        score = rho * truth + np.sqrt(1 - rho**2) * noise
        found = interval(rho, bootstrap.pearson(counts_RN, truth, score))
        covered += found.low < rho < found.high
        widths.append(found.high - found.low)
    # 95 % asked for; percentiles of 100 clips give a little less.
    assert 0.90 <= covered / 300 <= 0.98
    # Fisher: atanh of the correlation has the standard deviation 1 / sqrt(clips - 3).
    fisher = np.diff(np.tanh(np.arctanh(rho) + np.array([-1.96, 1.96]) / np.sqrt(clips - 3)))[0]
    assert np.mean(widths) == pytest.approx(fisher, rel=0.1)


@pytest.mark.parametrize(("distilled", "share"), [(0.75, 1 / 2), (0.8, 2 / 3), (0.5, -1 / 3)])
def test_share_of_the_gap_by_hand(distilled, share):
    ends = [np.array([0.5, 0.6, 0.7]), np.array([0.7, 0.75, 0.8]), np.full(3, 0.9)]
    found = share_of_gap(0.6, distilled, 0.9, ends)
    assert (found.value, found.low, found.high) == pytest.approx((share, 0.5, 0.5))


@pytest.mark.parametrize("teacher", [0.6, 0.5])
def test_without_a_gap_there_is_no_share(teacher):
    found = share_of_gap(0.6, 0.7, teacher, (np.ones(3),) * 3)
    assert found.value is None and found.low is None
    assert "the teacher is not above" in found.reason


def test_a_gap_that_is_often_none_has_no_interval():
    teacher_R = np.array([0.9] * 9 + [0.5])
    found = share_of_gap(0.6, 0.7, 0.9, (np.full(10, 0.6), np.full(10, 0.7), teacher_R))
    assert found.value == pytest.approx(1 / 3)
    assert found.low is None and found.reason == "no interval: no gap in 10% of resamples"


def test_an_undefined_correlation_is_said():
    flat = bootstrap.pearson(draws(["a", "b", "c"], 0), [1, 2, 3], [2.1, 2.1, 2.1])
    assert np.isnan(flat).all()
    assert bootstrap.difference(None, 0.5, flat, flat).reason == "a correlation is not defined"


# --- evaluating -----------------------------------------------------------------------------------

TEACHER = Model("v7", None, "teacher", 4_133_226, "f" * 64)


def simulated(spread, clips=96, conditions=12):
    """A set on which models err by the given standard deviations."""
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.uniform(1, 5, conditions), clips // conditions)
    scores = {name: truth + rng.normal(0, by, clips) for name, by in spread.items()}
    groups = [str(n * conditions // clips) for n in range(clips)]
    keys = [f"{n}.wav" for n in range(clips)]
    return TestSet(CommonClips("nb", "rated", keys, truth, scores, [], groups), "zero")


def counterparts(*variants):
    found = []
    for name in variants:
        for kind in KINDS:
            parameters = count(variant(name))[0]
            found.append(Model(f"{name}-{kind}", name, kind, parameters, "a" * 64))
    return [*found, TEACHER]


def test_models_are_evaluated_on_the_same_resamples():
    spread = {"v1-labelled": 1.5, "v1-distilled": 0.8, "v7": 0.3}
    test, models = simulated(spread), counterparts("v1")
    found = evaluate_set(test, models, seed=0)
    (gap,) = found.gaps
    for row in found.results:
        wanted = agreement(test.clips.truth, test.clips.scores[row.model.name])
        assert (row.pcc.value, row.rmse.value) == (wanted.pcc, wanted.rmse)
        assert row.pcc.low < row.pcc.value < row.pcc.high
        assert row.rmse.low < row.rmse.value < row.rmse.high
        record = row.record(test)
        assert (record["clips"], record["groups"], record["resampled"]) == (96, 12, "condition")
    labelled, distilled, teacher = (row.pcc.value for row in found.results)
    assert gap.difference.value == pytest.approx(distilled - labelled)
    assert gap.share.value == pytest.approx((distilled - labelled) / (teacher - labelled))
    assert gap.difference.low < gap.difference.value < gap.difference.high
    # Paired: counterparts that say the same have no difference in any resample.
    scores = test.clips.scores | {"v1-distilled": test.clips.scores["v1-labelled"]}
    same = replace(test, clips=replace(test.clips, scores=scores))
    (none,) = evaluate_set(same, models, seed=0).gaps
    assert none.difference == none.share == Interval(0, 0, 0)


def around(value, by):
    return Interval(value, value - by, value + by)


def gap_of(name, difference=0.1, share=0.6):
    size = count(variant(name))[0]
    return Gap(name, size, 0.5, 0.6, 0.9, around(difference, 0.05), around(share, 0.1))


NONE = replace(gap_of("v1"), difference=Interval(None, reason="why"), share=Interval(None))
SET = replace(simulated({}), padding="none")
BEATS = "distilled beats labelled-only at every size on nb (people): "
CLOSES = "closes half of the gap at a tenth of the teacher's size"
CLOSES_AT = f"{CLOSES} (<= 0.41 M parameters) on nb (people): "
AT = "; the whole interval is above 0 at 1 of 2 sizes"


@pytest.mark.parametrize(
    ("differences", "answer", "said"),
    [
        ((0.2, 0.04), True, f"yes; smallest difference +0.040 [-0.010, +0.090] (v2){AT}"),
        ((0.2, -0.04), False, f"no; smallest difference -0.040 [-0.090, +0.010] (v2){AT}"),
    ],
)
def test_the_first_question(differences, answer, said):
    found = beats(SET, [gap_of(f"v{n}", one) for n, one in enumerate(differences, 1)])
    assert (found.answer, found.text) == (answer, BEATS + said)


@pytest.mark.parametrize(
    ("shares", "answer", "said"),
    [
        ((0.45, 0.55, 0.9), True, "yes; best such variant: v2, share 0.550 [0.450, 0.650]"),
        ((0.45, None, 0.9), False, "no; best such variant: v1, share 0.450 [0.350, 0.550]"),
        ((None, None, 0.9), None, "not tried (no variant is that small)"),
    ],
)
def test_the_second_question(shares, answer, said):
    tried = zip(("v1", "v2", "v6"), shares, strict=True)
    gaps = [gap_of(name, share=share) for name, share in tried if share is not None]
    found = closes_half(SET, gaps, TEACHER)
    assert (found.answer, found.text) == (answer, CLOSES_AT + said)


def test_questions_without_an_answer():
    unknown = closes_half(SET, [NONE], replace(TEACHER, parameters=None))
    none = beats(SET, [NONE]), closes_half(SET, [NONE], TEACHER), unknown
    assert [one.answer for one in none] == [None] * 3
    assert [one.text for one in none] == [
        f"{BEATS}not defined (v1: why)",
        f"{CLOSES_AT}not defined (why)",
        f"{CLOSES} on nb (people): not defined (how large v7 is is not known)",
    ]


def test_parameters_of_scorers_and_teachers():
    assert load("v7").parameters == count(variant("v7"))[0]
    assert load("distillmos").parameters == count(variant("v7"))[0]


# --- figures --------------------------------------------------------------------------------------


def test_figure_3_has_its_points_where_the_results_say():
    spread = {"v1-labelled": 2.0, "v1-distilled": 1}
    spread |= {"v2-labelled": 1.8, "v2-distilled": 0.7, "v7": 0.3}
    outcome = find([simulated(spread)], counterparts("v1", "v2"), seed=0)
    _, (axes,) = charts.new()
    experiment_figure.draw_correlations(axes, outcome.sets[0], outcome)
    sizes = [count(variant(name))[0] / 1e6 for name in ("v1", "v2")]
    pcc = {row.model.name: row.pcc.value for row in outcome.sets[0].results}
    drawn = {line.get_label(): line for line in axes.get_lines()}
    for number, kind in enumerate(("distilled", "labelled-only")):
        x, y = drawn[kind].get_data()
        assert x == pytest.approx([size * experiment_figure.APART**number for size in sizes])
        assert y == pytest.approx([pcc[f"{name}-{kind.split('-')[0]}"] for name in ("v1", "v2")])
    bars = [bar.get_segments()[0] for bar in axes.collections]
    results = outcome.sets[0].results
    ends = {(row.pcc.low, row.pcc.high) for row in results if row.model.kind != "teacher"}
    assert {(low, high) for (_, low), (_, high) in bars} == ends
    text = experiment_figure.figure3(outcome)
    ElementTree.fromstring(text)
    assert "teacher v7, 4.1 M" in text and "nan" not in text
    assert text == experiment_figure.figure3(outcome)  # reproducible, without a date


def test_bars_are_cut_and_a_gap_without_interval_has_none():
    gaps = [
        replace(gap_of("v1"), share=Interval(0.5, -4.0, 4.0)),
        replace(gap_of("v2"), share=Interval(0.6)),
    ]
    found = SetOutcome(simulated({}), [], gaps, [])
    _, (axes,) = charts.new()
    outcome = Outcome(counterparts("v1", "v2"), [found])
    experiment_figure.draw_shares(axes, found, outcome)
    (bar,) = [one.get_segments()[0] for one in axes.collections]
    assert bar[:, 1].tolist() == [-100, 200]


def test_a_set_without_any_gap_is_drawn_all_the_same():
    test = simulated({"v1-labelled": 0.2, "v1-distilled": 1, "v7": 0.5})
    outcome = find([test], counterparts("v1"), seed=0)
    assert outcome.sets[0].gaps[0].share.value is None
    ElementTree.fromstring(experiment_figure.figure3(outcome))
    about = {"command": "c", "date": "d", "intervals": "i"}
    assert "the teacher is not above" in results_md(outcome, about)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards, and tones that are rated, whose neighbours share a condition."""
    top = tmp_path_factory.mktemp("experiment")
    write_dataset(top / "train", validation=4)
    write_dataset(top / "judge", shards=1, samples=6)
    rows = []
    for name, numbers in (("wb", range(12)), ("nb", range(20, 30))):
        for number in numbers:
            soundfile.write(top / f"{name}{number}.wav", tone_pcm(number, 16_000), 16_000)
            about = {"dataset": name, "path": f"{name}{number}.wav", "mos": tone_mos(number)}
            rows.append(about | {"condition": f"c{number % 4}"})
    (top / "labels.csv").write_text(csv_text(rows))
    return top


def arguments(data, out, *more):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    table = str(data / "labels.csv")
    return parser.parse_args(
        ["--shards", str(data / "train"), "--rated", table, "--rated-set", "wb"]
        + ["--test-rated", table, "--test-rated-set", "nb", "--test-shards", str(data / "judge")]
        + ["--variants", "v1", "--teacher", "stub", "--steps", "2", "--batch", "4", "--workers"]
        + ["0", "--device", "cpu", "--precision", "fp32", "--out", str(out), *more]
    )


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ((), [1, 500]),
        (("--steps", "70"), [7, 500]),
        (("--steps", "60000"), [500, 500]),
        (("--validate-every", "9"), [9, 9]),
    ],
)
def test_labelled_only_students_are_validated_ten_times_or_more(data, tmp_path, options, every):
    runs = experiment.make_plan(arguments(data, tmp_path, *options))
    assert [run.config.validate_every for run in runs] == every


def write_pruned_run(out, percents=(50, 20)):
    """A run of ``train prune`` on v1, as far as the experiment looks at it."""
    torch.manual_seed(7)
    student = Student(variant("v1"))
    for percent in percents:
        masks = Masks.full(student, prunable(student, "all"))
        about = {
            "kind": "student",
            "config": student.config.model_dump(),
            "parameters": percent * 100,
            "metrics": {"size": float(percent)},
            "prune": {"model": "v1", "method": "importance"},
        }
        save_pruned(out / f"pruned-{percent}", student.state_dict(), masks, about)
    return out


def test_pruned_models_are_found_by_their_run(tmp_path):
    run = write_pruned_run(tmp_path / "run")
    found = pruned_models([run])
    assert [(one.name, one.parameters) for one in found] == [
        ("v1-importance-50", 5000),
        ("v1-importance-20", 2000),
    ]
    assert {one.series for one in found} == {"v1 pruned by importance"}
    with pytest.raises(ValueError, match="two runs hold a model v1-importance-20"):
        pruned_models([run, run])
    with pytest.raises(ValueError, match="holds no pruned-P folder"):
        pruned_models([tmp_path])
    (run / "pruned-20/model.json").write_text("{}")
    with pytest.raises(ValueError, match="not of train prune"):
        pruned_models([run])


def write_model(out, seed, config=None, name="v1"):
    """A run folder with a random student."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    student = Student(variant(name))
    save_file(student.state_dict(), out / "model.safetensors")
    about = {
        "student": name,
        "config": student.config.model_dump(),
        "parameters": count(variant(name))[0],
        "weights_sha256": sha256_of(out / "model.safetensors"),
        "fit": config.model_dump() if config else {},
    }
    (out / "model.json").write_text(json.dumps(about))
    return out


@pytest.fixture
def stub_teacher(monkeypatch, tmp_path):
    """A teacher called "stub": a random v2 that labelled the shards."""
    folder = write_model(tmp_path / "stub", 0, name="v2")

    def load_stub(model, device="cpu"):
        if str(model) != "stub":
            return load(model, device)
        scorer = load(folder)
        scorer.name, scorer.weights_sha256 = "stub", "f" * 64
        return scorer

    monkeypatch.setattr(experiment, "load", load_stub)


@pytest.fixture
def stub_fit(monkeypatch, stub_teacher):
    """``fit`` that writes a random model at once; returns the names of the runs it made."""
    calls = []

    def fit(config, sources, out, host=None):
        calls.append(out.name)
        write_model(out, len(calls), config)

    monkeypatch.setattr(fitting, "fit", fit)
    return calls


def test_the_whole_experiment(data, tmp_path, stub_teacher, monkeypatch, capsys):
    out = tmp_path / "out"
    common = data, out, "--score-padding", "both", "--validate-every", "2", "--warmup", "1"
    args = arguments(*common)
    assert experiment.run(args) == 0
    told = capsys.readouterr().out
    assert all(part in told for part in ("v1-labelled", "multiply-adds", "beats labelled-only"))

    content = json.loads((out / "results.json").read_text())
    sets = {(row["set"], row["padding"]) for row in content["sets"]}
    assert sets == {("nb", "zero"), ("nb", "repeat"), ("judge", "none")}
    by_model = {row["model"]: row for row in content["sets"] if row["set"] == "judge"}
    assert by_model["stub"]["by_definition"]
    assert by_model["stub"]["pcc"] == pytest.approx(1, abs=1e-12)
    assert by_model["v1-distilled"]["resampled"] == "clip"
    assert len(content["gaps"]) == 3 and len(content["verdicts"]) == 6
    assert content["models"][-1]["parameters"] == count(variant("v2"))[0]
    assert content["about"]["command"].startswith("python -m train experiment --shards ")
    assert "--seed" not in content["about"]["command"]  # as it is by default
    assert set(content["about"]["seconds"]) == {"v1-labelled", "v1-distilled", "scoring"}

    rows = csv_rows(out / "results.csv")
    assert len(rows) == 9 and {row["groups"] for row in rows if row["set"] == "nb"} == {"4"}
    page = (out / "experiment.html").read_text()
    WholePage(page)
    assert "<script" not in page and page.count("<svg ") == 6
    table = (out / "results.md").read_text()
    assert table.count("| v1 |") == 3 and "1 by definition" in table and "10 clips in 4" in table
    ElementTree.parse(out / "figure3.svg")

    # Once more with pruned models, and with fewer samples of the shards.
    pruned = write_pruned_run(tmp_path / "pruned")
    again = arguments(*common, "--pruned", str(pruned), "--test-samples", "3")
    assert experiment.run(again) == 0
    more = json.loads((out / "results.json").read_text())["sets"]
    assert [row["model"] for row in more[:5]] == [
        *("v1-labelled", "v1-distilled", "v1-importance-50", "v1-importance-20", "stub")
    ]
    assert {row["clips"] for row in more if row["set"] == "judge"} == {3}
    assert "v1 pruned by importance" in (out / "figure3.svg").read_text()
    assert "v1-importance-20" in (out / "experiment.html").read_text()
    assert experiment.run(args) == 0

    # Again: nothing is trained, nothing is another number.
    monkeypatch.setattr(fitting, "fit", None)
    assert experiment.run(arguments(*common, "--report-only")) == 0
    again = json.loads((out / "results.json").read_text())
    assert again["sets"] == content["sets"] and again["gaps"] == content["gaps"]


def test_counterparts_have_the_same_rated_clips_and_the_same_budget(data, tmp_path, stub_fit):
    args = arguments(data, tmp_path / "out", "--variants", "v2", "v1", "--rated-share", "0.5")
    (tmp_path / "out").mkdir()
    runs = experiment.make_plan(args)
    assert [run.name for run in runs] == [
        *("v1-labelled", "v1-distilled", "v2-labelled", "v2-distilled")
    ]
    labelled, distilled = runs[0], runs[1]
    assert labelled.config.rated_share == 1 and distilled.config.rated_share == 0.5
    assert labelled.config.rated_hash == distilled.config.rated_hash
    assert labelled.config.steps == distilled.config.steps == 2
    assert not labelled.sources.shards and distilled.sources.shards
    parts = labelled.sources.rated, labelled.sources.rated_validation
    trained, held = ({clip.condition for clip in part} for part in parts)
    assert len(held) == 1 and len(trained) == 3 and not trained & held
    assert {clip.dataset for clip in labelled.sources.rated} == {"wb"}


def test_ctrl_c_stops_all_and_the_same_command_continues(
    data, tmp_path, stub_fit, monkeypatch, capsys
):
    args = arguments(data, tmp_path, "--variants", "v1", "v2")
    whole = fitting.fit

    def interrupted(config, sources, out, host=None):
        if out.name == "v2-labelled":
            raise KeyboardInterrupt
        whole(config, sources, out, host)

    monkeypatch.setattr(fitting, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(args)
    capsys.readouterr()
    assert stub_fit == ["v1-labelled", "v1-distilled"]
    assert not (tmp_path / "scores.csv").exists()

    monkeypatch.setattr(fitting, "fit", whole)
    assert experiment.run(args) == 0
    assert stub_fit == ["v1-labelled", "v1-distilled", "v2-labelled", "v2-distilled"]
    assert "(done)" in capsys.readouterr().out


def test_ctrl_c_while_scoring(data, tmp_path, stub_fit, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "score_sets", pressed)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(arguments(data, tmp_path))


def test_another_configuration_is_refused(data, tmp_path, stub_fit):
    assert experiment.run(arguments(data, tmp_path)) == 0
    with pytest.raises(ValueError, match=r"v1-labelled: holds a run with steps=2, not 3"):
        experiment.run(arguments(data, tmp_path, "--steps", "3"))


def test_report_only_asks_for_what_is_missing(data, tmp_path, stub_fit):
    with pytest.raises(ValueError, match="v1-labelled, v1-distilled: not trained yet"):
        experiment.run(arguments(data, tmp_path, "--report-only"))
    assert experiment.run(arguments(data, tmp_path)) == 0
    distilled = experiment.make_plan(arguments(data, tmp_path))[1]
    write_model(distilled.out, 99, distilled.config)
    with pytest.raises(ValueError, match="v1-distilled are of other weights"):
        experiment.run(arguments(data, tmp_path, "--report-only"))
    (tmp_path / "scores.csv").unlink()
    with pytest.raises(ValueError, match="no scores yet"):
        experiment.run(arguments(data, tmp_path, "--report-only"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rated-set", "nb"], "in --rated and in --test-rated"),
        (["--rated-set", "wbb"], "unknown dataset 'wbb'; did you mean 'wb'"),
        (["--variants", "v11"], "unknown student 'v11'"),
        (["--test-shards", "TRAIN"], "trained or validated on it"),
        (["--test-samples", "-1"], "a correlation needs at least two"),
        (["--test-shards", "JUDGE", "OTHER"], "two test sets have one name"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_once(data, tmp_path, stub_fit, more, message):
    named = {"TRAIN": "train", "JUDGE": "judge", "OTHER": "other/judge"}
    more = [str(data / named[word]) if word in named else word for word in more]
    with pytest.raises(ValueError, match=message):
        experiment.run(arguments(data, tmp_path, *more))
    assert not stub_fit


def test_nothing_to_evaluate_on(data, tmp_path, stub_fit):
    args = arguments(data, tmp_path)
    args.test_rated, args.test_shards = None, []
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        experiment.run(args)
