"""What ``tests.bench.gpu_steps`` measures on: recipes that run here, datasets, commands."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from data_specs.processors import Processor as Spec
from data_specs.recipe import Option, Recipe, Source, Sources, Stage, Teacher, load_recipe
from data_specs.strict import load
from pipeline.render.processors import SelfCheckError, self_check
from tests.bench import command

ROLES = {"speech": "speech", "noise": "noise", "rooms": "rir"}
"""Corpora by their role, and their folders under ``data``."""

INSTEAD = {
    "deepfilternet3": {"kind": "deepfilternet3_onnx"},
    "hifigan": {"kind": "hifigan", "rate_hz": 16_000},
}
"""For a processor that cannot run here: the same network as ONNX, the one without coqui-tts."""


def workers(args: argparse.Namespace) -> int:
    """Processes that make samples at once: a core each."""
    return 1 if args.small else len(os.sched_getaffinity(0))


def corpora(args: argparse.Namespace) -> list[str]:
    """Options that name the recordings."""
    return [f"--corpus={role}={args.data / 'data' / name}" for role, name in ROLES.items()]


def paper_recipe(args: argparse.Namespace, group: int) -> tuple[Recipe, list[str]]:
    """The paper's recipe with what runs here in place of what does not, and what that changed.

    On a CPU, which may have to emulate bf16, in fp32.
    """
    recipe, said, stages = load_recipe("paper"), [], []
    for stage in recipe.stages:
        found: dict[str, Option] = {}
        for option in stage.choices:
            use, why = _runs_as(recipe, option.use)
            said += [why] if why else []
            weight = option.weight + (found[use.kind].weight if use.kind in found else 0)
            found[use.kind] = Option(weight=weight, use=use)
        stages.append(stage.model_copy(update={"choices": tuple(found.values())}))
    changes: dict[str, Any] = {"stages": tuple(stages), "voices": None}
    changes |= {"precision": "fp32", "teacher": Teacher()} if args.device == "cpu" else {}
    return in_groups(recipe.model_copy(update=changes), group), said


def in_groups(recipe: Recipe, size: int) -> Recipe:
    """The same with groups, and shards, of so many samples; nothing of the recordings held out."""
    sources = Sources(**{role: Source(corpus=role) for role in ROLES})
    changes = {"sources": sources, "group_samples": size, "shard_samples": size}
    return recipe.model_copy(update=changes)


def _runs_as(recipe: Recipe, use: Any) -> tuple[Any, str]:
    """The processor itself, what stands in for it, or "none", and what that leaves out."""
    other = INSTEAD.get(use.kind, {"kind": "none"})
    for found in (use, TypeAdapter(Spec).validate_python(other)):
        alone = Stage(stage=use.kind, choices=(Option(use=found),))
        try:
            self_check(recipe.model_copy(update={"speech_stages": (), "stages": (alone,)}))
        except SelfCheckError as error:
            why = str(error).splitlines()[1].strip()
        else:
            return found, "" if found is use else f"{other} in place of {why}"
    return TypeAdapter(Spec).validate_python({"kind": "none"}), f"left out: {why}"


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """As YAML, for a command."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    load(Recipe, path)  # what was put together is a whole recipe
    return path


def shards_command(args: argparse.Namespace, recipe: Path, out: Path, samples: int) -> list[str]:
    """Make shards by the local engine."""
    words = ["pipeline", "shards", recipe, *corpora(args), "--out", out, "--samples", samples]
    words += ["--engine", "local", "--workers", workers(args), "--device", args.device]
    return command(*words)


def dataset(args: argparse.Namespace) -> Path:
    """The shards that ``resume`` and ``training`` share, made by the first of them."""
    folder, group = args.out.parent / "dataset", 4 if args.small else 48
    if not (folder / "shards").is_dir():
        folder.mkdir(exist_ok=True)
        recipe = write_recipe(in_groups(load_recipe("demo"), group), folder / "demo.yaml")
        made = folder / "making"
        samples = group * (2 if args.small else 16)
        subprocess.run(shards_command(args, recipe, made, samples), check=True)
        made.rename(folder / "shards")
    return folder / "shards"
