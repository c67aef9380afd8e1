"""Training: it learns, and a stopped run continues bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_helpers import write_dataset, write_rated

from train import fit as fitting
from train.files import load_checkpoint
from train.fit import (
    FitConfig,
    Host,
    Trainer,
    augment,
    fit,
    learning_rate,
    make_config,
    open_sources,
)
from train.models.calibration import Affine, Calibration
from train.score import load

QUIET = Host(workers=0, progress=False, log_every=2)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("fit") / "shards", shards=3, samples=5)


def config_of(folder, **changes) -> FitConfig:
    values = {"steps": 6, "batch": 4, "validate_every": 2, "warmup": 2, "precision": "fp32"}
    return make_config("v1", open_sources(folder, None, None), **(values | changes))


def weights(run: Path) -> dict[str, torch.Tensor]:
    content = load_checkpoint(run / "last.pt")
    return {**content["student"], **{f"average.{k}": v for k, v in content["average"].items()}}


def test_stopped_and_continued_equals_unbroken(folder, tmp_path, monkeypatch):
    config, sources = config_of(folder), open_sources(folder, None, None)
    assert fit(config, sources, tmp_path / "unbroken", QUIET)

    update = Trainer.update

    def dies_at_three(self, pcm_BT, mos_B):
        if self.step == 3:
            raise OSError("killed")
        return update(self, pcm_BT, mos_B)

    monkeypatch.setattr(Trainer, "update", dies_at_three)
    with pytest.raises(OSError, match="killed"):
        fit(config, sources, tmp_path / "broken", QUIET)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "broken/last.pt")["step"] == 2
    assert fit(config, sources, tmp_path / "broken", QUIET)

    unbroken, broken = weights(tmp_path / "unbroken"), weights(tmp_path / "broken")
    assert unbroken.keys() == broken.keys()
    assert all(torch.equal(unbroken[name], broken[name]) for name in unbroken)
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("unbroken", "broken")]
    assert files[0] == files[1]


def test_log_has_each_step_once_after_a_resume(folder, tmp_path, monkeypatch):
    config, sources = config_of(folder), open_sources(folder, None, None)
    fit(config, sources, tmp_path, QUIET)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["step"] for line in lines if "loss" in line]
    assert losses == [2, 4, 6]
    assert [line["step"] for line in lines if "validation_rmse" in line] == [2, 4, 6]
    assert any((tmp_path / "tb").iterdir())


def test_another_configuration_is_refused(folder, tmp_path):
    sources = open_sources(folder, None, None)
    fit(config_of(folder, steps=2), sources, tmp_path, QUIET)
    with pytest.raises(ValueError, match=r"lr=0\.002, not 0\.1"):
        fit(config_of(folder, steps=2, lr=0.1), sources, tmp_path, QUIET)


def test_damaged_checkpoint_is_named(folder, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"last\.pt"):
        fit(config_of(folder), open_sources(folder, None, None), tmp_path, QUIET)


def test_it_overfits(folder, tmp_path):
    config = config_of(
        folder, steps=60, batch=10, lr=3e-3, warmup=5, validate_every=60, augment=False, ema=0.9
    )
    fit(config, open_sources(folder, None, None), tmp_path, Host(0, progress=False, log_every=10))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.15 < losses[0]


def test_the_run_is_a_model(folder, tmp_path):
    fit(config_of(folder, steps=2), open_sources(folder, None, None), tmp_path, QUIET)
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
    assert fit(config, sources, tmp_path / "run", QUIET)


def test_presets():
    assert fitting.PRESETS["paper"]["steps"] == 250_000
    assert fitting.PRESETS["paper"]["lr"] == 2e-5


def test_learning_rate(folder):
    config = config_of(folder, steps=100, warmup=10, lr=1.0)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 99) < 0.02
    constant = config_of(folder, steps=100, warmup=0, schedule="constant")
    assert learning_rate(constant, 99) == constant.lr


def test_augmentation_is_a_function_of_seed_and_step():
    waves_BT = torch.randn(4, 1000)
    assert torch.equal(augment(waves_BT, 1, 2), augment(waves_BT, 1, 2))
    assert not torch.equal(augment(waves_BT, 1, 2), augment(waves_BT, 1, 3))
    torch.testing.assert_close(
        augment(waves_BT, 1, 2).abs().sort(dim=1).values, waves_BT.abs().sort(dim=1).values
    )


def test_one_shard_needs_validation(tmp_path):
    alone = write_dataset(tmp_path, shards=1, samples=2)
    with pytest.raises(ValueError, match="--validation"):
        open_sources(alone, None, None)
    assert open_sources(alone, alone, None).validation


@pytest.mark.parametrize(
    ("changes", "message"), [({"steps": 0}, "steps"), ({"preset": "slow"}, "fast")]
)
def test_bad_settings(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(folder, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_process_continues(folder, tmp_path, number):
    command = [
        *(sys.executable, "-m", "train", "fit", "--student", "v1", "--shards", str(folder)),
        *("--batch", "4", "--steps", "40", "--validate-every", "5", "--precision", "fp32"),
        *("--threads", "1", "--workers", "1", "--warmup", "2", "--out"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    process = subprocess.Popen([*command, str(run)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while not (run / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    code = process.wait(60)
    assert code == (130 if number == signal.SIGINT else -9)
    assert load_checkpoint(run / "last.pt")["step"] < 40
    subprocess.run([*command, str(run)], cwd=ROOT, env=environment, check=True)
    subprocess.run([*command, str(tmp_path / "unbroken")], cwd=ROOT, env=environment, check=True)
    ours, theirs = weights(run), weights(tmp_path / "unbroken")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ratings_are_mapped_to_the_scale_of_the_labels(tmp_path, capsys):
    shards = write_dataset(tmp_path / "shards")
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
