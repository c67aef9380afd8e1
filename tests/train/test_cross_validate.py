"""Folds hold out whole conditions; own scales help where scales differ; kills change nothing."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_specs.rated import RatedClip
from tests.train.test_teacher_fit import frames_of, kill, killed, write_conditions
from train import files
from train.teacher import cross_validate as cv
from train.teacher.cross_validate import Part, Plan, Result, folds_of, split
from train.teacher.feature_cache import FrameCache
from train.teacher.fit import HeadTrainer, Host, Settings

ROOT = Path(__file__).parents[2]
QUIET = Host(progress=False)
TINY = Settings(steps=6, batch=4, validate_every=3, dim=4, heads=2, layers=1, lr=1e-2)


def clip(number: int, dataset: str = "a", mos: float = 3.0, **values) -> RatedClip:
    return RatedClip(path=Path(f"{dataset}{number}.wav"), mos=mos, dataset=dataset, **values)


def two_tests() -> list[RatedClip]:
    """As the P.835 reference sets are: 13 conditions of 6 clips, and 12 of them with 8 clips."""
    wide = [clip(k, "wide", condition=f"c{k % 13}") for k in range(78)]
    return wide + [clip(k, "narrow", condition=f"c{1 + k % 12}") for k in range(96)]


# ---------------------------------------------------------------- folds


def test_folds_hold_out_whole_conditions_and_every_clip_once():
    clips = two_tests()
    fold_N = folds_of(clips, 5, seed=0)
    assert set(fold_N) == set(range(5))
    of_condition: dict[str, set[int]] = {}
    for one, fold in zip(clips, fold_N, strict=True):
        of_condition.setdefault(one.condition, set()).add(fold)
    assert all(len(folds) == 1 for folds in of_condition.values())  # in both datasets at once
    for name, condition, least in (("wide", 6, 2), ("narrow", 8, 2)):
        counts = Counter(f for f, c in zip(fold_N, clips, strict=True) if c.dataset == name)
        assert set(counts.values()) == {least * condition, (least + 1) * condition}


def test_folds_are_a_function_of_clips_and_seed():
    clips = two_tests()
    fold_N = folds_of(clips, 5, seed=0)
    assert folds_of(clips, 5, seed=0) == fold_N != folds_of(clips, 5, seed=1)
    assert folds_of(clips[::-1], 5, seed=0) == fold_N[::-1]


def test_without_conditions_systems_or_clips_are_spread():
    clips = [clip(k, "systems", system=f"s{k % 7}") for k in range(70)]
    clips += [clip(k, "alone") for k in range(11)]
    fold_N = folds_of(clips, 3, seed=4)
    systems = {(c.system, f) for c, f in zip(clips, fold_N, strict=True) if c.system}
    assert len(systems) == 7
    assert sorted(Counter(fold_N[70:]).values()) == [3, 4, 4]


@pytest.mark.parametrize(
    ("conditions", "folds", "message"),
    [(4, 5, "'a' has 4 conditions for 5 folds"), (3, 2, "'a' has 3 conditions: a fold leaves 1")],
)
def test_too_few_conditions_are_told_by_name(conditions, folds, message):
    clips = [clip(k, condition=f"c{k % conditions}") for k in range(12)]
    with pytest.raises(ValueError, match=message):
        folds_of(clips, folds, seed=0)


def test_a_part_trains_validates_and_judges_on_different_conditions():
    clips = two_tests()
    data = frames_of(np.zeros((174, 1, 1)), np.full(174, 3.0), ["x"] * 174, np.zeros(174, bool))
    cache = FrameCache(data.about, data.frames, {5: "no audio", 100: "no audio"})
    fold_N = folds_of(clips, 5, seed=0)
    everything: list[int] = []
    for fold in range(5):
        part = Part("synthetic", fold, 0, True)
        found, judged = split(cache, clips, fold_N, part, validation_share=0.3)
        rows = [found.train_rows, found.validation_rows, judged]
        assert sorted(np.concatenate(rows)) == sorted(set(range(174)) - {5, 100})
        train, validation, test = (
            {(clips[r].dataset, clips[r].condition) for r in s} for s in rows
        )
        assert not train & validation and not (train | validation) & test
        assert not {c for _, c in train | validation} & {c for _, c in test}
        assert len(found.training_counts) == len(found.validation_sets) == 2
        everything += judged.tolist()
    assert sorted(everything) == sorted(set(range(174)) - {5, 100})


def test_a_fold_without_clips_is_named():
    clips = [clip(k, condition=f"c{k}") for k in range(4)]
    data = frames_of(np.zeros((4, 1, 1)), np.full(4, 3.0), ["a"] * 4, np.zeros(4, bool))
    cache = FrameCache(data.about, data.frames, {0: "no audio"})
    with pytest.raises(ValueError, match="mfcc, fold 2: 0 clips to judge on"):
        split(cache, clips, [2, 0, 1, 0], Part("mfcc", 2, 0, False), 0.5)


# ---------------------------------------------------------------- training


def synthetic(clips: int, shifts: dict[str, float], noise: float = 0.2):
    """(cache, clips): one hidden quality, and each dataset its own scale; features tell neither."""
    rng = np.random.default_rng(3)
    rated, quality = [], []
    for name, shift in shifts.items():
        quality_N = rng.standard_normal(clips)
        for number, value in enumerate(quality_N):
            mos = 1 + 4 / (1 + np.exp(-(value + shift)))
            rated.append(clip(number, name, mos, condition=f"{name}{number % 9}"))
        quality.append(quality_N)
    quality_N = np.concatenate(quality)
    features = quality_N[:, None, None] + noise * rng.standard_normal((len(quality_N), 2, 3))
    names, held_N = [c.dataset for c in rated], np.zeros(len(rated), bool)
    data = frames_of(features, np.array([c.mos for c in rated]), names, held_N)
    return FrameCache(data.about, data.frames, {}), rated


def test_own_scales_err_less_where_scales_differ(tmp_path):
    cache, clips = synthetic(72, {"kind": 1.2, "strict": -1.2})
    settings = TINY.model_copy(update={"steps": 150, "batch": 16, "validate_every": 25, "lr": 2e-2})
    plan = Plan(settings=settings, folds=3, seeds=1, validation_share=0.3)
    results = cv.cross_validate({"synthetic": cache}, clips, plan, tmp_path, QUIET)
    found = {(r.dataset, r.way): r for r in results}
    assert len(found) == len(results) == 6
    for dataset in ("kind", "strict"):
        plain, own, universal = (found[dataset, way] for way in cv.WAYS)
        assert own.clips == plain.clips == universal.clips == 72
        assert own.rmse[0] < plain.rmse[0] - 0.3
        assert own.rmse[0] < universal.rmse[0] - 0.3
        assert own.pcc[0] > 0.9
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["rmse"]) for row in rows] == [r.rmse[0] for r in results]
    assert {row["rmse_sd"] for row in rows} == {""}


def small_run(out: Path) -> list[Result] | None:
    cache, clips = synthetic(18, {"kind": 1.0, "strict": -1.0})
    plan = Plan(settings=TINY, folds=2, seeds=2, validation_share=0.3)
    return cv.cross_validate({"synthetic": cache}, clips, plan, out, QUIET)


def dies_at_update(number: int, out: Path) -> None:
    update, updates = HeadTrainer.update, iter(range(1000))

    def deadly(self, batch):
        if next(updates) == number:
            kill()
        return update(self, batch)

    HeadTrainer.update = deadly
    small_run(out)


def dies_keeping(number: int, out: Path) -> None:
    """Die with the predictions of a training half written."""
    write, writes = cv.write_text, iter(range(1000))

    def deadly(path, text):
        if path.name.startswith("fold-") and next(writes) == number:
            files.write_atomically(
                path, lambda temporary: (temporary.write_text(text[: len(text) // 2]), kill())
            )
        write(path, text)

    cv.write_text = deadly
    small_run(out)


def kill_folds(out: Path) -> None:
    """Killed in the second training, in the third, and before the fourth's file has its name."""
    killed(lambda: dies_at_update(8, out))
    killed(lambda: dies_at_update(9, out))
    killed(lambda: dies_keeping(1, out))


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_results(tmp_path):
    # A process of its own: forks of this one would hang.
    code = (
        "import sys, torch, tests.train.test_cross_validate as t; from pathlib import Path;"
        "torch.set_num_threads(1); broken, unbroken = map(Path, sys.argv[1:]);"
        "t.kill_folds(broken); t.small_run(broken); t.small_run(unbroken)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    subprocess.run(
        [sys.executable, "-c", code, str(broken), str(unbroken)], env=environment, check=True
    )
    kept = sorted(path.relative_to(unbroken) for path in unbroken.rglob("*"))
    assert len(kept) == 3 + 1 + 2 * 2 * 2  # config, results; a folder of 8 trainings
    assert sorted(p.relative_to(broken) for p in broken.rglob("*") if p.suffix != ".tmp") == kept
    for path in kept:
        if (unbroken / path).is_file():
            assert (broken / path).read_bytes() == (unbroken / path).read_bytes(), path


