"""Options that several verbs of the pipeline have, and what they stand for."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from data_specs.cluster.needs import (
    EVERY,
    parse_address,
    parse_stage,
    require_everywhere,
)
from data_specs.io.addresses import PathOrUrl, path_or_url, shown
from data_specs.io.errors import UserError
from data_specs.io.hardware import cpus, require_device
from data_specs.io.options import add_options
from data_specs.recipe import Recipe
from pipeline.engine.base import Machines, TeacherActors
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


class EngineOptions(BaseModel):
    """How and by how many processes shards are made: nothing that is data."""

    engine: Literal["ray", "local"] = Field("ray", description="what runs the workers")
    workers: int = Field(default_factory=cpus, description="processes that make shards")
    teacher_actors: int = Field(
        0,
        description="N teachers that all of Ray's workers share, such as one for each GPU "
        "(default: every worker loads its own)",
    )
    teachers_per_gpu: int = Field(1, description="how many of them share a GPU")
    ray_address: str = Field(
        "",
        description="auto or HOST:PORT of a running Ray cluster (default: RAY_ADDRESS, or a Ray "
        "of its own)",
    )
    worker_needs: str = Field(
        "",
        description="cores=N,memory_gb=N,gpus=N: what Ray reserves for a worker (default: a core; "
        "where it computes on cuda, its share of the GPUs)",
    )
    teacher_needs: str = Field("", description="the same for a teacher")
    part: str = Field(
        str(EVERY),
        description="I/N: make only the I-th of N parts, beside other jobs that make the others",
    )


def parse_roots(options: Sequence[str], recipe: Recipe) -> Roots:
    """Parse corpus folders from ``NAME=DIR`` options, else from ``CORPUS_NAME`` in the environment.

    A folder is a path or an address. Raises ``UserError`` for an option without either half.
    """
    roots: Roots = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or not folder:
            raise UserError(f"--corpus {shown(option)}: write NAME=DIR")
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


class Beside(NamedTuple):
    """A further split that a run makes: which, how many samples of it, and where."""

    split: str
    samples: int
    out: PathOrUrl


def parse_beside(options: Sequence[str]) -> list[Beside]:
    """What ``--and SPLIT=N:DIR`` options ask for. Raises ``UserError`` naming a wrong one."""
    found = []
    for option in options:
        match = re.fullmatch(r"([a-z]+)=([0-9]+):(.+)", option, re.DOTALL)
        if not match or match[1] not in SPLITS:
            raise UserError(
                f"--and {shown(option)}: write SPLIT=N:DIR with a split of {', '.join(SPLITS)}, "
                "such as validation=150:runs/validation"
            )
        found.append(Beside(match[1], int(match[2]), path_or_url(match[3])))
    return found


def teacher_actors(options: argparse.Namespace, device: str) -> TeacherActors:
    """Read the options of teachers. Raises ``UserError`` where they contradict each other."""
    needs = parse_stage(options.teacher_needs, "--teacher-needs")
    actors = TeacherActors(options.teacher_actors, options.teachers_per_gpu, needs)
    actors.check(options.engine, device)
    return actors


def machines(options: argparse.Namespace, paths: Sequence[tuple[str, PathOrUrl]]) -> Machines:
    """Read the options of machines. Raises ``UserError`` where they contradict each other.

    ``paths`` are (flag, path) of what every machine must find under the same name.
    """
    address = parse_address(options.ray_address)
    if address and options.engine != "ray":
        raise UserError(f"--ray-address needs --engine ray, not {options.engine}")
    if options.engine == "ray" and (address or os.environ.get("RAY_ADDRESS")):
        require_everywhere([(flag, str(path)) for flag, path in paths])
    else:  # the workers are here
        require_device(options.device, "--device")
        require_device(getattr(options, "teacher_device", ""), "--teacher-device")
    return Machines(address, parse_stage(options.worker_needs, "--worker-needs"))


def corpus_places(roots: Roots) -> list[tuple[str, PathOrUrl]]:
    """Corpus folders, each with the flag that gives it."""
    return [(f"--corpus {name}", folder) for name, folders in roots.items() for folder in folders]
