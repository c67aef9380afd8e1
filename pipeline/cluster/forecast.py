"""How long and how large a job will be on the machines of a site, before it is handed over.

Rates are those that ``python -m pipeline estimate`` measured, and the model is its own
(``pipeline.cluster.throughput``); only the machines are the site's, and the samples the job's.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_specs.cluster import submit
from data_specs.cluster.needs import parse_stage
from data_specs.cluster.site import Site
from data_specs.io.errors import UserError
from data_specs.recipe import Recipe, load_recipe
from data_specs.strict import load
from pipeline.cluster.throughput import TEACHER, Cluster, Rates, cost_sha256, predict
from pipeline.dataset.job import CLIP_HOURS
from pipeline.options import parse_shards, teacher_actors


def forecast(kind: str, site: Site, command: Sequence[str], rates: Path | None) -> str:
    """A line or two about a job: ``command`` is all of it behind ``shards``. ``ValueError`` where
    the rates are not the job's."""
    options = parse_shards(command)
    if rates is None:
        return _how_to_know(options)
    recipe = load_recipe(options.recipe)
    known = _read(rates, recipe)
    try:
        found = _predict(kind, site, recipe, _of_devices(known, options), options)
    except UserError as error:
        raise UserError(
            f"--rates {rates}: {error}. `python -m pipeline estimate {options.recipe} --rates "
            f"{rates} ... --save {rates}` adds what is given to the file"
        ) from error
    return "\n".join(_lines(recipe, options.samples, known, found))


def _how_to_know(options: argparse.Namespace) -> str:
    measure = ["python", "-m", "pipeline", "estimate", options.recipe]
    measure += [word for corpus in options.corpus for word in ("--corpus", corpus)]
    if _label_device(options).startswith("cuda"):
        measure += ["--teacher-device", "cuda"]
    command = shlex.join([*measure, "--save", "rates.yaml"])
    return f"how long, how large: run `{command}` on such a machine, then give --rates rates.yaml"


def _read(path: Path, recipe: Recipe) -> Rates:
    """A file's rates. ``ValueError`` where they were measured on another recipe."""
    rates = load(Rates, path)
    if rates.recipe_sha256 not in ("", cost_sha256(recipe)):  # empty: an older file
        other = f"recipe {rates.recipe!r}"
        if rates.recipe == recipe.name:
            other = f"another version of recipe {recipe.name!r}"
        raise UserError(
            f"--rates {path}: was measured on {other}, the job makes {recipe.name!r}: measure that "
            "(python -m pipeline estimate ... --save FILE)"
        )
    return rates


def _label_device(options: argparse.Namespace) -> str:
    return str(options.teacher_device or options.device)


def _of_devices(rates: Rates, options: argparse.Namespace) -> Rates:
    """Without GPU rates of what the job runs on cores. ``ValueError`` where it needs one."""
    kinds = {TEACHER} if _label_device(options).startswith("cuda") else set()
    if kinds - set(rates.gpu):
        raise UserError(
            "the job's teacher is on a GPU and has no rate there: measure with --teacher-device "
            "cuda, or give --gpu-rate teacher=X"
        )
    if options.device.startswith("cuda"):
        kinds |= set(rates.gpu)
        if not kinds - {TEACHER}:
            raise UserError("--device cuda: no processor has a rate there: give --gpu-rate NAME=X")
    return rates.model_copy(update={"gpu": {kind: rates.gpu[kind] for kind in kinds}})


# --- the model, on a site's machines --------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """Of a whole job; ``workers`` are those that are at work at once."""

    seconds: float
    workers: int
    bytes_written: float
    bottleneck: str


def _predict(
    kind: str, site: Site, recipe: Recipe, rates: Rates, options: argparse.Namespace
) -> Forecast:
    if kind == "slurm-array":
        return _predict_array(site, recipe, rates, options)
    cluster = _on_ray(_room(kind, site), rates, options)
    found = predict(recipe, rates, options.samples, cluster)
    return Forecast(found.seconds, cluster.workers, found.bytes_written, found.bottleneck)


def _predict_array(
    site: Site, recipe: Recipe, rates: Rates, options: argparse.Namespace
) -> Forecast:
    """As long as the largest part, and as often as tasks take turns."""
    array = submit.section(site, "slurm").array
    shards = math.ceil(options.samples / recipe.shard_samples)
    samples = min(options.samples, math.ceil(shards / array.parts) * recipe.shard_samples)
    gpus = _require_gpus(array.gpus) if rates.gpu else 0.0
    part = predict(recipe, rates, samples, Cluster(1, options.workers, gpus))
    tasks = min(array.parts, shards)
    at_once = min(array.at_once or tasks, tasks)
    return Forecast(
        seconds=part.seconds * math.ceil(tasks / at_once),
        workers=at_once * options.workers,
        bytes_written=options.samples * rates.bytes_written,
        bottleneck=part.bottleneck,
    )


@dataclass(frozen=True)
class Room:
    """Machines with workers, and the cores and GPUs of all that a job on Ray finds."""

    nodes: int
    cores: float
    gpus: float


def _room(kind: str, site: Site) -> Room:
    at = submit.section(site, kind)
    if kind == "slurm":
        return Room(at.nodes, at.nodes * at.cores, at.nodes * at.gpus)
    if kind == "ray":  # of whose machines a site says nothing: all workers count as neighbours
        return Room(1, math.inf, at.gpus)
    cores, gpus = at.cpu.max * at.cpu.cores, 0
    if at.gpu:
        cores, gpus = cores + at.gpu.min * at.gpu.cores, at.gpu.min * at.gpu.gpus
    return Room(at.cpu.max, cores, gpus)


def _on_ray(room: Room, rates: Rates, options: argparse.Namespace) -> Cluster:
    """The workers for whom teachers leave room, and the GPUs that are used."""
    actors = teacher_actors(options, _label_device(options))
    teacher = actors.options(_label_device(options).startswith("cuda"))
    worker = parse_stage(options.worker_needs, "--worker-needs")
    left, workers = room.cores - actors.count * teacher["num_cpus"], options.workers
    if worker.cores and math.isfinite(left):
        workers = max(1, min(workers, int(left / worker.cores + 1e-6)))
    gpus = _require_gpus(room.gpus) if rates.gpu else 0.0
    if actors.count and teacher["num_gpus"] and options.device == "cpu":
        gpus = min(gpus, actors.count * teacher["num_gpus"])
    # The model's machines are alike: as many as workers can be dealt to without a rest.
    nodes = max(n for n in range(1, min(room.nodes, workers) + 1) if workers % n == 0)
    return Cluster(nodes, workers // nodes, gpus / nodes)


def _require_gpus(gpus: float) -> float:
    if not gpus:
        raise UserError("the job computes on cuda, and the site's machines have no GPUs")
    return gpus


def _lines(recipe: Recipe, samples: int, rates: Rates, found: Forecast) -> Iterator[str]:
    shards = math.ceil(samples / recipe.shard_samples)
    yield (
        f"how long: {found.seconds / 3600:.2f} h with {found.workers} workers at once, bottleneck: "
        f"{found.bottleneck}; how large: {found.bytes_written / 1e9:.2f} GB, {samples} samples "
        f"({samples * CLIP_HOURS:.1f} h of audio) in {shards} shards"
    )
    yield (
        f"by rates of {rates.about or 'an unnamed machine'}; assumed: cores there are as fast, "
        "network and store are no limit, and nothing was made before"
    )