def test_what_is_there_is_not_trained_again(tmp_path, monkeypatch):
    results = small_run(tmp_path)
    (tmp_path / "synthetic/fold-1-seed-0-scaled.json").unlink()
    trained, teach = [], cv.teach
    monkeypatch.setattr(cv, "teach", lambda *a: (trained.append(a[2].name), teach(*a))[1])
    assert small_run(tmp_path) == results
    assert trained == ["fold-1-seed-0-scaled"]


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    cache, clips = synthetic(18, {"kind": 1.0, "strict": -1.0})
    plan = Plan(settings=TINY, folds=2, seeds=1, validation_share=0.3)
    update, updates = HeadTrainer.update, iter(range(1000))

    def stops_in_the_second(self, batch):
        if next(updates) == 8:
            signal.raise_signal(signal.SIGINT)
        return update(self, batch)

    monkeypatch.setattr(HeadTrainer, "update", stops_in_the_second)
    given = ({"synthetic": cache}, clips, plan)
    with pytest.raises(KeyboardInterrupt):
        cv.cross_validate(*given, tmp_path / "stopped", QUIET)
    assert not (tmp_path / "stopped/results.json").exists()
    again = cv.cross_validate(*given, tmp_path / "stopped", QUIET)
    assert again == cv.cross_validate(*given, tmp_path / "unbroken", QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 3}, "folds=2, not 3"),
        ({"validation_share": 0.2}, "validation_share=0.3, not 0.2"),
        ({"settings": TINY.model_copy(update={"lr": 1e-3})}, "lr=0.01, not 0.001"),
        ({"settings": TINY.model_copy(update={"seed": 7})}, "seed=0, not 7"),
    ],
)
def test_another_plan_is_refused_by_name(tmp_path, change, message):
    _, clips = synthetic(18, {"kind": 1.0, "strict": -1.0})
    plan = Plan(settings=TINY, folds=2, seeds=2, validation_share=0.3)
    cv.claim(tmp_path, plan, clips)
    cv.claim(tmp_path, plan.model_copy(update={"seeds": 5}), clips)  # seeds may be added
    with pytest.raises(ValueError, match=f"{message}.*another --out"):
        cv.claim(tmp_path, plan.model_copy(update=change), clips)
    clips[0] = clips[0].model_copy(update={"mos": 1.0})
    with pytest.raises(ValueError, match="clips_sha256="):
        cv.claim(tmp_path, plan, clips)


