"""Training a teacher's head: scales are recovered, kills cost nothing, caches are as they say."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch

from data_specs.io.files import sha256_of
from data_specs.rated import RatedClip, read_rated
from tests.tolerance import STUDENT
from tests.train_helpers import (
    dies_at,
    dies_writing,
    interrupted,
    kill,
    killed,
    logged,
    python,
    require_same_states,
    tone_pcm,
    write_rated,
)
from train import files
from train.__main__ import main
from train.data.hold_out import hold_out
from train.files import load_checkpoint
from train.loop.loop import Host
from train.models.calibration import Affine, Calibration
from train.models.front_end import load_front_end
from train.models.head import HeadConfig, build_head
from train.teacher import feature_cache as frame_cache
from train.teacher import fit as teacher_fit
from train.teacher.feature_cache import About, FrameCache, from_bits, open_cache, to_bits
from train.teacher.fit import HeadTrainer, Settings
from train.teacher.rated_frames import Draws, RatedFrames, gather, usable

QUIET = Host(device="cpu", progress=False, log_every=2, checkpoint_every=3)


def frames_of(
    features_NLC: np.ndarray, mos_N: np.ndarray, datasets_N: list[str], held_N: np.ndarray
) -> RatedFrames:
    """Features without audio, as if a cache had given them."""
    count, tokens, channels = features_NLC.shape
    about = About(
        front_end="synthetic",
        weights_sha256="0" * 64,
        precision="float32",
        tokens=tokens,
        channels=channels,
        clips=count,
        clips_sha256="0" * 64,
    )
    clips = [
        RatedClip(path=Path(f"{number}.wav"), mos=float(mos), dataset=name)
        for number, (mos, name) in enumerate(zip(mos_N, datasets_N, strict=True))
    ]
    bits = to_bits(torch.from_numpy(features_NLC).float())
    return RatedFrames(about, bits, clips, np.flatnonzero(~held_N), np.flatnonzero(held_N))


def tiny() -> RatedFrames:
    """60 clips of three datasets, a quarter of them for validation."""
    rng = np.random.default_rng(5)
    quality_N = rng.standard_normal(60)
    features_NLC = quality_N[:, None, None] + 0.3 * rng.standard_normal((60, 4, 3))
    mos_N = 1 + 4 / (1 + np.exp(-quality_N))
    return frames_of(features_NLC, mos_N, list("abc") * 20, np.arange(60) % 4 == 0)


def tiny_config(data: RatedFrames, **changes) -> teacher_fit.TeacherConfig:
    values = {"steps": 12, "batch": 4, "validate_every": 4, "dim": 4, "heads": 2, "layers": 1}
    values |= {"dropout": 0.1, "lr": 1e-2}
    return teacher_fit.make_config(Settings(**(values | changes)), data)


# ---------------------------------------------------------------- scales: recovered, and of use

# Scale, shift, training clips, what the dataset leans to (below). The first two are what training
# must find: shifts are far enough from 0 for 5 % of them to be measurable.
TRUTH = {
    "a": (0.70, 0.8, 12_000, 0.3),
    "b": (1.00, -0.7, 8000, -0.25),
    "c": (1.40, 1.1, 6000, 0.4),
    "d": (1.70, -1.0, 5000, -0.4),
    "e": (0.85, 0.9, 4000, 0.1),
}
UNSEEN = (1.2, 0.3)
VALIDATION_CLIPS, VOTES = 1000, 20


def simulate(clips: int, lean: float, spread: float, rng: np.random.Generator):
    """(hidden quality (N,), features (N, 2, 3)): each feature mixes quality with something else.

    That something (think of bandwidth) says nothing about quality, but datasets lean to one side of
    it: a head that wants to know where a clip is from can guess it from there.
    """
    quality_N, other_N = rng.normal(0, 1, clips), rng.normal(lean, spread, clips)
    mixed_N3 = np.stack(
        [quality_N + other_N, quality_N - other_N, 0.5 * quality_N + other_N], axis=1
    )
    noise_NLC = rng.normal(0, 0.1, (clips, 2, 3))
    return quality_N, np.repeat(mixed_N3[:, None], 2, axis=1) + noise_NLC


def votes_of(quality_N: np.ndarray, scale: float, shift: float, rng: np.random.Generator):
    """Ratings within 1 to 5, noisy but with the right mean: a mean of votes."""
    share_N = 1 / (1 + np.exp(-(scale * quality_N + shift)))
    return 1 + 4 * rng.binomial(VOTES, share_N) / VOTES


@pytest.fixture(scope="module")
def simulation() -> RatedFrames:
    rng = np.random.default_rng(0)
    features, ratings, names, held = [], [], [], []
    for name, (scale, shift, clips, lean) in TRUTH.items():
        quality_N, features_NLC = simulate(clips + VALIDATION_CLIPS, lean, 1.0, rng)
        features.append(features_NLC)
        ratings.append(votes_of(quality_N, scale, shift, rng))
        names += [name] * len(quality_N)
        held += [False] * clips + [True] * VALIDATION_CLIPS
    return frames_of(np.concatenate(features), np.concatenate(ratings), names, np.array(held))


@pytest.fixture(scope="module")
def trained(simulation, tmp_path_factory) -> dict[bool, Path]:
    """The simulation trained with (True) and without (False) scales: their run folders."""
    runs = {}
    changes = {"steps": 4000, "batch": 128, "lr": 2e-3, "validate_every": 400}
    changes |= {"dim": 16, "dropout": 0.0}
    host = Host(device="cpu", progress=False)
    for aware in (True, False):
        runs[aware] = tmp_path_factory.mktemp("trained") / f"aware-{aware}"
        config = tiny_config(simulation, bias_aware=aware, **changes)
        teacher_fit.train_teacher(config, simulation, runs[aware], host)
    return runs


def exported(run: Path):
    """(head in eval mode, head.json) of a run folder."""
    about = json.loads((run / "head.json").read_text())
    head = build_head(HeadConfig.model_validate(about["head"]))
    head.load_state_dict(safetensors.torch.load_file(run / "head.safetensors"))
    return head.eval(), about


def aligned(found: dict[str, Affine]) -> dict[str, tuple[float, float]]:
    """Found scales and shifts in the truth's units of quality.

    What is hidden has no unit: ``z = (quality - origin) / unit`` with scales ``scale * unit`` and
    shifts ``shift + scale * origin`` fits every rating as well, for any unit and origin that all
    datasets share. These two numbers are found first, by least squares over the five datasets.
    """
    truth_D2 = np.array([TRUTH[name][:2] for name in found])
    found_D2 = np.array([[affine.scale, affine.shift] for affine in found.values()])
    true_D = truth_D2[:, 0]
    unit = found_D2[:, 0] @ true_D / (true_D @ true_D)
    origin = (found_D2[:, 1] - truth_D2[:, 1]) @ true_D / (true_D @ true_D)
    scales_D = found_D2[:, 0] / unit
    shifts_D = found_D2[:, 1] - origin * true_D
    return dict(zip(found, zip(scales_D, shifts_D, strict=True), strict=True))


@pytest.mark.slow
def test_every_scale_and_shift_is_recovered(trained):
    _, about = exported(trained[True])
    found = aligned(Calibration.model_validate(about["calibration"]).datasets)
    assert list(found) == list(TRUTH)
    for name, (scale, shift) in found.items():
        assert scale == pytest.approx(TRUTH[name][0], rel=0.05), name
        assert shift == pytest.approx(TRUTH[name][1], rel=0.05), name


@pytest.mark.slow
def test_scales_help_on_a_dataset_that_was_never_seen(trained):
    # It leans to nothing, and spreads wider: where a clip seems to be from does not help here.
    rng = np.random.default_rng(99)
    quality_N, features_NLC = simulate(2000, 0.0, 1.5, rng)
    mos_N = votes_of(quality_N, *UNSEEN, rng)
    features = from_bits(to_bits(torch.from_numpy(features_NLC).float())).float()
    pcc = {}
    for aware, run in trained.items():
        head, about = exported(run)
        with torch.inference_mode():
            logits_N = head(features).double().numpy()
        universal = about["calibration"]["universal"] if aware else {}
        pcc[aware] = np.corrcoef(Affine(**universal).mos(logits_N), mos_N)[0, 1]
    assert pcc[True] > pcc[False] + 0.02


@pytest.mark.slow
def test_own_scales_fit_the_validation_sets_better(trained):
    losses = {aware: exported(run)[1]["metrics"]["loss"] for aware, run in trained.items()}
    assert losses[True] < losses[False]
    for row in exported(trained[True])[1]["metrics"]["sets"]:
        assert row["rmse"] < row["rmse_universal"]


@pytest.mark.slow
def test_without_scales_nothing_is_scaled(trained):
    _, about = exported(trained[False])
    assert about["calibration"] is None
    for row in about["metrics"]["sets"]:
        assert (row["pcc"], row["rmse"]) == (row["pcc_universal"], row["rmse_universal"])
    scales = load_checkpoint(trained[False] / "last.pt")["scales"]
    assert not any(tensor.any() for tensor in scales.values())


@pytest.mark.slow
def test_the_best_validation_is_kept(trained):
    for run in trained.values():
        rows = logged(run)
        losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
        metrics = exported(run)[1]["metrics"]
        assert sorted(losses) == list(range(400, 4001, 400))
        assert metrics["step"] == min(losses, key=losses.__getitem__)
        assert metrics["loss"] == min(losses.values())


# ---------------------------------------------------------------- drawing


def test_datasets_are_drawn_by_their_clips_up_to_the_cap():
    sizes = {"huge": 40_000, "large": 7000, "medium": 3500, "small": 700}
    names = [name for name, size in sizes.items() for _ in range(size)]
    data = frames_of(
        np.zeros((len(names), 1, 1)), np.full(len(names), 3.0), names, np.zeros(len(names), bool)
    )
    draws = Draws(data, cap=7000, batch=12, seed=1)
    drawn = np.concatenate([draws.rows(step)[0] for step in range(4000)])
    counts = Counter(names[row] for row in drawn)
    weights = {name: min(size, 7000) for name, size in sizes.items()}
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        sigma = np.sqrt(share * (1 - share) / len(drawn))
        assert counts[name] / len(drawn) == pytest.approx(share, abs=4 * sigma), name
    # Within a dataset every clip is drawn alike.
    small = drawn[[names[row] == "small" for row in drawn]]
    assert len(np.unique(small)) > 0.9 * sizes["small"]


def test_batches_are_a_function_of_seed_and_step():
    data = tiny()
    draws, again = Draws(data, 7000, 4, 1), Draws(data, 7000, 4, 1)
    other = Draws(data, 7000, 4, 2)
    rows = [draws.rows(step)[0].tolist() for step in range(5)]
    assert rows[::-1] == [again.rows(step)[0].tolist() for step in range(4, -1, -1)]
    assert rows != [other.rows(step)[0].tolist() for step in range(5)]
    assert len({tuple(row) for row in rows}) == 5
    assert not set(itertools.chain(*rows)) & set(data.validation_rows)
    batch = draws.read(3)
    for row, mos, number in zip(rows[3], batch.mos, batch.datasets, strict=True):
        assert data.clips[row].mos == pytest.approx(float(mos))
        assert data.clips[row].dataset == "abc"[int(number)]


def test_scales_are_learned_without_weight_decay(tmp_path):
    data = tiny()
    trainer = HeadTrainer(tiny_config(data, weight_decay=0.5), data.training_counts)
    decays = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert {decays[id(p)] for p in trainer.scales.parameters()} == {0.0}
    assert {decays[id(p)] for p in trainer.head.parameters()} == {0.5}
    plain = HeadTrainer(tiny_config(data, bias_aware=False), data.training_counts)
    assert len(plain.optimizer.param_groups) == 1


def test_a_set_without_a_scale_gets_the_mean_of_the_others():
    data = tiny()
    trainer = HeadTrainer(tiny_config(data), {"a": 300, "b": 100})
    with torch.no_grad():
        trainer.scales.log_scale_D.copy_(torch.tensor([1.0, -1.0]))
        trainer.scales.shift_D.copy_(torch.tensor([0.0, 2.0]))
    assert trainer.own("b").shift == 2
    assert trainer.own("new").scale == pytest.approx(np.exp(0.5), rel=1e-6)
    assert trainer.own("new").shift == pytest.approx(0.5)


# ---------------------------------------------------------------- killed and continued


class SumsFrontEnd:
    """A front end that needs no network, and counts the clips that it was given."""

    name, weights_sha256 = "sums", "a" * 64
    channels, tokens = 3, 4
    device = torch.device("cpu")

    def __init__(self, before: Callable[[int], None] = lambda clips: None) -> None:
        self.clips, self.before = 0, before

    def frames(self, waves_BT: torch.Tensor) -> torch.Tensor:
        self.before(self.clips)
        self.clips += len(waves_BT)
        return 100 * waves_BT[:, -1200:].reshape(-1, 4, 3, 100).mean(-1)


def train_tiny(out: Path) -> None:
    data = tiny()
    teacher_fit.train_teacher(tiny_config(data), data, out, QUIET)


def kill_training(out: Path) -> None:
    """A run killed again and again, each time further on; not finished."""
    work = partial(train_tiny, out)

    def killed_at(step: int) -> None:
        killed(lambda: dies_at(HeadTrainer, "update", lambda task: task.step == step, work))

    killed_at(1)  # nothing saved yet: begins anew
    killed(lambda: dies_writing("last.pt", 1, True, work))  # the checkpoint of step 3
    killed(lambda: dies_writing("last.pt", 2, False, work))  # step 4: best.pt is written already
    killed_at(5)
    killed(lambda: dies_writing("best.pt", 1, True, work))
    killed_at(11)
    killed(lambda: dies_writing("head.safetensors", 1, True, work))  # trained, not yet exported
    killed(lambda: dies_writing("head.json", 1, False, work))


def kill_caching(folder: Path, labels: Path) -> None:
    """A cache whose filling is killed at the first clip and at a later one; not finished."""
    frame_cache.COMMIT_SECONDS = 0.0

    def dies_at(number: int) -> None:
        front_end = SumsFrontEnd(lambda clips: kill() if clips == number else None)
        open_cache(folder, read_rated(labels), front_end)

    killed(lambda: dies_at(0))
    killed(lambda: dies_at(2))
    killed(lambda: dies_at(1))


@pytest.fixture(scope="module")
def kills(tmp_path_factory) -> Path:
    """A folder where a process of its own left what kills leave: forks of this one would hang."""
    folder = tmp_path_factory.mktemp("kills")
    labels = write_rated(folder / "rated", clips=8, seconds=0.2)
    code = (
        "import sys, torch, tests.train.test_teacher_fit as t;"
        "from pathlib import Path; torch.set_num_threads(1);"
        "broken, cache, labels, unbroken = map(Path, sys.argv[1:]);"
        "t.kill_training(broken); t.kill_caching(cache, labels);"
        "t.train_tiny(broken); t.train_tiny(unbroken)"
    )
    python("-c", code, folder / "broken", folder / "cache", labels, folder / "unbroken")
    return folder


def test_a_run_killed_at_any_point_ends_at_the_same_bits(kills):
    broken, unbroken = kills / "broken", kills / "unbroken"
    for name in ("head.safetensors", "head.json", "validation.csv", "config.json"):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert load_checkpoint(broken / "last.pt")["step"] == 12
    require_same_states(broken, unbroken, "head", "scales", "best")


def test_the_log_of_a_killed_run_has_each_step_once(kills):
    def entries(run: str) -> list[tuple[int, float]]:
        rows = logged(kills / run)
        return [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]

    assert entries("broken") == entries("unbroken")
    assert [step for step, _ in entries("broken")] == [4, 8, 12]


def test_a_cache_killed_while_it_was_filled_goes_on(kills, tmp_path):
    folder, clips = kills / "cache", read_rated(kills / "rated/labels.csv")
    lines = (folder / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 2]  # none lost, none twice
    # What a crash of the machine could add: half a line, and half of that row's features.
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"row": 3, "dataset": "se')
    with (folder / "frames.u16").open("r+b") as file:
        file.seek(3 * 4 * 3 * 2)
        file.write(b"\xff" * 7)
    front_end = SumsFrontEnd()
    cache = open_cache(folder, clips, front_end)
    assert front_end.clips == 5
    fresh = open_cache(tmp_path, clips, SumsFrontEnd())
    assert cache.bad == fresh.bad == {}
    assert cache.frames.tobytes() == fresh.frames.tobytes()
    assert cache.frames.any(axis=(1, 2)).all()
    again = SumsFrontEnd()
    open_cache(folder, clips, again)
    assert again.clips == 0


def test_a_stopped_run_continues(tmp_path, monkeypatch):
    data = tiny()
    config = tiny_config(data)
    with interrupted(HeadTrainer, 4):
        teacher_fit.train_teacher(config, data, tmp_path / "run", QUIET)
    assert load_checkpoint(tmp_path / "run/last.pt")["step"] == 5
    teacher_fit.train_teacher(config, data, tmp_path / "run", QUIET)
    teacher_fit.train_teacher(config, data, tmp_path / "unbroken", QUIET)
    ours, theirs = (tmp_path / run / "head.safetensors" for run in ("run", "unbroken"))
    assert ours.read_bytes() == theirs.read_bytes()


# ---------------------------------------------------------------- settings and splits


@pytest.mark.parametrize(
    "change",
    [{"lr": 1e-3}, {"bias_aware": False}, {"dim": 8}, {"seed": 3}, {"cap": 5}, {"dropout": 0.0}],
)
def test_a_run_of_another_configuration_is_refused_by_name(tmp_path, change):
    data = tiny()
    trainer = HeadTrainer(tiny_config(data), data.training_counts)
    files.save_checkpoint(tmp_path / "last.pt", trainer.checkpoint())
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*another --out"):
        teacher_fit.train_teacher(tiny_config(data, **change), data, tmp_path, QUIET)


def test_other_ratings_are_another_run(tmp_path):
    data = tiny()
    trainer = HeadTrainer(tiny_config(data), data.training_counts)
    files.save_checkpoint(tmp_path / "last.pt", trainer.checkpoint())
    clips = [clip.model_copy(update={"mos": 3.0}) for clip in data.clips]
    other = RatedFrames(data.about, data.frames, clips, data.train_rows, data.validation_rows)
    with pytest.raises(ValueError, match="train_sha256"):
        teacher_fit.train_teacher(tiny_config(other), other, tmp_path, QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 1}, "batch"),
        ({"lr": 0}, "lr"),
        ({"cap": 0}, "cap"),
        ({"dim": 30}, "dim 30 is not a multiple of heads 4"),
        ({"dim": 5, "heads": 5}, "dim"),
        ({"dropout": 1}, "dropout"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_the_defaults_are_the_papers():
    settings = Settings()
    assert (settings.steps, settings.validate_every, settings.batch) == (72_000, 3000, 12)
    assert (settings.lr, settings.cap, settings.bias_aware) == (1e-4, 7000, True)
    assert (settings.dim, settings.heads, settings.layers) == (32, 4, 4)


def clip(name: str, dataset: str = "set", **values) -> RatedClip:
    return RatedClip(path=Path(name), mos=3.0, dataset=dataset, **values)


def test_conditions_are_held_out_whole():
    clips = [
        *(clip(f"{k}", "conditions", condition=f"c{k % 20}", system="one") for k in range(80)),
        *(clip(f"{k}", "systems", system=f"s{k % 10}") for k in range(40)),
        *(clip(f"{k}", "clips") for k in range(50)),
    ]
    held = hold_out(clips, seed=0)
    for name, key, groups in (("conditions", "condition", 2), ("systems", "system", 1)):
        ours = [(getattr(c, key), h) for c, h in zip(clips, held, strict=True) if c.dataset == name]
        out, kept = {k for k, h in ours if h}, {k for k, h in ours if not h}
        assert len(out) == groups
        assert not out & kept
    assert sum(h for c, h in zip(clips, held, strict=True) if c.dataset == "clips") == 5
    assert hold_out(clips, seed=0) == held != hold_out(clips, seed=1)
    # Another dataset, or another order, moves nothing.
    assert hold_out([clip("x", "new"), clip("y", "new"), *clips], seed=0)[2:] == held
    assert hold_out(clips[::-1], seed=0) == held[::-1]


def test_nothing_to_hold_out_is_said():
    clips = [clip(str(k), condition="c0") for k in range(5)]
    with pytest.raises(ValueError, match="'set' has one condition only: say which clips validate"):
        hold_out(clips, 0)


def test_a_clip_must_not_train_and_validate(tmp_path):
    labels = write_rated(tmp_path, clips=4, seconds=0.1)
    with pytest.raises(
        ValueError, match=r"labels.csv: line 2: .*0\.wav both trains and validates .*4 clips"
    ):
        gather([labels], [labels], 0)


def test_one_cache_serves_any_split(tmp_path):
    labels = write_rated(tmp_path, clips=6, seconds=0.1)
    rows = labels.read_text().splitlines()
    parts = [tmp_path / "first.csv", tmp_path / "second.csv"]
    parts[0].write_text("\n".join([rows[0], *rows[4:]]) + "\n")
    parts[1].write_text("\n".join(rows[:4]) + "\n")
    whole, held = gather([labels], [], 0)
    split, held_of_split = gather([parts[0]], [parts[1]], 0)
    assert [clip.model_dump() for clip in whole] == [clip.model_dump() for clip in split]
    assert (sum(held), sum(held_of_split)) == (2, 3)


# ---------------------------------------------------------------- the cache


@pytest.fixture
def clips(tmp_path) -> list[RatedClip]:
    return read_rated(write_rated(tmp_path / "rated", clips=6, seconds=0.2))


def filled(folder: Path, clips: list[RatedClip], front_end=None) -> FrameCache:
    return open_cache(folder, clips, front_end or SumsFrontEnd())


def test_the_cache_holds_the_front_ends_features_in_bf16(clips, tmp_path):
    cache = filled(tmp_path / "cache", clips)
    assert isinstance(cache.frames, np.memmap)
    assert cache.frames.shape == (6, 4, 3)
    assert (tmp_path / "cache/frames.u16").stat().st_size == 6 * 4 * 3 * 2
    for row, clip_ in enumerate(clips):
        wave_T = soundfile.read(clip_.path, dtype="float32")[0]
        expected = SumsFrontEnd().frames(torch.from_numpy(wave_T)[None])[0]
        assert torch.equal(from_bits(cache.frames[row].copy()), expected.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("name", "other"), ("weights_sha256", "b" * 64), ("channels", 4), ("dtype", torch.bfloat16)],
)
def test_a_cache_of_another_front_end_is_refused(clips, tmp_path, attribute, value):
    filled(tmp_path / "cache", clips)
    front_end = SumsFrontEnd()
    setattr(front_end, attribute, value)
    field = {"name": "front_end", "dtype": "precision"}.get(attribute, attribute)
    with pytest.raises(ValueError, match=f"{field}=.*give another --cache, or delete"):
        filled(tmp_path / "cache", clips, front_end)


def test_a_cache_of_other_clips_is_refused(clips, tmp_path):
    filled(tmp_path / "cache", clips)
    with pytest.raises(ValueError, match="clips=6, not 5"):
        filled(tmp_path / "cache", clips[:5])
    with pytest.raises(ValueError, match=r"clip 0 is set0 0\.wav there, set1 1\.wav here"):
        filled(tmp_path / "cache", [clips[1], clips[0], *clips[2:]])


def test_a_changed_file_is_refused(clips, tmp_path):
    filled(tmp_path / "cache", clips)
    soundfile.write(clips[4].path, tone_pcm(50, 4000), 16_000)
    with pytest.raises(ValueError, match=r"4\.wav: changed since.*delete"):
        filled(tmp_path / "cache", clips)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "about.json").write_text("{"), r"about\.json: damaged"),
        (lambda folder: (folder / "about.json").unlink(), r"about\.json is missing"),
        (lambda folder: (folder / "rows.jsonl").write_text("?\n"), r"rows\.jsonl: damaged"),
        (lambda folder: os.truncate(folder / "frames.u16", 9), r"frames\.u16: 9 bytes, not 144"),
    ],
)
def test_a_damaged_cache_is_refused(clips, tmp_path, damage, message):
    filled(tmp_path / "cache", clips)
    damage(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        filled(tmp_path / "cache", clips)


class SilenceIsNan(SumsFrontEnd):
    """Gives values that are not finite for silence."""

    def frames(self, waves_BT):
        return super().frames(waves_BT / waves_BT.abs().amax(1, keepdim=True))


def test_clips_that_cannot_be_used_are_listed_and_taken_once_repaired(clips, tmp_path):
    clips[1].path.write_bytes(b"no audio")
    soundfile.write(clips[2].path, tone_pcm(1, 300), 16_000)
    soundfile.write(clips[3].path, np.zeros(4000, np.int16), 16_000)
    cache = filled(tmp_path / "cache", clips, SilenceIsNan())
    assert sorted(cache.bad) == [1, 2, 3]
    assert cache.bad[1].startswith("cannot be read as audio")
    assert "300 samples" in cache.bad[2]
    assert "not finite" in cache.bad[3]
    data = usable(cache, clips, [False, False, False, False, True, True])
    assert data.train_rows.tolist() == [0]
    assert data.validation_rows.tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"0 clips to validate on, .*\s.*1\.wav: cannot"):
        usable(cache, clips, [False, True, True, True, False, False])

    untouched = SilenceIsNan()
    assert filled(tmp_path / "cache", clips, untouched).bad == cache.bad
    assert untouched.clips == 0
    soundfile.write(clips[1].path, tone_pcm(1, 4000), 16_000)
    assert sorted(filled(tmp_path / "cache", clips, untouched).bad) == [2, 3]
    assert untouched.clips == 1


def test_a_disk_without_room_is_said_before_anything_is_taken(clips, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=6 * 24 - 1))
    front_end = SumsFrontEnd()
    with pytest.raises(OSError, match=r"6 clips need .* GB free: make room"):
        filled(tmp_path / "cache", clips, front_end)
    assert front_end.clips == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=6 * 24))
    filled(tmp_path / "cache", clips, front_end)


def test_clips_of_one_length_go_together_on_a_device(clips, tmp_path):
    soundfile.write(clips[2].path, tone_pcm(2, 5000), 16_000)
    alone = filled(tmp_path / "alone", clips)
    front_end, sizes = SumsFrontEnd(), []
    front_end.device = torch.device("cuda")
    frames = front_end.frames
    front_end.frames = lambda waves_BT: (sizes.append(len(waves_BT)), frames(waves_BT))[1]
    together = filled(tmp_path / "together", clips, front_end)
    assert sizes == [2, 1, 3]
    assert together.frames.tobytes() == alone.frames.tobytes()


def test_of_a_long_clip_the_middle_is_read(monkeypatch):
    wave_T = np.arange(21 * 16_000, dtype=np.float32)
    middle = frame_cache.middle(wave_T)
    assert (len(middle), middle[0]) == (20 * 16_000, 8000)
    assert len(frame_cache.middle(wave_T[:16_000])) == 16_000


def test_a_second_process_waits_for_the_first(clips, tmp_path, capsys):
    started, order = threading.Event(), []

    def slow(number: int) -> None:
        started.set()
        time.sleep(0.1)
        order.append("first")

    first = threading.Thread(target=filled, args=(tmp_path, clips, SumsFrontEnd(slow)))
    first.start()
    started.wait()
    second = SumsFrontEnd()
    filled(tmp_path, clips, second)
    first.join()
    assert (second.clips, len(order)) == (0, 6)
    assert "waiting" in capsys.readouterr().err


def test_a_stopped_cache_goes_on(clips, tmp_path):
    times = iter(range(100))

    def pressed(_: int) -> None:
        if next(times) == 2:
            signal.raise_signal(signal.SIGINT)

    front_end = SumsFrontEnd(pressed)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cache", clips, front_end)
    filled(tmp_path / "cache", clips, front_end)
    assert front_end.clips == 6


def test_features_are_taken_where_a_file_system_has_no_locks(clips, tmp_path, monkeypatch, capsys):
    def none(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    assert not filled(tmp_path / "cache", clips, SumsFrontEnd()).bad
    assert f"warning: {tmp_path / 'cache'}: its file system has no locks" in capsys.readouterr().err


def test_features_of_two_layers_are_refused(clips, tmp_path):
    front_end = SumsFrontEnd()
    front_end.frames = lambda waves_BT: torch.zeros(len(waves_BT), 4, 3, 2)
    with pytest.raises(ValueError, match="one layer"):
        filled(tmp_path / "cache", clips, front_end)


# ---------------------------------------------------------------- the verb


SMALL = ["--front-end", "mfcc", "--batch", "4", "--validate-every", "3", "--lr", "1e-3"]


def test_the_verb_makes_a_teacher(tmp_path, capsys):
    labels = write_rated(tmp_path / "rated", clips=16, seconds=0.5, conditions=5)
    (tmp_path / "rated/5.wav").write_bytes(b"no audio")
    run = tmp_path / "run"
    command = ["teacher", *SMALL, "--rated", str(labels), "--out", str(run), "--steps", "6"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "set0" in said.out and "universal scale" in said.out
    assert "left out: 1 clips" in said.err and "5.wav" in said.err

    head, about = exported(run)
    assert about["format"] == 1
    assert about["front_end"] == "mfcc"
    assert about["front_end_sha256"] == load_front_end("mfcc").weights_sha256
    assert about["fit"]["train_clips"] + about["fit"]["validation_clips"] == 15
    assert sorted(about["calibration"]["datasets"]) == ["set0", "set1"]
    assert {row["dataset"] for row in about["metrics"]["sets"]} == {"set0", "set1"}
    assert about["weights_sha256"] == sha256_of(run / "head.safetensors")
    with (run / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    universal = Affine(**about["calibration"]["universal"])
    for row in rows:
        wave_T = soundfile.read(row["path"], dtype="float32")[0]
        frames = load_front_end("mfcc").frames(torch.from_numpy(wave_T)[None])
        with torch.inference_mode():
            logit = head(frames.to(torch.bfloat16).float()).item()
        assert float(row["logit"]) == pytest.approx(logit, abs=STUDENT)
        assert float(row["universal"]) == pytest.approx(float(universal.mos(logit)), abs=STUDENT)

    before = (run / "head.json").read_bytes()
    assert main(command) == 0  # done: says so again, and trains nothing
    assert (run / "head.json").read_bytes() == before
    assert main([*command, "--seed", "1"]) == 2
    assert "seed=0, not 1" in capsys.readouterr().err
    assert main([*command, "--dim", "7"]) == 2
    assert "dim" in capsys.readouterr().err
    assert main([*command, "--front-end", "mfc"]) == 2
    assert "mfcc" in capsys.readouterr().err
