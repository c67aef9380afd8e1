"""Fixtures: small corpora made in the test, and the folder of shared recordings."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from data_specs.io.files import one_at_a_time
from data_specs.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SPEECH_SHARED", ROOT.parent / "shared"))
RATE_HZ = 16_000


def pytest_configure() -> None:
    """Undo what a shell does to a job in the background, whose Ctrl-C it has ignored."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test draws the same numbers in every run, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check before a job runs here: the child that it has takes seconds to start.

    ``test_prepare`` has the child.
    """
    if "pipeline.dataset.prepare" in sys.modules:
        from pipeline.render.processors import self_check

        monkeypatch.setattr(
            "pipeline.dataset.prepare.check_processors", lambda recipe, *_: self_check(recipe)
        )


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip(f"shared recordings are not at {SHARED} (set SPEECH_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def fargan_demo(shared: Path) -> Path:
    """The real program: ``make fargan`` builds it once, in a cache outside of the repository."""
    archive = shared / "weights" / "fargan" / "opus_1.6.1.orig.tar.xz"
    lacking = [tool for tool in ("make", "cc", "tar", "xz") if shutil.which(tool) is None]
    if lacking or not archive.is_file():
        pytest.skip(f"fargan_demo cannot be built here: no {', '.join(lacking) or archive}")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "distill-mos-factory-tests"
    cache.mkdir(parents=True, exist_ok=True)
    program = cache / "fargan" / "fargan_demo"
    with one_at_a_time(cache / ".lock"):
        if not program.is_file():
            command = ["make", "-C", str(ROOT), "fargan", f"WEIGHTS={cache}"]
            subprocess.run([*command, f"FARGAN_SOURCES={archive.parent}"], check=True, timeout=280)
    return program


def talk(seconds: float, seed: int, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Something with the rhythm and the spectrum of speech: harmonics in syllables, and pauses."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate_hz)) / rate_hz
    pitch_hz = rng.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * 0.4 * time))
    phase = 2 * np.pi * np.cumsum(pitch_hz) / rate_hz
    wave = sum(np.sin(n * phase) / n for n in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(2, 4) * time), 0, 1)
    return (0.1 * wave * syllables).astype(np.float32)


def write(path: Path, wave: np.ndarray, rate_hz: int = RATE_HZ, subtype: str = "PCM_16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate_hz, subtype=subtype)
    return path


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Folders of 8 speakers, 6 noises (16 and 48 kHz) and 6 rooms."""
    base = tmp_path_factory.mktemp("corpora")
    rng = np.random.default_rng(0)
    for i in range(8):
        write(base / "speech" / "en" / f"talker{i}" / "0.wav", talk(9 + i / 4, i))
    for i in range(6):
        rate_hz = (16_000, 48_000)[i % 2]
        noise = rng.standard_normal(int((3 + 2 * i) * rate_hz)) * 0.05
        write(base / "noise" / f"noise{i}.flac", noise, rate_hz)
    for i in range(6):
        decay = np.exp(-np.arange(8_000) / (400 + 300 * i))
        response = 0.3 * rng.standard_normal(8_000) * decay
        response[40] = 1.0
        write(base / "rooms" / f"room{i}.wav", response * 0.5)
    return {name: [base / name] for name in ("speech", "noise", "rooms")}


@pytest.fixture(scope="session")
def random_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights cache of every neural processor's real architecture, with random weights."""
    from tests.bench import random_weights

    folder = tmp_path_factory.mktemp("random_weights")
    random_weights.write_all(folder)
    return folder


SMALL_RECIPE = """
name: small
seed: 3
sources:
  speech: {corpus: speech, holdout: &holdout {validation: 0.2, test: 0.2}}
  noise: {corpus: noise, holdout: *holdout}
  rooms: {corpus: rooms, holdout: *holdout}
speed: {distribution: uniform, low: 0.9, high: 1.1}
speech_stages:
  - {stage: colour, probability: 0.5, choices: [{use: {kind: equalise}}]}
room: {probability: 0.33}
noise: {probability: 0.67, snr_db: {distribution: normal, mean: 10, std: 4}}
stages:
  - {stage: enhance, choices: [{use: {kind: spectral_gating}}, {use: {kind: none}}]}
  - {stage: codec, probability: 0.5, choices: [{use: {kind: opus}}, {use: {kind: band_limit}}]}
  - {stage: line, probability: 0.3, choices: [{use: {kind: clip}}, {use: {kind: dropout}}]}
teacher: {name: mfcc}
shard_samples: 8
group_samples: 4
max_dropped_share: 0.25
"""


def small_recipe(**changes: object) -> Recipe:
    """A recipe with every processor that is built, in shards of eight."""
    return Recipe.model_validate(yaml.safe_load(SMALL_RECIPE) | changes)


def one_corpus_recipe(folder: Path, **changes: object) -> Path:
    """A recipe's file: speech as it is recorded."""
    values = {"name": "one", "sources": {"speech": {"corpus": "speech"}}, **changes}
    (folder / "one.yaml").write_text(yaml.safe_dump(values))
    return folder / "one.yaml"