def test_predictions_of_other_features_are_refused(tmp_path):
    cache, clips = synthetic(18, {"kind": 1.0, "strict": -1.0})
    plan = Plan(settings=TINY, folds=2, seeds=1, validation_share=0.3)
    cv.cross_validate({"synthetic": cache}, clips, plan, tmp_path, QUIET)
    about = cache.about.model_copy(update={"weights_sha256": "1" * 64})
    other = dataclasses.replace(cache, about=about)
    with pytest.raises(ValueError, match=r"plain\.json: holds a run with front_end_sha256="):
        cv.cross_validate({"synthetic": other}, clips, plan, tmp_path, QUIET)


@pytest.mark.parametrize(
    "wrong", [{"folds": 1}, {"seeds": 0}, {"validation_share": 0}, {"validation_share": 0.6}]
)
def test_a_wrong_plan_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Plan(**wrong)


# ---------------------------------------------------------------- what is told


def test_the_table():
    results = [
        Result("mfcc", "narrow", 96, "plain", (0.8, 0.9), (0.5, 0.5)),
        Result("mfcc", "narrow", 96, "own scale", (None, 0.9), (0.4, 0.5)),
        Result("v7-conv", "wide", 78, "universal", (0.7,), (0.25,)),
    ]
    assert cv.table(results).splitlines() == [
        "front end  dataset  clips  way                PCC         RMSE",
        "mfcc       narrow      96  plain     0.850 ±0.071 0.500 ±0.000",
        "mfcc       narrow      96  own scale            - 0.450 ±0.071",
        "v7-conv    wide        78  universal        0.700        0.250",
    ]


