"""Options that several verbs of the pipeline have, and what they stand for."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

from pydantic import BaseModel, Field

from data_specs.cluster.needs import require_everywhere
from data_specs.io.addresses import PathOrUrl, path_or_url, shown
from data_specs.io.errors import UserError
from data_specs.io.hardware import require_device
from data_specs.io.options import add_options, options_of
from data_specs.recipe import Recipe
from pipeline.engine.base import EngineOptions
from pipeline.render.guard import TIME_LIMIT_S
from pipeline.render.render import Roots

SPLITS = ("train", "validation", "test", "all")


def recipe_option(verb: argparse.ArgumentParser) -> None:
    """Add the recipe and its corpora."""
    verb.add_argument("recipe", help="YAML file, or the name of one in data_specs/recipes")
    corpus_option(verb)


def sample_options(verb: argparse.ArgumentParser) -> None:
    """Add how many samples, and of which splits."""
    verb.add_argument("--samples", type=int, required=True)
    verb.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="SPLIT|ROLE=SPLIT",
        help="train (default), validation, test or all; for every role or for one",
    )


def shards_options(verb: argparse.ArgumentParser) -> None:
    """Add all options of the verb ``shards``."""
    recipe_option(verb)
    verb.add_argument("--out", type=path_or_url, required=True, help="a folder, or its address")
    verb.add_argument(
        "--retry-failed",
        action="store_true",
        help="make again the shards with dropped samples or failed attempts, and only those",
    )
    sample_options(verb)
    verb.add_argument(
        "--and",
        dest="beside",
        action="append",
        default=[],
        metavar="SPLIT=N:DIR",
        help="in the same run N samples of another split too, as a dataset of its own in DIR; may "
        "be given more than once",
    )
    add_options(verb, EngineOptions)
    add_options(verb, WorkerOptions)


def parse_shards(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of a job that is ``shards WORDS``."""
    parser = argparse.ArgumentParser(prog="python -m pipeline shards")
    shards_options(parser)
    return parser.parse_args(words)


def corpus_option(verb: argparse.ArgumentParser) -> None:
    """Add the folders of corpora."""
    verb.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="folder of a corpus, or its address; may be given more than once for one corpus; "
        "or the environment: CORPUS_NAME=DIR[:DIR]",
    )


def outside_option(verb: argparse.ArgumentParser) -> None:
    """Add the option that lets a dataset's records lead out of the corpora's folders."""
    verb.add_argument(
        "--allow-outside",
        action="store_true",
        help="follow links that lead out of the corpora's folders: for datasets of your own",
    )


class WorkerOptions(BaseModel):
    """Where new samples are made, and how long one may take."""

    device: str = Field("cpu", description="of the networks")
    teacher_device: str = Field("", description="of the teacher (default: --device)")
    time_limit: float = Field(
        TIME_LIMIT_S, description="seconds; drop a sample on which a processor takes longer"
    )


def corpus_and_folder(option: str) -> tuple[str, str]:
    """Split a ``NAME=DIR`` option. Raises ``UserError`` for one without either half."""
    name, _, folder = option.partition("=")
    if not name or not folder:
        raise UserError(f"--corpus {shown(option)}: write NAME=DIR")
    return name, folder


def parse_roots(options: Sequence[str], recipe: Recipe) -> Roots:
    """Parse corpus folders from ``NAME=DIR`` options, else from ``CORPUS_NAME`` in the environment.

    A folder is a path or an address. Raises ``UserError`` for an option without either half.
    """
    roots: Roots = {}
    for name, folder in map(corpus_and_folder, options):
        roots.setdefault(name, []).append(path_or_url(folder))
    for name in {source.corpus for source in recipe.sources.present().values()} - set(roots):
        value = os.environ.get(f"CORPUS_{name.upper()}", "")
        if value:
            # Between folders, not behind an address' protocol nor before its port.
            parts = re.split(r":(?!//|\d+(?:/|$))", value)
            roots[name] = [path_or_url(folder) for folder in parts]
    return roots


def parse_splits(options: Sequence[str], roles: Sequence[str]) -> dict[str, str]:
    """Parse the split of each role from ``SPLIT`` (all roles) and ``ROLE=SPLIT`` options."""
    splits: dict[str, str] = {}
    for option in sorted(options, key=lambda text: "=" in text):
        role, equals, split = option.rpartition("=")
        if split not in SPLITS:
            raise UserError(f"--split {option}: must be one of {', '.join(SPLITS)}")
        splits.update({role: split} if equals else dict.fromkeys(roles, split))
    return splits


def parse_beside(options: Sequence[str]) -> list[tuple[str, int, PathOrUrl]]:
    """Further splits by ``--and SPLIT=N:DIR``: which, how many samples of it, and where.

    Raises ``UserError`` naming a wrong one.
    """
    found = []
    for option in options:
        match = re.fullmatch(r"([a-z]+)=([0-9]+):(.+)", option, re.DOTALL)
        if not match or match[1] not in SPLITS:
            raise UserError(
                f"--and {shown(option)}: write SPLIT=N:DIR with a split of {', '.join(SPLITS)}, "
                "such as validation=150:runs/validation"
            )
        found.append((match[1], int(match[2]), path_or_url(match[3])))
    return found


def engine_options(
    options: argparse.Namespace, device: str, paths: Sequence[tuple[str, PathOrUrl]]
) -> EngineOptions:
    """Read how shards are made. Raises ``UserError`` for what cannot be had.

    ``device`` is the teacher's, ``paths`` are (flag, path) of what every machine must find under
    the same name.
    """
    how = EngineOptions.model_validate(options_of(options, EngineOptions))
    how.check(device)
    if how.engine == "ray" and (how.ray_address or os.environ.get("RAY_ADDRESS")):
        require_everywhere([(flag, str(path)) for flag, path in paths])
    else:  # the workers are here
        require_device(options.device, "--device")
        require_device(getattr(options, "teacher_device", ""), "--teacher-device")
    return how


def corpus_places(roots: Roots) -> list[tuple[str, PathOrUrl]]:
    """Corpus folders, each with the flag that gives it."""
    return [(f"--corpus {name}", folder) for name, folders in roots.items() for folder in folders]
