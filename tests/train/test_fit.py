"""Training: it learns, and a stopped run continues bit for bit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from data_specs.io.errors import UserError
from tests import two_ranks
from tests.tolerance import rounding
from tests.train_helpers import (
    logged,
    python,
    require_same_states,
    write_dataset,
    write_rated,
)
from train.__main__ import main
from train.data import stream
from train.data.augment import augment, filled
from train.data.sources import open_sources
from train.files import load_checkpoint
from train.loop.loop import Host
from train.models.calibration import Affine, Calibration
from train.models.student import Student, variant
from train.scoring.score import load
from train.student.fit import Trainer, fit
from train.student.presets import PRESETS, FitConfig, learning_rate, make_config

QUIET = Host(device="cpu", workers=0, progress=False, log_every=2)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("fit") / "shards", shards=2, samples=5, validation=5
    )


def config_of(folder, **changes) -> FitConfig:
    values = {"steps": 6, "batch": 4, "validate_every": 2, "warmup": 2, "precision": "fp32"}
    return make_config("v1", open_sources(folder), **({"preset": "fast"} | values | changes))


def test_stopped_and_continued_equals_unbroken(folder, tmp_path, monkeypatch):
    config, sources = config_of(folder), open_sources(folder)
    fit(config, sources, tmp_path / "unbroken", QUIET)

    update = Trainer.update

    def dies_at_three(self, batch):
        if self.step == 3:
            raise OSError("killed")
        return update(self, batch)

    monkeypatch.setattr(Trainer, "update", dies_at_three)
    with pytest.raises(OSError, match="killed"):
        fit(config, sources, tmp_path / "broken", QUIET)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "broken/last.pt")["step"] == 2
    fit(config, sources, tmp_path / "broken", QUIET)

    require_same_states(tmp_path / "unbroken", tmp_path / "broken", "student", "average")
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("unbroken", "broken")]
    assert files[0] == files[1]


def test_log_has_each_step_once_after_a_resume(folder, tmp_path):
    config, sources = config_of(folder), open_sources(folder)
    fit(config, sources, tmp_path, QUIET)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "validation_rmse" in line] == [2, 4, 6]
    assert any((tmp_path / "tb").iterdir())


def test_another_configuration_is_refused(folder, tmp_path):
    sources = open_sources(folder)
    fit(config_of(folder, steps=2), sources, tmp_path, QUIET)
    with pytest.raises(ValueError, match=r"lr=0\.002, not 0\.1"):
        fit(config_of(folder, steps=2, lr=0.1), sources, tmp_path, QUIET)


def test_damaged_checkpoint_is_named(folder, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"last\.pt"):
        fit(config_of(folder), open_sources(folder), tmp_path, QUIET)


@pytest.mark.slow
def test_it_overfits(folder, tmp_path):
    config = config_of(
        folder, steps=60, batch=10, lr=3e-3, warmup=5, validate_every=60, augment=False, ema=0.9
    )
    fit(config, open_sources(folder), tmp_path, QUIET.model_copy(update={"log_every": 10}))
    losses = [line["loss"] for line in logged(tmp_path) if "loss" in line]
    assert losses[-1] < 0.15 < losses[0]


def test_the_run_is_a_model(folder, tmp_path):
    fit(config_of(folder, steps=2), open_sources(folder), tmp_path, QUIET)
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["student"] == "v1"
    assert about["recipe_hash"] == "abc"
    assert about["metrics"]["step"] == 2
    wave_T = torch.randn(20_000)
    score = load(tmp_path).score(wave_T, 16_000)
    assert 1 <= score <= 5
    assert load(tmp_path / "best.pt").score(wave_T, 16_000) == score
    assert load(tmp_path).weights_sha256 == about["weights_sha256"]


def test_rated_clips_train_too(folder, tmp_path):
    sources = open_sources(folder, None, write_rated(tmp_path / "rated"))
    config = make_config(
        "v1", sources, steps=2, batch=5, rated_share=0.4, precision="fp32", validate_every=2
    )
    assert config.rated_share == 0.4
    fit(config, sources, tmp_path / "run", QUIET)


def test_presets():
    assert PRESETS["paper"]["steps"] == 250_000
    assert PRESETS["paper"]["lr"] == 2e-5


def test_the_fast_preset_is_slower_for_wider_heads(folder):
    """v6, 192 wide, learned nothing in 400 steps at the rate of v2, 64 wide."""
    sources = open_sources(folder)
    assert make_config("v2", sources, "fast").lr == pytest.approx(2e-3)
    assert make_config("v6", sources, "fast").lr == pytest.approx(2e-3 / 3)
    assert make_config("v6", sources, "fast", lr=1e-3).lr == 1e-3
    assert make_config("v6", sources, "paper").lr == 2e-5


def test_learning_rate(folder):
    config = config_of(folder, steps=100, warmup=10, lr=1.0)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 99) < 0.02
    constant = config_of(folder, steps=100, warmup=0, schedule="constant")
    assert learning_rate(constant, 99) == constant.lr


def whole(clips: int) -> torch.Tensor:
    return torch.full((clips,), 40_000)


def test_augmentation_is_a_function_of_seed_and_step():
    torch.manual_seed(0)
    waves_BT = torch.randn(4, 40_000)
    once = augment(waves_BT, whole(4), 1, 2)
    assert torch.equal(once, augment(waves_BT, whole(4), 1, 2))
    assert not torch.equal(once, augment(waves_BT, whole(4), 1, 3))
    assert not torch.equal(once, augment(waves_BT, whole(4), 2, 2))
    torch.testing.assert_close(once.abs().sort(1).values, waves_BT.abs().sort(1).values)


def test_short_clips_keep_their_silence_behind_them():
    waves_BT = torch.zeros(4, 40_000)
    waves_BT[:, :20_000] = torch.rand(4, 20_000) + 0.1
    out = augment(waves_BT, torch.full((4,), 20_000), 1, 2)
    assert (out[:, :20_000] != 0).all()
    assert (out[:, 20_000:] == 0).all()


def test_crops_are_of_a_second_or_more_and_filled_both_ways():
    waves_BT = torch.rand(200, 40_000) + 0.1
    out = augment(waves_BT, whole(200), 1, 2, crops=0.5).abs()
    silent = (out == 0).sum(1)
    periods = [period_of(wave) for wave in out[silent == 0]]
    assert 30 <= (silent > 0).sum() <= 70  # a quarter is filled with zeros
    assert 30 <= sum(period < 40_000 for period in periods) <= 70  # a quarter is repeated
    assert silent.max() <= 24_000
    assert min(periods) >= 16_000
    assert torch.equal(augment(waves_BT, whole(200), 1, 2, crops=0.5).abs(), out)


def period_of(wave_T: torch.Tensor) -> int:
    """After how many samples a wave is itself again; its length if never."""
    places = (wave_T[1:] == wave_T[0]).nonzero()[:, 0] + 1
    for place in places.tolist():
        if torch.equal(wave_T[place:], wave_T[:-place]):
            return place
    return len(wave_T)


def test_filled():
    wave_T = torch.tensor([1.0, 2.0, 3.0])
    assert filled(wave_T, 5, zeros=True).tolist() == [1, 2, 3, 0, 0]
    assert filled(wave_T, 7, zeros=False).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert filled(wave_T, 3, zeros=False).tolist() == [1, 2, 3]


def test_ranks_augment_their_rows_as_one_process_would():
    torch.manual_seed(0)
    waves_BT, lengths_B = torch.randn(6, 40_000), whole(6)
    joint = augment(waves_BT, lengths_B, 1, 2, crops=0.5)
    for rank in range(2):
        rows = slice(rank, None, 2)
        ours = augment(waves_BT[rows], lengths_B[rows], 1, 2, 0.5, rank, 2)
        assert torch.equal(ours, joint[rows])


def tone(hz: float, samples: int = 40_000) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hz / 16_000 * torch.arange(samples))


def share_db(wave_T: torch.Tensor, hz: float, width_hz: float = 60) -> float:
    """Power further than that from a frequency, to all, in dB."""
    power = torch.fft.rfft(wave_T.double() * torch.hann_window(len(wave_T))).abs().square()
    away = (torch.fft.rfftfreq(len(wave_T), 1 / 16_000) - hz).abs() > width_hz
    return float(10 * torch.log10(power[away].sum() / power.sum()))


def test_rotation_joins_end_and_beginning_without_a_click():
    for hz in (150.2, 440.3, 1_234.6, 3_000.7):  # 2.5 s are no whole number of periods
        waves_BT = tone(hz).repeat(40, 1)
        steepest = waves_BT.diff().abs().max()
        out = augment(waves_BT, whole(40), 1, 2, crops=0.5)
        plain = torch.stack([wave_T.roll(20_000) for wave_T in waves_BT])
        assert share_db(plain[0], hz) > -30  # what a hard seam does
        for wave_T in out:
            heard = wave_T[: int(wave_T.nonzero()[-1]) + 1]
            # The fade itself turns a tone by up to its height times pi / 2 in 800 samples.
            assert heard.diff().abs().max() <= steepest * 1.02 + 0.5 * torch.pi / 2 / 800
            assert share_db(heard, hz) < -45


def test_a_cross_fade_keeps_length_and_all_but_the_seam():
    waves_BT = tone(440.2).repeat(8, 1)
    out = augment(waves_BT, whole(8), 1, 2)
    assert out.shape == waves_BT.shape
    inside = waves_BT[0].abs()[800:39_200].unfold(0, 200, 200)
    for wave_T in out.abs():
        kept = sum(
            any(
                torch.equal(wave_T[at : at + 200], part)
                for at in (wave_T == part[0]).nonzero()[:, 0].tolist()
            )
            for part in inside
        )
        assert kept >= len(inside) - 1  # the one where the new ends are may be cut


def test_what_is_too_short_to_fade_is_not_rotated():
    waves_BT = torch.zeros(2, 40_000)
    waves_BT[:, :2_000] = tone(440.4, 2_000) + 0.001
    out = augment(waves_BT, torch.full((2,), 2_000), 1, 2, crops=1.0)
    assert torch.equal(out.abs(), waves_BT.abs())


def test_labelled_only(folder, tmp_path):
    rated = write_rated(tmp_path / "rated", clips=8)
    sources = open_sources(None, rated=rated)
    assert sources.labelled_only
    names = [
        {clip.path.name for clip in part} for part in (sources.rated, sources.rated_validation)
    ]
    assert all(names)
    assert not names[0] & names[1]
    config = make_config("v1", sources, steps=4, batch=4, validate_every=2)
    assert (config.rated_share, config.samples, config.rated_clips) == (1.0, 0, len(names[0]))
    assert config.validation_samples == len(names[1])
    fit(config, sources, tmp_path / "run", QUIET)
    assert json.loads((tmp_path / "run/model.json").read_text())["teacher"] == "people"
    other = open_sources(None, rated=rated, rated_validation=write_rated(tmp_path / "other"))
    assert len(other.rated) == 8
    with pytest.raises(ValueError, match="without shards it is 1"):
        make_config("v1", sources, rated_share=0.2)


def test_nothing_to_train_on(folder, tmp_path):
    with pytest.raises(ValueError, match="--shards DIR, --rated"):
        open_sources(None)
    with pytest.raises(ValueError, match="--validation is a folder of shards"):
        open_sources(None, folder, write_rated(tmp_path))


@pytest.mark.parametrize("augmented", [True, False])
def test_a_student_that_hears_repetition_hears_no_silence(tmp_path, monkeypatch, augmented):
    """In training, in validation, and wherever it is scored afterwards."""
    rated = write_rated(tmp_path / "rated", 6, seconds=2.0)
    heard = []
    forward = Student.forward

    def listens(self, waves_BT):
        heard.append(waves_BT.detach().clone())
        return forward(self, waves_BT)

    monkeypatch.setattr(Student, "forward", listens)
    sources = open_sources(None, rated=rated)
    options = {"steps": 2, "batch": 2, "validate_every": 1, "warmup": 0, "precision": "fp32"}
    config = make_config("v1", sources, "fast", augment=augmented, padding="repeat", **options)
    fit(config, sources, tmp_path / "run", QUIET)
    last_second = torch.cat(heard)[:, -16_000:]
    assert (last_second.abs().mean(dim=1) > 0.01).all()
    scorer, wave_T = load(tmp_path / "run"), tone(300, 24_000).numpy()
    assert scorer.padding == "repeat"
    assert scorer.score(wave_T, 16_000) == scorer.score(wave_T, 16_000, padding="repeat")


def test_going_on_keeps_what_a_student_hears_behind_short_clips(folder):
    shape, sources = variant("v1").model_copy(update={"padding": "repeat"}), open_sources(folder)
    assert make_config("v1", sources, "fast", shape).padding == "repeat"
    assert make_config("v1", sources, "fast", shape, padding="zero").padding == "zero"
    assert make_config("v1", sources, "fast").padding == "zero"


def test_rated_clips_come_to_16_khz_as_the_student_is_scored(folder, tmp_path, monkeypatch):
    heard = []

    def to_16k(wave_T, rate, by="soft"):
        heard.append(by)
        return resampled(wave_T, rate, by)

    resampled = stream.to_16k
    monkeypatch.setattr(stream, "to_16k", to_16k)
    rated = write_rated(tmp_path / "rated")
    sources = open_sources(folder, None, rated)
    config = make_config("v1", sources, steps=1, batch=4, rated_share=0.5, validate_every=1)
    fit(config, sources, tmp_path / "own", QUIET)
    assert set(heard) == {"sharp"} and load(tmp_path / "own").resampler == "sharp"
    heard.clear()
    old = Student(variant("v1"))  # of before: it heard torchaudio's defaults
    config = make_config(
        "old", sources, shape=old.config, steps=1, batch=4, rated_share=0.5, validate_every=1
    )
    fit(config, sources, tmp_path / "on", QUIET, old)
    assert set(heard) == {"soft"} and load(tmp_path / "on").resampler == "soft"


def test_crops_need_augmentation(folder):
    with pytest.raises(ValueError, match="--augment"):
        config_of(folder, crops=0.5, augment=False)


def test_no_logger_but_the_log(folder, tmp_path):
    quiet = QUIET.model_copy(update={"logger": "none"})
    fit(config_of(folder, steps=2), open_sources(folder), tmp_path, quiet)
    assert (tmp_path / "log.jsonl").is_file() and not (tmp_path / "tb").exists()


def torchrun(processes: int, *command: object) -> None:
    python("-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone", *command)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(folder, tmp_path):
    """Batch norm, crops and all; gloo on a CPU."""
    torchrun(2, "-m", "tests.two_ranks", folder, tmp_path)
    alone = two_ranks.gradients(folder, 1)[1]
    assert len(alone) > 30
    assert max(gradient.abs().max() for gradient in alone.values()) > 0.1
    for rank in range(2):
        ours = load_checkpoint(tmp_path / f"gradients-{rank}.pt")
        for name, gradient in alone.items():
            atol = rounding(384, gradient.abs().max(), layers=40)  # tokens, and back
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=max(atol, 1e-6))


STOPS_AT_FOUR = """
import os, runpy, signal, sys
from train.loop import loop

