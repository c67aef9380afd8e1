"""Finetuning: tasks in turn, figures against a second way, killed and continued, bad input."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.interpolate
import scipy.optimize
import soundfile
import torch

from data_specs.io.errors import UserError
from data_specs.labelled import LabelledClip, read_labelled
from tests.train.test_encoders import write_checkpoint
from tests.train_helpers import (
    dies_at,
    killed,
    logged,
    require_same_states,
    tone,
    tone_mos,
    write_dataset,
)
from train.__main__ import main
from train.data.stream import Waves
from train.files import load_checkpoint
from train.finetune.clips import TaskClips, shard_clips, turns
from train.finetune.finetune import Finetuning
from train.finetune.saved import load_model
from train.finetune.tasks.speakers import Speakers
from train.finetune.tasks.task import mean_over
from train.finetune.tasks.trials import errors, trials_of
from train.models.encoders.interface import States


def write_clips(folder: Path) -> Path:
    """Words are pitches, speakers a second tone: 8 to train, 3 to validate, 3 to test, 2 each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for speaker, split in enumerate(["train"] * 8 + ["validation"] * 3 + ["test"] * 3):
        for word, hz in (("low", 400), ("high", 2500)):
            time_s = np.arange(4000 + int(rng.integers(0, 1000))) / 16_000
            wave = sum(np.sin(2 * np.pi * f * time_s) for f in (hz, 150 + 60 * speaker))
            name = f"{speaker}-{word}.wav"
            soundfile.write(
                folder / name, 0.2 * wave + 0.01 * rng.standard_normal(len(wave)), 16_000
            )
            rows.append([name, split, word, f"s{speaker}", 2 + 2 * (word == "low") + speaker / 20])
    with (folder / "tones.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "split", "keyword", "speaker", "mos"], *rows])
    return folder / "tones.csv"


@pytest.fixture(scope="module")
def tones_csv(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("finetune") / "clips")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    write_checkpoint(folder, "whisper")
    return folder


def command(encoder: object, clips: Path, out: Path, *more: object) -> list[str]:
    words = ["finetune", "--encoder", encoder, "--clips", clips, "--out", out, "--seconds", 0.3]
    words += ["--steps", 8, "--batch", 4, "--validate-every", 4, "--warmup", 2, "--device", "cpu"]
    return [*map(str, [*words, "--logger", "none", *more])]


JOINT = ("--tasks", "keywords", "speakers", "quality")


def test_the_words_are_learned_and_judged(tones_csv, tmp_path):
    more = ("--tasks", "keywords", "--steps", 60, "--validate-every", 30, "--head-lr", 0.05)
    assert main(command("log-mel", tones_csv, tmp_path, *more)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["rows"]
    assert row["value"] == 1 and row["clips"] == 6 and row["speakers"] == 3
    assert row["dataset"] == "tones" and results["parameters"] == 0
    assert "--head-lr 0.05" in results["command"]


def test_killed_and_continued_equals_unbroken(tones_csv, whisper, tmp_path, monkeypatch):
    def run(out: Path) -> None:
        assert main(command(whisper, tones_csv, out, *JOINT, "--checkpoint-every", 1)) == 0

    run(tmp_path / "whole")
    killed(
        lambda: dies_at(
            Finetuning, "update", lambda task: task.step == 6, lambda: run(tmp_path / "cut")
        )
    )
    run(tmp_path / "cut")
    stopped = command(whisper, tones_csv, tmp_path / "stopped", *JOINT)
    update = Finetuning.update

    def presses(self: Finetuning, batch: Any) -> torch.Tensor:
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return update(self, batch)

    monkeypatch.setattr(Finetuning, "update", presses)
    assert main(stopped) == 130
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "stopped/last.pt")["step"] == 4
    assert main(stopped) == 0
    for name in ("cut", "stopped"):
        require_same_states(tmp_path / "whole", tmp_path / name, "encoder", "tasks")
        assert logged(tmp_path / name) == logged(tmp_path / "whole")
        for file in ("encoder.safetensors", "tasks.safetensors", "results.csv"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    _, tasks, about = load_model(tmp_path / "whole")
    assert set(tasks) == {"keywords", "speakers", "quality"}
    assert {row["figure"] for row in about["results"]["rows"]} == {
        "accuracy",
        "eer",
        "min_dcf",
        "pcc",
        "rmse",
    }


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_the_family_is_finetuned_by_the_same_command(kind, tones_csv, tmp_path):
    write_checkpoint(tmp_path / "official", kind)
    assert (
        main(command(tmp_path / "official", tones_csv, tmp_path / "run", *JOINT, "--steps", 3)) == 0
    )
    # A finetuned model is an encoder to go on with.
    again = command(
        tmp_path / "run", tones_csv, tmp_path / "frozen", *JOINT, "--steps", 3, "--frozen"
    )
    assert main(again) == 0
    one, other = (
        (tmp_path / run / "encoder.safetensors").read_bytes() for run in ("run", "frozen")
    )
    assert one == other


def test_random_start_is_another_network_of_the_same_size(tones_csv, whisper, tmp_path):
    for start in ("pretrained", "random"):
        run = command(
            whisper, tones_csv, tmp_path / start, *JOINT, "--steps", 1, "--start", start, "--frozen"
        )
        assert main(run) == 0
    sizes = [
        json.loads((tmp_path / s / "encoder.json").read_text()) for s in ("pretrained", "random")
    ]
    assert sizes[0]["parameters"] == sizes[1]["parameters"]
    assert sizes[0]["weights_sha256"] != sizes[1]["weights_sha256"]


def test_quality_is_learned_from_shards(tones_csv, tmp_path):
    shards = write_dataset(tmp_path / "shards", shards=2, samples=3)
    more = ("--tasks", "quality", "--shards", f"train={shards}", "--seconds", 1, "--steps", 2)
    assert main(command("log-mel", tones_csv, tmp_path / "run", *more)) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {row["dataset"] for row in results["rows"]} == {"tones"}
    assert main(command("log-mel", tones_csv, tmp_path / "other", *more, "--shards", "x=y")) == 2
    clips, readers = shard_clips([f"test={shards}"])
    assert [clip.mos for clip in clips] == [tone_mos(number) for number in range(6)]
    np.testing.assert_array_equal(readers[clips[4].path](), tone(4))


def test_tasks_are_drawn_by_their_share_and_evenly():
    found = turns({"keywords": 0.5, "speakers": 0.3, "quality": 0.2}, 100)
    assert Counter(task for task, _ in found) == {"keywords": 50, "speakers": 30, "quality": 20}
    assert found[:10] == turns({"keywords": 0.5, "speakers": 0.3, "quality": 0.2}, 10)
    for task in ("keywords", "speakers", "quality"):
        assert [n for name, n in found if name == task] == list(
            range(sum(t == task for t, _ in found))
        )
    for step in range(1, 101):
        assert abs(sum(t == "keywords" for t, _ in found[:step]) - step / 2) <= 1


def eer_by_roots(scores: np.ndarray, is_target: np.ndarray) -> float:
    """The usual recipe: the root of 1 - x - ROC(x), the ROC point by point in Python."""
    points = [(0.0, 0.0)]
    for threshold in sorted(set(scores), reverse=True):
        accepted = scores >= threshold
        points.append((accepted[~is_target].mean(), accepted[is_target].mean()))
    alarms, hits = zip(*points, strict=True)
    roc = scipy.interpolate.interp1d(alarms, hits)
    return float(scipy.optimize.brentq(lambda x: 1 - x - roc(x), 0, 1))


@pytest.mark.parametrize("seed", range(5))
def test_equal_error_rate_and_cost_are_those_of_a_second_way(seed):
    rng = np.random.default_rng(seed)
    is_target = rng.random(300) < 0.3
    scores = np.round(rng.standard_normal(300) + 1.5 * is_target, 1)  # with ties
    rate, cost = errors(scores, is_target, np.ones((1, 300)))
    # A vertical step of the ROC is one point of interp1d's choice: one target's share at most.
    assert rate[0] == pytest.approx(eer_by_roots(scores, is_target), abs=1 / is_target.sum())
    costs = [
        0.01 * (scores[is_target] < t).mean() + 0.99 * (scores[~is_target] >= t).mean()
        for t in [*scores, np.inf]
    ]
    assert cost[0] == pytest.approx(min(costs) / 0.01, abs=1e-9)


def test_a_resample_is_the_trials_repeated():
    rng = np.random.default_rng(0)
    is_target, scores = np.arange(40) % 3 == 0, rng.standard_normal(40)
    counts = rng.integers(0, 3, 40)
    weighted = errors(scores, is_target, counts[None].astype(float))
    repeated = errors(scores.repeat(counts), is_target.repeat(counts), np.ones((1, counts.sum())))
    np.testing.assert_allclose(weighted, repeated, atol=1e-12)


def test_am_softmax_is_its_formula():
    torch.manual_seed(0)
    task = Speakers(1, 4, ["a", "b", "c"])
    states = States((torch.randn(2, 5, 4),), torch.tensor([5, 3]))
    clips = [LabelledClip(path=Path(s), dataset="d", split="train", speaker=s) for s in "bc"]
    embeddings = task.embeddings(states)
    total = 0.0
    for embedding, own in zip(embeddings, (1, 2), strict=True):
        cosines = [
            float(torch.cosine_similarity(embedding, centre, dim=0).detach())
            for centre in task.centres_SE
        ]
        top = math.exp(30 * (cosines[own] - 0.4))
        total -= math.log(
            top / (top + sum(math.exp(30 * c) for k, c in enumerate(cosines) if k != own))
        )
    # Float32 cosines times 30.
    assert float(task.loss(states, clips)) == pytest.approx(total / 2, rel=1e-4)


def test_what_all_clips_have_in_common_moves_no_speaker():
    torch.manual_seed(0)
    task = Speakers(1, 4, ["a", "b"])
    x, lengths = torch.randn(3, 5, 4), torch.tensor([5, 5, 5])
    near = task.embeddings(States((x,), lengths))
    far = task.embeddings(States((x + 100,), lengths))
    # A hundred more leaves float32 some 1e-5 of each value.
    torch.testing.assert_close(far, near, rtol=0, atol=1e-3)
    with pytest.raises(UserError, match="--batch must be 2 or more"):
        clip = LabelledClip(path=Path("a"), dataset="d", split="train", speaker="a")
        task.loss(States((x[:1],), lengths[:1]), [clip])


def test_a_mean_is_over_a_clips_own_frames():
    x = torch.arange(12.0).reshape(2, 3, 2)
    x[1, 2] = torch.nan
    states = States((x,), torch.tensor([3, 2]))
    assert mean_over(x, states).tolist() == [[2.0, 3.0], [7.0, 8.0]]


def bad(tmp_path: Path, tones_csv: Path, change, *more: object) -> str:
    rows = list(csv.reader(tones_csv.open()))
    for row in rows[1:]:
        row[0] = str(tones_csv.parent / row[0])
    changed = tmp_path / "changed.csv"
    with changed.open("w", newline="") as file:
        csv.writer(file).writerows(change(rows))
    with pytest.raises(UserError) as told:
        import argparse

        from train.finetune.finetune import add_arguments, run

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        run(parser.parse_args(command("log-mel", changed, tmp_path / "run", *more)[1:]))
    return str(told.value)


def column_gone(rows):
    return [row[:2] + row[3:] for row in rows]


def new_word(rows):
    rows[-1][2] = "hihg"
    return rows


def no_test(rows):
    return [row for row in rows if row[1] != "test"]


def strange_split(rows):
    rows[3][1] = "trian"
    return rows


def test_bad_clips_are_told_by_name(tones_csv, tmp_path):
    words = ("--tasks", "keywords")
    assert "task keywords needs clips with a keyword: add a column 'keyword'" in bad(
        tmp_path, tones_csv, column_gone, *words
    )
    said = bad(tmp_path, tones_csv, new_word, *words)
    assert "changed.csv: line 29: unknown keyword 'hihg'; did you mean 'high'?" in said
    assert "no clip with a keyword has the split 'test'" in bad(
        tmp_path, tones_csv, no_test, *words
    )
    said = bad(tmp_path, tones_csv, strange_split, *words)
    assert "line 4: unknown split 'trian'; did you mean 'train'?" in said
    assert "unknown task 'keyword'; did you mean 'keywords'?" in bad(
        tmp_path, tones_csv, list, "--tasks", "keyword"
    )
    assert "--seconds 200" in bad(tmp_path, tones_csv, list, *words, "--seconds", 200)


def test_a_clip_that_cannot_be_read_is_told_before_training(tones_csv, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")

    def broken(rows):
        rows[5][0] = str(tmp_path / "broken.wav")
        return rows

    said = bad(tmp_path, tones_csv, broken, "--tasks", "keywords")
    assert "1 clips cannot be read" in said and "changed.csv: line 6" in said
    assert not (tmp_path / "run" / "last.pt").exists()


def test_trials_are_read_and_held_to_the_test_clips(tones_csv, tmp_path):
    # Two datasets: each is judged by its own trials.
    head, *rows = csv.reader(tones_csv.open())
    rows += [
        [f"../clips/{s}-{w}.wav", "test", w, f"t{s}", "3"] for s in (0, 1) for w in ("low", "high")
    ]
    table = tones_csv.parent / "two.csv"
    lines = [[*head, "dataset"]] + [[*r, "b" if r[3][0] == "t" else "a"] for r in rows]
    table.write_text("\n".join(",".join(line) for line in lines))
    listed = tones_csv.parent / "trials.txt"
    trials = ["1 11-low.wav 11-high.wav", "0 11-low.wav 12-low.wav", "0 12-low.wav 13-low.wav"]
    listed.write_text("\n".join([*trials, "1 0-low.wav 0-high.wav", "0 1-low.wav 0-low.wav\n"]))
    run = command("log-mel", table, tmp_path / "run", "--tasks", "speakers", "--steps", 2)
    assert main([*run, "--trials", str(listed)]) == 0
    found = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    assert [(row["dataset"], row["clips"]) for row in found] == [("a", 6)] * 2 + [("b", 4)] * 2
    listed.write_text("1 11-low.wav 11-high.wav\n0 11-low.wav 12-low.wav\n")
    run = command("log-mel", table, tmp_path / "third", "--tasks", "speakers")
    assert main([*run, "--trials", str(listed)]) == 2  # none of dataset b: said before training
    assert not (tmp_path / "third/last.pt").exists()
    listed.write_text("1 0-low.wav 0-high.wav\n")
    assert (
        main(
            [
                *command("log-mel", tones_csv, tmp_path / "other", "--tasks", "speakers"),
                "--trials",
                str(listed),
            ]
        )
        != 0
    )
    clips = [LabelledClip(path=Path(n), dataset="d", split="test", speaker=n) for n in "ab"]
    with pytest.raises(UserError, match="not of both kinds"):
        trials_of(clips)


def test_the_teachers_clean_twin_is_cropped_where_the_clip_is(tones_csv, tmp_path):
    folder = tones_csv.parent
    head, *rows = list(csv.reader(tones_csv.open()))
    twin = [[*row, row[0]] for row in rows]
    (folder / "twins.csv").write_text("\n".join(",".join(row) for row in [[*head, "clean"], *twin]))
    clips = read_labelled([folder / "twins.csv"])[:3]
    data = TaskClips({}, Waves(1e9), 2000)
    batch = data.batch("keywords", clips, [0.0, 0.3, 1.0])
    assert batch.lengths_B.tolist() == [2000] * 3
    assert torch.equal(batch.waves_BT, batch.clean_BT)
    whole = data.waves.read(clips[2].path)
    np.testing.assert_array_equal(batch.waves_BT[2], whole[-2000:])
    assert data.batch("keywords", [clips[0].model_copy(update={"clean": None})]).clean_BT is None
    other = clips[0].model_copy(update={"clean": clips[1].path})
    with pytest.raises(UserError, match="clean twin is not as long"):
        TaskClips({}, Waves(0), 16_000).batch("keywords", [other])


def test_a_clip_named_twice_is_told(tones_csv):
    path = tones_csv.parent / "twice.csv"
    path.write_text("path,split,keyword\n0-low.wav,train,low\n0-low.wav,test,low\n")
    with pytest.raises(UserError, match=r"line 3: .*0-low.wav is named twice, first in .*line 2"):
        read_labelled([path])
    path.write_text("path,split,word\n0-low.wav,train,low\n")
    with pytest.raises(UserError, match="no column of labels"):
        read_labelled([path])