def test_predictions_are_put_together_over_folds_and_told_by_seed():
    def row(mos: float, said: float) -> dict:
        return {"dataset": "a", "name": "x", "mos": mos, "logit": 0.0, "plain": said}

    predicted = {
        Part("mfcc", fold, seed, False): [row(1 + fold, 1 + fold + seed), row(3, 3 + seed)]
        for fold in range(2)
        for seed in range(2)
    }
    (result,) = cv.summarise(predicted)
    assert (result.clips, result.rmse) == (4, (0.0, 1.0))
    assert result.pcc == (pytest.approx(1), pytest.approx(1))


# ---------------------------------------------------------------- the verb


def verb(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    cv.add_arguments(parser)
    return cv.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_verb_judges_a_front_end(tmp_path, capsys):
    labels = write_conditions(tmp_path / "rated", clips=20)
    (tmp_path / "rated/5.wav").write_bytes(b"no audio")
    out = tmp_path / "out"
    command = ["--front-end", "mfcc", "--rated", labels, "--out", out, "--folds", 2, "--seeds", 1]
    command += ["--steps", 2, "--batch", 2, "--dim", 4, "--heads", 2, "--layers", 1]
    assert verb(*command) == 0
    said = capsys.readouterr()
    assert "set0 10, set1 10; 2 folds of whole conditions, 1 seeds, 2 steps of 2" in said.out
    assert said.out.count("own scale") == said.out.count("universal") == 2
    assert "mfcc: 1 clips left out" in said.err and "fewer than 300" in said.err
    content = json.loads((out / "results.json").read_text())
    assert {(r["dataset"], r["clips"]) for r in content["results"]} == {("set0", 10), ("set1", 9)}
    assert content["config"]["seeds"] == 1 and list(content["front_ends"]) == ["mfcc"]
    before = (out / "results.json").read_bytes()
    assert verb(*command) == 0
    assert (out / "results.json").read_bytes() == before
    with pytest.raises(ValueError, match="steps=2, not 3"):
        verb(*command, "--steps", 3)


def test_wrong_input_of_the_verb_is_told(tmp_path, capsys):
    labels = write_conditions(tmp_path / "rated", clips=20)
    given = ["--rated", labels, "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="unknown front end 'mfc'; did you mean 'mfcc'"):
        verb("--front-end", "mfc", *given)
    with pytest.raises(ValueError, match="'set0' has 5 conditions for 6 folds"):
        verb("--front-end", "mfcc", *given, "--folds", 6)
    with pytest.raises(
        ValueError, match=r"labels.csv: line 2: .*is there twice \(.*labels.csv: line 2\)"
    ):
        verb("--front-end", "mfcc", *given, "--rated", labels)
    assert not (tmp_path / "out").exists()


def test_one_dataset_is_warned_of(capsys):
    clips = [clip(k, condition=f"c{k % 6}") for k in range(12)]
    cv._warn(clips, folds_of(clips, 3, 0), Plan(folds=3))
    assert "all clips are of dataset 'a'" in capsys.readouterr().err
