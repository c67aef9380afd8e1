"""Options that several verbs have, and what they stand for."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from data_specs.cluster.needs import (
    EVERY,
    parse_address,
    parse_stage,
    require_everywhere,
)
from data_specs.io.addresses import Place, place, shown
from data_specs.io.errors import UserError
from data_specs.io.hardware import cpus, require_device
from data_specs.recipe import Recipe
from pipeline.engine.base import Machines, TeacherActors
from pipeline.render.guard import TIME_LIMIT_S
from pipeline.render.render import Roots

SPLITS = ("train", "validation", "test", "all")


def recipe_option(verb: argparse.ArgumentParser) -> None:
    """The recipe and its corpora."""
    verb.add_argument("recipe", help="YAML file, or the name of one in data_specs/recipes")
    corpus_option(verb)


def sample_options(verb: argparse.ArgumentParser) -> None:
    """Which samples."""
    verb.add_argument("--samples", type=int, required=True)
    verb.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="SPLIT|ROLE=SPLIT",
        help="train (default), validation, test or all; for every role or for one",
    )


def shards_options(verb: argparse.ArgumentParser) -> None:
    """All of the verb ``shards``."""
    recipe_option(verb)
    verb.add_argument("--out", type=place, required=True, help="a folder, or its address")
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
    engine_options(verb)
    worker_options(verb)


def parse_shards(words: Sequence[str]) -> argparse.Namespace:
    """The options of a job that is ``shards WORDS``, held to its parser."""
    parser = argparse.ArgumentParser(prog="python -m pipeline shards")
    shards_options(parser)
    return parser.parse_args(words)


def corpus_option(verb: argparse.ArgumentParser) -> None:
    """The folders of corpora."""
    verb.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="folder of a corpus, or its address; may be given more than once for one corpus; "
        "or the environment: CORPUS_NAME=DIR[:DIR]",
    )


def outside_option(verb: argparse.ArgumentParser) -> None:
    """The word that lets a dataset's records lead out of the corpora's folders."""
    verb.add_argument(
        "--allow-outside",
        action="store_true",
        help="follow links that lead out of the corpora's folders: for datasets of your own",
    )


def worker_options(verb: argparse.ArgumentParser) -> None:
    """Where new samples are made, and how long one may take."""
    verb.add_argument("--device", default="cpu", help="of the networks (default cpu)")
    verb.add_argument("--teacher-device", default="", help="of the teacher (default: --device)")
    verb.add_argument(
        "--time-limit",
        type=float,
        default=TIME_LIMIT_S,
        metavar="SECONDS",
        help="drop a sample on which a processor takes longer (default %(default)g)",
    )


def parse_roots(options: Sequence[str], recipe: Recipe) -> Roots:
    """Corpus folders from ``NAME=DIR`` options, else from ``CORPUS_NAME`` in the environment.

    A folder is a path or an address.
    """
    roots: Roots = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or not folder:
            raise UserError(f"--corpus {shown(option)}: write NAME=DIR")
        roots.setdefault(name, []).append(place(folder))
    for name in {source.corpus for source in recipe.sources.present().values()} - set(roots):
        value = os.environ.get(f"CORPUS_{name.upper()}", "")
        if value:
            # Between folders, not behind an address' protocol nor before its port.
            parts = re.split(r":(?!//|\d+(?:/|$))", value)
            roots[name] = [place(folder) for folder in parts]
    return roots


def parse_splits(options: Sequence[str], roles: Sequence[str]) -> dict[str, str]:
    """Split of each role from ``SPLIT`` (all roles) and ``ROLE=SPLIT`` options."""
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
    out: Place


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
        found.append(Beside(match[1], int(match[2]), place(match[3])))
    return found


def engine_options(verb: argparse.ArgumentParser) -> None:
    """How and by how many shards are made: nothing that is data."""
    verb.add_argument("--engine", choices=("ray", "local"), default="ray")
    verb.add_argument("--workers", type=int, default=cpus())
    verb.add_argument(
        "--teacher-actors",
        type=int,
        default=0,
        metavar="N",
        help="N teachers that all of Ray's workers share, such as one for each GPU "
        "(default: every worker loads its own)",
    )
    verb.add_argument(
        "--teachers-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="how many of them share a GPU (default %(default)s)",
    )
    verb.add_argument(
        "--ray-address",
        default="",
        metavar="auto|HOST:PORT",
        help="of a running Ray cluster (default: RAY_ADDRESS, or a Ray of its own)",
    )
    for stage in ("worker", "teacher"):
        verb.add_argument(
            f"--{stage}-needs",
            default="",
            metavar="cores=N,memory_gb=N,gpus=N",
            help=f"what Ray reserves for a {stage} (default: a core; where it computes on cuda, "
            "its share of the GPUs)",
        )
    verb.add_argument(
        "--part",
        default=str(EVERY),
        metavar="I/N",
        help="make only the I-th of N parts (from 1), beside other jobs that make the others",
    )


def teacher_actors(options: argparse.Namespace, device: str) -> TeacherActors:
    """What ``engine_options`` say of teachers; ``ValueError`` where it cannot be."""
    needs = parse_stage(options.teacher_needs, "--teacher-needs")
    actors = TeacherActors(options.teacher_actors, options.teachers_per_gpu, needs)
    actors.check(options.engine, device)
    return actors


def machines(options: argparse.Namespace, places: Sequence[tuple[str, Place]]) -> Machines:
    """What ``engine_options`` say of machines; ``ValueError`` where it cannot be.

    ``places`` are (flag, path) of what every machine must find under the same name.
    """
    address = parse_address(options.ray_address)
    if address and options.engine != "ray":
        raise UserError(f"--ray-address needs --engine ray, not {options.engine}")
    if options.engine == "ray" and (address or os.environ.get("RAY_ADDRESS")):
        require_everywhere([(flag, str(place)) for flag, place in places])
    else:  # the workers are here
        require_device(options.device, "--device")
        require_device(getattr(options, "teacher_device", ""), "--teacher-device")
    return Machines(address, parse_stage(options.worker_needs, "--worker-needs"))


def corpus_places(roots: Roots) -> list[tuple[str, Place]]:
    """Corpus folders, each with the flag that gives it."""
    return [(f"--corpus {name}", folder) for name, given in roots.items() for folder in given]
