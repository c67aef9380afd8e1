"""One whole, tiny example of every kind of file that the commands read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from safetensors.torch import save_file

from data_specs.io.files import sha256_of
from data_specs.recipe import Recipe
from pipeline.__main__ import main as pipeline
from tests.conftest import small_recipe, talk
from tests.export_helpers import tiny, write_run
from tests.train_helpers import write_rated
from train.__main__ import main as train
from train.models.front_end import load_front_end
from train.models.head import HeadConfig, build_head
from train.models.pruned import save_pruned
from train.pruning.masks import Masks

ROOT = Path(__file__).resolve().parents[2]

AUDIO = {
    "a.wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "a.flac": ("FLAC", "PCM_16"),
    "a.ogg": ("OGG", "VORBIS"),
    "a.mp3": ("MP3", "MPEG_LAYER_III"),
    "a.aiff": ("AIFF", "PCM_16"),
    "a.au": ("AU", "PCM_16"),
}


def recipe() -> Recipe:
    """Speech, noise and two processors, in shards of two."""
    names, none_held = ("speech", "noise"), {"validation": 0.0}
    line = {"stage": "line", "choices": [{"use": {"kind": "clip"}}, {"use": {"kind": "none"}}]}
    plain = {"speed": 1.0, "speech_stages": [], "room": None, "stages": [line]}
    plain["sources"] = {name: {"corpus": name, "holdout": none_held} for name in names}
    sizes = {"shard_samples": 2, "group_samples": 2}
    return small_recipe(name="fuzz", teacher={"name": "distillmos"}, **plain, **sizes)


def done(status: int) -> None:
    """The seeds must be whole."""
    if status:
        raise RuntimeError(f"a seed could not be made: exit status {status}")


def audio(folder: Path) -> None:
    """The same half second in every container."""
    folder.mkdir()
    for name, (kind, subtype) in AUDIO.items():
        soundfile.write(folder / name, talk(0.5, 1), 16_000, format=kind, subtype=subtype)


def corpora(folder: Path) -> None:
    """Two talkers and a noise."""
    for number in range(2):
        path = folder / "speech" / f"talker{number}" / "0.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, talk(8, number), 16_000)
    (folder / "noise").mkdir()
    noise = 0.05 * np.random.default_rng(0).standard_normal(130_000)
    soundfile.write(folder / "noise" / "hum.flac", noise, 16_000)


def specs(folder: Path) -> None:
    """YAML of every sort."""
    folder.mkdir()
    text = yaml.safe_dump(recipe().model_dump(mode="json"), sort_keys=False)
    (folder / "recipe.yaml").write_text(text)
    data = ROOT / "data_specs"
    shutil.copy(data / "recipes/demo.yaml", folder / "demo.yaml")
    shutil.copy(data / "rooms/simulated.yaml", folder / "rooms.yaml")
    shutil.copy(data / "cluster/site.example.yaml", folder / "site.yaml")


def dataset(folder: Path, base: Path) -> None:
    """Two shards, as the pipeline makes them."""
    words = ["shards", str(base / "specs/recipe.yaml"), "--out", str(folder), "--samples", "4"]
    for name in ("speech", "noise"):
        words += ["--corpus", f"{name}={base / 'corpora' / name}"]
    done(pipeline([*words, "--engine", "local", "--workers", "1"]))


def tables(folder: Path, base: Path) -> None:
    """Rated clips, a list of files, and a table of scores to go on with."""
    write_rated(folder, clips=6, seconds=0.5)
    (folder / "list.txt").write_text("0.wav\n1.wav\n2.wav\n")
    words = ["--model", str(base / "models/run"), "--out", str(folder / "scores.csv"), "--curve"]
    done(train(["score", str(folder / "list.txt"), *words]))


def head(folder: Path) -> None:
    """A teacher's head as ``train teacher`` leaves it."""
    folder.mkdir()
    config = HeadConfig(features=40)
    save_file(build_head(config).state_dict(), folder / "head.safetensors")
    sha256 = load_front_end("mfcc").weights_sha256
    maps = {"universal": {"scale": 2.0, "shift": 0.5}, "datasets": {}}
    about = {"front_end": "mfcc", "front_end_sha256": sha256, "head": config.model_dump()}
    (folder / "head.json").write_text(json.dumps({**about, "calibration": maps}))


def models(folder: Path) -> None:
    """A run, a checkpoint, a pruned model, a head, and a bundle with ONNX."""
    student = tiny()
    run, config = write_run(folder / "run", student), student.config.model_dump(mode="json")
    about = {"config": config, "weights_sha256": sha256_of(run / "model.safetensors")}
    (run / "model.json").write_text(json.dumps(about | {"student": "tiny"}))
    (folder / "checkpoint").mkdir()
    content = {"weights": student.state_dict(), "student_config": config}
    torch.save(content, folder / "checkpoint/best.pt")
    state = student.state_dict()
    masks = Masks({name: t.abs() > 0.02 for name, t in state.items() if t.ndim >= 2})
    dense = {name: t * masks[name] if name in masks else t for name, t in state.items()}
    save_pruned(folder / "pruned", dense, masks, {"kind": "student", "config": config})
    head(folder / "head")
    done(train(["export", "--model", str(run), "--out", str(folder / "bundle")]))


def make(base: Path) -> None:
    """All of them, below ``base``; a second call takes what is there."""
    if (base / "whole").exists():
        return
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    steps: tuple[Callable[[], None], ...] = (
        lambda: audio(base / "audio"),
        lambda: corpora(base / "corpora"),
        lambda: specs(base / "specs"),
        lambda: dataset(base / "dataset", base),
        lambda: models(base / "models"),
        lambda: tables(base / "tables", base),
    )
    for step in steps:
        step()
    (base / "whole").touch()
