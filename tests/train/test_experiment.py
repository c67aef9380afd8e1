"""Students with and without distillation: planned, trained, resumed, evaluated and drawn."""

from __future__ import annotations

import argparse
import csv
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from data_specs.io.files import sha256_of
from tests.train.test_report import Reader
from tests.train_helpers import tone_mos, tone_pcm, write_dataset
from train import charts
from train.evaluation import bootstrap, experiment, experiment_figure, experiment_results
from train.evaluation.bootstrap import draws, interval, share_of_gap
from train.evaluation.experiment_report import results_md
from train.evaluation.experiment_results import Gap, Model, TestSet, evaluate_set
from train.metrics import agreement
from train.models.pruned import save_pruned
from train.models.student import Student, count, variant
from train.pruning.masks import Masks, prunable
from train.pruning.runs import pruned_models
from train.scoring.score import load
from train.student import fit as fitting

# --- intervals ------------------------------------------------------------------------------------


def expanded(counts_N, values_N):
    return np.repeat(values_N, counts_N.astype(int))


def test_a_resample_is_measured_like_the_clips_that_it_holds():
    rng = np.random.default_rng(1)
    truth = np.round(rng.uniform(1, 5, 40))  # many ties
    score = np.round(truth + rng.normal(0, 1, 40), 1)
    counts_RN = draws([str(n // 4) for n in range(40)], seed=3, resamples=20)
    pcc_R, rank_R = (f(counts_RN, truth, score) for f in (bootstrap.pearson, bootstrap.spearman))
    error_R = bootstrap.rmse(counts_RN, truth, score)
    for row, counts_N in enumerate(counts_RN):
        wanted = agreement(expanded(counts_N, truth), expanded(counts_N, score))
        assert pcc_R[row] == pytest.approx(wanted.pcc)
        assert rank_R[row] == pytest.approx(wanted.spearman)
        assert error_R[row] == pytest.approx(wanted.rmse)


def test_groups_are_drawn_whole_and_the_same_again():
    groups = ["a", "a", "b", "c", "c", "c"]
    counts_RN = draws(groups, seed=0, resamples=500)
    assert np.array_equal(counts_RN, draws(groups, seed=0, resamples=500))
    assert not np.array_equal(counts_RN, draws(groups, seed=1, resamples=500))
    assert (counts_RN[:, 0] == counts_RN[:, 1]).all()
    assert (counts_RN[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert counts_RN[:, 0].mean() == pytest.approx(1, abs=0.15)


def pairs(rng, rho, clips):
    x = rng.standard_normal(clips)
    return x, rho * x + np.sqrt(1 - rho**2) * rng.standard_normal(clips)


def test_the_interval_covers_the_correlation_it_was_drawn_from():
    rng, rho, clips = np.random.default_rng(2), 0.7, 100
    counts_RN = draws([str(n) for n in range(clips)], seed=0, resamples=400)
    covered, widths = 0, []
    for _ in range(300):
        truth, score = pairs(rng, rho, clips)
        found = interval(rho, bootstrap.pearson(counts_RN, truth, score))
        covered += found.low < rho < found.high
        widths.append(found.high - found.low)
    assert (
        0.90 <= covered / 300 <= 0.98
    )  # 95 % asked for; percentiles of 100 clips give a little less
    # Fisher: atanh of the correlation has the standard deviation 1 / sqrt(clips - 3).
    fisher = np.diff(np.tanh(np.arctanh(rho) + np.array([-1.96, 1.96]) / np.sqrt(clips - 3)))[0]
    assert np.mean(widths) == pytest.approx(fisher, rel=0.1)


def test_share_of_the_gap_by_hand():
    ends = [np.array([0.5, 0.6, 0.7]), np.array([0.7, 0.75, 0.8]), np.full(3, 0.9)]
    found = share_of_gap(0.6, 0.75, 0.9, tuple(ends))
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5, abs=1e-9) and found.high == pytest.approx(0.5)
    assert share_of_gap(0.6, 0.8, 0.9, tuple(ends)).value == pytest.approx(2 / 3)
    assert share_of_gap(0.6, 0.5, 0.9, tuple(ends)).value == pytest.approx(-1 / 3)


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


def simulated(spread, clips=96, conditions=12, **changes):
    """A set on which models err by the given standard deviations."""
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.uniform(1, 5, conditions), clips // conditions)
    scores = {name: truth + rng.normal(0, by, clips) for name, by in spread.items()}
    groups = [str(n * conditions // clips) for n in range(clips)]
    values = {"name": "nb", "truth": "people", "short": "zero", "unit": "condition"}
    return TestSet(**(values | {"ratings": truth, "groups": groups, "scores": scores} | changes))


def counterparts(*variants):
    found = []
    for name in variants:
        for kind in experiment_results.KINDS:
            parameters = count(variant(name))[0]
            found.append(Model(f"{name}-{kind}", name, kind, parameters, "a" * 64))
    return [*found, TEACHER]


def test_models_are_evaluated_on_the_same_resamples():
    spread = {"v1-labelled": 1.5, "v1-distilled": 0.8, "v7": 0.3}
    test, models = simulated(spread), counterparts("v1")
    results, (gap,) = evaluate_set(test, models, seed=0)
    for row in results:
        wanted = agreement(test.ratings, test.scores[row.model])
        assert (row.pcc, row.rmse) == (wanted.pcc, wanted.rmse)
        assert row.pcc_low < row.pcc < row.pcc_high and row.rmse_low < row.rmse < row.rmse_high
        assert (row.clips, row.groups, row.resampled) == (96, 12, "condition")
    labelled, distilled, teacher = (row.pcc for row in results)
    assert gap.difference == pytest.approx(distilled - labelled)
    assert gap.share == pytest.approx((distilled - labelled) / (teacher - labelled))
    assert gap.difference_low < gap.difference < gap.difference_high
    # Paired: counterparts that say the same have no difference in any resample.
    same = replace(test, scores=test.scores | {"v1-distilled": test.scores["v1-labelled"]})
    (_, (none,)) = evaluate_set(same, models, seed=0)
    assert (none.difference, none.difference_low, none.difference_high) == (0, 0, 0)
    assert (none.share, none.share_low, none.share_high) == (0, 0, 0)


def gap_of(name, difference=0.1, share=0.6, parameters=None, reason=None):
    size = parameters or count(variant(name))[0]
    ends = [None, None] if share is None else [share - 0.1, share + 0.1]
    around = [None, None] if difference is None else [difference - 0.05, difference + 0.05]
    return Gap(name, size, "nb", "people", "zero", 0.5, 0.6, 0.9, difference, *around, share, *ends,
               reason)  # fmt: skip


def test_the_first_question():
    yes = experiment_results.beats("nb (people)", [gap_of("v1", 0.2), gap_of("v2", 0.04)])
    assert yes.answer is True
    assert yes.text == (
        "distilled beats labelled-only at every size on nb (people): yes; smallest difference "
        "+0.040 [-0.010, +0.090] (v2); the whole interval is above 0 at 1 of 2 sizes"
    )
    no = experiment_results.beats("nb (people)", [gap_of("v1", 0.2), gap_of("v2", -0.04)])
    assert no.answer is False and ": no; smallest difference -0.040" in no.text
    none = experiment_results.beats("nb (people)", [gap_of("v1", None, reason="all equal")])
    assert none.answer is None and none.text.endswith("not defined (v1: all equal)")


def test_the_second_question():
    gaps = [gap_of("v1", share=0.45), gap_of("v2", share=0.55), gap_of("v6", share=0.9)]
    yes = experiment_results.closes_half("nb (people)", gaps, TEACHER)
    assert yes.answer is True
    assert yes.text == (
        "closes half of the gap at a tenth of the teacher's size (<= 0.41 M parameters) on "
        "nb (people): yes; best such variant: v2, share 0.550 [0.450, 0.650]"
    )
    no = experiment_results.closes_half("nb (people)", [gaps[0], gaps[2]], TEACHER)
    assert no.answer is False and "best such variant: v1, share 0.450" in no.text
    large = experiment_results.closes_half("nb (people)", gaps[2:], TEACHER)
    assert large.answer is None and "no variant is that small" in large.text
    none = [gap_of("v1", share=None, reason="no gap: because")]
    closed = experiment_results.closes_half("nb (people)", none, TEACHER)
    assert closed.answer is None and closed.text.endswith("not defined (no gap: because)")
    unknown = experiment_results.closes_half("nb (people)", gaps, replace(TEACHER, parameters=None))
    assert unknown.answer is None and "how large v7 is is not known" in unknown.text


def test_parameters_of_scorers_and_teachers():
    assert load("v7").parameters == count(variant("v7"))[0]
    assert load("distillmos").parameters == count(variant("v7"))[0]


# --- figures --------------------------------------------------------------------------------------


def outcome_of(*tests, variants=("v1", "v2")):
    return experiment_results.find(tests, counterparts(*variants), seed=0)


def test_figure_3_has_its_points_where_the_results_say():
    spread = {"v1-labelled": 2.0, "v1-distilled": 1}
    spread |= {"v2-labelled": 1.8, "v2-distilled": 0.7, "v7": 0.3}
    test = simulated(spread)
    outcome = outcome_of(test)
    _, (axes,) = charts.new()
    experiment_figure.draw_correlations(axes, test, outcome)
    sizes = [count(variant(name))[0] / 1e6 for name in ("v1", "v2")]
    pcc = {row.model: row.pcc for row in outcome.results}
    drawn = {line.get_label(): line for line in axes.get_lines()}
    for number, kind in enumerate(("distilled", "labelled-only")):
        x, y = drawn[kind].get_data()
        assert x == pytest.approx([size * experiment_figure.APART**number for size in sizes])
        assert y == pytest.approx([pcc[f"{name}-{kind.split('-')[0]}"] for name in ("v1", "v2")])
    bars = [bar.get_segments()[0] for bar in axes.collections]
    ends = {(row.pcc_low, row.pcc_high) for row in outcome.results if row.kind != "teacher"}
    assert {(low, high) for (_, low), (_, high) in bars} == ends
    text = experiment_figure.figure3([test], outcome)
    ElementTree.fromstring(text)
    assert "teacher v7, 4.1 M" in text and "nan" not in text
    assert text == experiment_figure.figure3([test], outcome)  # reproducible, without a date


def test_bars_are_cut_and_a_gap_without_interval_has_none():
    gaps = [gap_of("v1", share=0.5), replace(gap_of("v2"), share_low=None, share_high=None)]
    gaps[0] = replace(gaps[0], share_low=-4.0, share_high=4.0)
    outcome = experiment_results.Outcome(counterparts("v1", "v2"), [], gaps, [])
    _, (axes,) = charts.new()
    experiment_figure.draw_shares(axes, simulated({}), outcome)
    (bar,) = [one.get_segments()[0] for one in axes.collections]
    assert bar[:, 1].tolist() == [-100, 200]


def test_a_set_without_any_gap_is_drawn_all_the_same():
    test = simulated({"v1-labelled": 0.2, "v1-distilled": 1, "v7": 0.5})
    outcome = outcome_of(test, variants=("v1",))
    assert outcome.gaps[0].share is None
    ElementTree.fromstring(experiment_figure.figure3([test], outcome))
    about = {"command": "c", "date": "d", "intervals": "i"}
    assert "the teacher is not above" in results_md([test], outcome, about)


# --- the command ----------------------------------------------------------------------------------


def write_clips(folder, numbers, name, conditions=4, seconds=1.0):
    """A rated CSV of tones; neighbours in the numbers share a condition."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in numbers:
        pcm_T = tone_pcm(number, int(seconds * 16_000))
        soundfile.write(folder / f"{name}{number}.wav", pcm_T, 16_000)
        rows.append([name, f"{name}{number}.wav", tone_mos(number), f"c{number % conditions}"])
    with (folder / "labels.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(["dataset", "path", "mos", "condition"])
        writer.writerows(rows)
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    top = tmp_path_factory.mktemp("experiment")
    write_clips(top / "rated", range(12), "wb")
    write_dataset(top / "train", validation=4)
    write_dataset(top / "judge", shards=1, samples=6)
    write_clips(top / "rated", range(20, 30), "nb")
    return top


def arguments(data, out, *more):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    table = str(data / "rated" / "labels.csv")
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
    args = arguments(data, out, "--short", "both", "--validate-every", "2", "--warmup", "1")
    assert experiment.run(args) == 0
    told = capsys.readouterr().out
    assert all(part in told for part in ("v1-labelled", "multiply-adds", "beats labelled-only"))

    content = json.loads((out / "results.json").read_text())
    sets = {(row["set"], row["short"]) for row in content["sets"]}
    assert sets == {("nb", "zero"), ("nb", "repeat"), ("judge", "none")}
    by_model = {row["model"]: row for row in content["sets"] if row["set"] == "judge"}
    assert by_model["stub"]["by_definition"] and by_model["stub"]["pcc"] == pytest.approx(
        1, abs=1e-12
    )
    assert by_model["v1-distilled"]["resampled"] == "clip"
    assert len(content["gaps"]) == 3 and len(content["verdicts"]) == 6
    assert content["models"][-1]["parameters"] == count(variant("v2"))[0]
    assert content["about"]["command"].startswith("python -m train experiment --shards ")
    assert "--seed" not in content["about"]["command"]  # as it is by default
    assert set(content["about"]["seconds"]) == {"v1-labelled", "v1-distilled", "scoring"}

    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {row["groups"] for row in rows if row["set"] == "nb"} == {"4"}
    page = (out / "experiment.html").read_text()
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert all(a.startswith("data:") or a[1:] in reader.ids for a in reader.addresses)
    assert "<script" not in page and "url(" not in page and page.count("<svg ") == 6
    table = (out / "results.md").read_text()
    assert table.count("| v1 |") == 3 and "1 by definition" in table and "10 clips in 4" in table
    ElementTree.parse(out / "figure3.svg")

    # Once more with pruned models, and with fewer samples of the shards.
    pruned = write_pruned_run(tmp_path / "pruned")
    again = arguments(data, tmp_path / "out", "--short", "both", "--validate-every", "2",
                      "--warmup", "1", "--pruned", str(pruned), "--test-samples", "3")  # fmt: skip
    assert experiment.run(again) == 0
    more = json.loads((out / "results.json").read_text())["sets"]
    assert [row["model"] for row in more[:5]] == [
        *("v1-labelled", "v1-distilled", "v1-importance-50", "v1-importance-20", "stub")
    ]
    assert {row["clips"] for row in more if row["set"] == "judge"} == {3}
    drawn = (out / "figure3.svg").read_text()
    assert "v1 pruned by importance" in drawn
    assert "v1-importance-20" in (out / "experiment.html").read_text()
    assert experiment.run(args) == 0

    # Again: nothing is trained, nothing is another number.
    monkeypatch.setattr(fitting, "fit", None)
    assert experiment.run(arguments(data, out, "--short", "both", "--validate-every", "2",
                                    "--warmup", "1", "--report-only")) == 0  # fmt: skip
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
    trained, held = ({clip.condition for clip in part} for part in (
        labelled.sources.rated, labelled.sources.rated_validation))  # fmt: skip
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
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "score_rated", pressed)
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
    write_model(tmp_path / "runs" / "v1-distilled", 99, experiment.make_plan(
        arguments(data, tmp_path))[1].config)  # fmt: skip
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
    args.test_rated = args.test_shards = None
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        experiment.run(args)
