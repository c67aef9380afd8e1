"""What stands in for weights and corpora that are not here, so that their time can be measured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from data_specs.processors import Untouched
from data_specs.recipe import Recipe
from data_specs.room import load_rooms
from pipeline.corpora import synthetic
from pipeline.corpora.rooms import make_rooms
from pipeline.render.render import Roots
from tests.bench import random_weights
from train.models import weights


@contextmanager
def stand_in_weights(folder: Path) -> Iterator[list[str]]:
    """Random weights in the cache's place where it lacks any. Gives what the foot should say."""
    try:
        for name in random_weights.WRITERS:
            weights.find(name)
    except FileNotFoundError:
        missing = random_weights.write_all(folder / "weights")
    else:
        yield ["real weights"]
        return
    names = ", ".join(sorted(set(random_weights.WRITERS) - set(missing)))
    with mock.patch.dict(os.environ, {weights.FOLDER_VARIABLE: str(folder / "weights")}):
        yield [f"random weights: speed only ({names})"]


def without(recipe: Recipe, kinds: set[str]) -> Iterator[Any]:
    """The stages with "none" for some kinds, so that the others keep their shares."""
    for stage in recipe.stages:
        choices = [
            option.model_copy(update={"use": Untouched()}) if option.use.kind in kinds else option
            for option in stage.choices
        ]
        yield stage.model_copy(update={"choices": tuple(choices)})


def default_corpora(folder: Path) -> Roots:
    """Made speech, noise and rooms."""
    synthetic.make_speech(folder / "speech", clips=80)
    synthetic.make_noise(folder / "noise", files=30, speech=folder / "speech")
    make_rooms(load_rooms("simulated"), folder / "rooms", 20)
    return {name: [folder / name] for name in ("speech", "noise", "rooms")}