agree, loop.STOP_EVERY = loop._Loop.agree_to_stop, 1

def stops(self, came):  # a signal to one of the two
    if self.task.step == 4 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    agree(self, came)

loop._Loop.agree_to_stop = stops
runpy.run_module("train", run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(folder, tmp_path):
    """Two processes for the first steps, one for the rest: as with one process throughout."""
    command = (
        *("fit", "--student", "v1", "--shards", str(folder), "--preset", "fast", "--batch", "4"),
        *("--steps", "6", "--validate-every", "2", "--precision", "fp32", "--warmup", "2"),
        *("--workers", "1", "--logger", "none", "--device", "cpu", "--out"),
    )
    (tmp_path / "stops.py").write_text(STOPS_AT_FOUR)
    with pytest.raises(subprocess.CalledProcessError):
        torchrun(2, tmp_path / "stops.py", *command, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run/last.pt")["step"] == 4
    for run in ("run", "alone"):
        python("-m", "train", *command, tmp_path / run)
    ours, theirs = logged(tmp_path / "run"), logged(tmp_path / "alone")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [2, 4, 6, 6]
    for line, other in zip(ours, theirs, strict=True):
        # Adam turns rounding into steps of the learning rate; another clip would cost far more.
        assert line == pytest.approx(other, abs=0.005)


def test_never_validated_on_the_training_shards(tmp_path):
    """Beside them lies the recipe's validation split, or the user says what validates."""
    alone = write_dataset(tmp_path / "top/train", shards=3, samples=2)
    with pytest.raises(UserError, match=r"top/validation: no dataset.*--split speech=validation"):
        open_sources(alone)
    assert open_sources(alone, alone).validation  # as asked
    held = write_dataset(tmp_path / "top/validation", shards=2, samples=1, hash_="held")
    for place in (alone, str(alone), f"{alone}/", alone.as_uri()):
        sources = open_sources(place)
        assert sum(shard.samples for shard in sources.shards) == 6  # all of them train
        assert [shard.tar.parent for shard in sources.validation] == [held, held]
        assert sources.validation_hash == "held"
    write_dataset(held, shards=2, samples=1)  # the training split again
    with pytest.raises(UserError, match="the training split again"):
        open_sources(alone)
    about = {"recipe_hash": "held", "recipe": {"name": "other"}, "teacher": "test"}
    (held / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="of another recipe"):
        open_sources(alone)


def test_rated_clips_choose_the_best_with_shards(folder, tmp_path):
    """As in the paper."""
    held = write_rated(tmp_path / "held", clips=4)
    sources = open_sources(folder, None, write_rated(tmp_path / "rated"), held)
    assert (len(sources.shards), len(sources.validation)) == (2, 0)
    config = make_config("v1", sources, steps=2, batch=5, validate_every=1)
    assert (config.samples, config.validation_samples) == (10, 4)
    fit(config, sources, tmp_path / "run", QUIET)
    best, student = load_checkpoint(tmp_path / "run/best.pt"), load(tmp_path / "run")
    scores = [student.score_file(clip.path) for clip in sources.rated_validation]
    truth = [clip.mos for clip in sources.rated_validation]
    errors = [(score.mos - mos) ** 2 for score, mos in zip(scores, truth, strict=True)]
    assert best["metrics"]["loss"] == pytest.approx(sum(errors) / 4, rel=0.02)
    with pytest.raises(UserError, match="one of --validation and --rated-validation"):
        open_sources(folder, folder, None, held)
    with pytest.raises(UserError, match=r"labels.csv: line 2: .*both trains and validates"):
        open_sources(folder, None, held, held)


@pytest.mark.parametrize(
    ("changes", "message"), [({"steps": 0}, "steps"), ({"preset": "slow"}, "fast")]
)
def test_bad_settings(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(folder, **changes)


def test_ratings_are_mapped_to_the_scale_of_the_labels(tmp_path, capsys):
    shards = write_dataset(tmp_path / "shards", validation=2)
    rated = write_rated(tmp_path / "rated")  # sets set0 and set1
    plain = open_sources(shards, None, rated).rated
    about = json.loads((shards / "dataset.json").read_text())
    maps = Calibration(
        universal=Affine(scale=1.5, shift=0.2), datasets={"set0": Affine(scale=0.8, shift=-0.3)}
    )
    about["teacher_calibration"] = maps.model_dump(mode="json")
    (shards / "dataset.json").write_text(json.dumps(about))
    mapped = open_sources(shards, None, rated).rated
    assert "warning: the teacher was not trained on set1" in capsys.readouterr().err
    for before, after in zip(plain, mapped, strict=True):
        expected = before.mos
        if before.dataset == "set0":
            expected = float(maps.to_universal(before.mos, "set0"))
            assert abs(expected - before.mos) > 0.05
        assert after.mos == pytest.approx(expected)
    about["teacher_calibration"] = {"universal": {"scale": -1}}
    (shards / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"dataset.json: teacher_calibration.*scale"):
        open_sources(shards, None, rated)


def command(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_run_goes_on_from_the_weights_of_another(folder, tmp_path):
    first = ["fit", "--shards", folder, "--preset", "fast", "--steps", 2, "--batch", 4]
    first += ["--validate-every", 1, "--precision", "fp32", "--workers", 0, "--logger", "none"]
    assert command(*first, "--student", "v1", "--out", tmp_path / "first") == 0
    on = [*first, "--start", tmp_path / "first", "--out", tmp_path / "on"]
    assert command(*on, "--lr", 1e-12) == 0
    config = json.loads((tmp_path / "on/config.json").read_text())
    before, after = load(tmp_path / "first"), load(tmp_path / "on")
    assert config["start"] == before.weights_sha256 and config["student"] == "first"
    weights = zip(before.network.parameters(), after.network.parameters(), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in weights)
    assert load_checkpoint(tmp_path / "on/last.pt")["config"]["start"] == before.weights_sha256


def test_what_a_run_starts_with_stays_the_best_if_nothing_is_better(folder, tmp_path):
    first = ["fit", "--shards", folder, "--preset", "fast", "--batch", 4, "--workers", 0]
    first += ["--precision", "fp32", "--logger", "none"]
    assert command(*first, "--student", "v1", "--steps", 40, "--out", tmp_path / "first") == 0
    on = [*first, "--start", tmp_path / "first", "--steps", 2, "--lr", 0.5, "--warmup", 0]
    assert command(*on, "--out", tmp_path / "on") == 0
    assert load_checkpoint(tmp_path / "on/best.pt")["metrics"]["step"] == 0


def test_only_a_student_can_be_gone_on_with(folder, tmp_path, capsys):
    assert command("fit", "--shards", folder, "--start", "mfcc", "--out", tmp_path / "on") == 2
    assert "mfcc: is not a student" in capsys.readouterr().err
