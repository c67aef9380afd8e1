"""Submits shards to many machines. ``python -m pipeline submit KIND --site FILE -- JOB``.

JOB is what follows ``python -m pipeline shards``, without what says where it runs: that is the
site's. Submitted again, a job goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_specs.cluster import submit
from data_specs.cluster.needs import (
    Stage,
    parse_stage,
    require_everywhere,
    require_kept,
    require_no_secret,
)
from data_specs.cluster.site import Machine, Site, on_gpus
from data_specs.io.addresses import shown
from data_specs.io.errors import UserError
from data_specs.recipe import load_recipe
from data_specs.strict import unknown
from pipeline.cluster.forecast import forecast
from pipeline.options import parse_beside, parse_shards, parse_splits

KINDS = ("ray", "slurm", "slurm-array", "kubernetes")
SAID_BY_SITE = ("--engine", "--ray-address", "--part")
OF_TEACHERS = ("--device", "--teacher-device", "--teacher-actors", "--teachers-per-gpu")


def main(argv: Sequence[str]) -> int:
    """Run the verb; exit status as of what was run (2: bad input)."""
    return submit.main(argv, "python -m pipeline submit", KINDS, __doc__ or "", submission, foresee)


def submission(kind: str, site: Site, job: list[str]) -> submit.Submission:
    """What is handed over. ``ValueError`` for a job that would fail where it runs."""
    _check(kind, site, job)
    flags = _flags(kind, site, job)
    made = _made(kind, site, [site.python, "-m", "pipeline", "shards", *job, *flags])
    told = [made.where, f"how: {shlex.join(flags)}", *_told(kind, site, [*job, *flags])]
    return replace(made, where="\n".join(told))


def _told(kind: str, site: Site, command: list[str]) -> Iterator[str]:
    """What is asked for, and what of the machines will lie idle."""
    options = parse_shards(command)
    recipe = load_recipe(options.recipe)
    machine, tasks = _machine(kind, site)
    workers = options.workers * tasks
    shards = math.ceil(options.samples / recipe.shard_samples)
    few = f": fewer than the {workers} workers, some have nothing to do" if shards < workers else ""
    yield f"what: {options.samples} samples of {recipe.name} in {shards} shards{few}"
    needs = _worker(site, command)
    if machine and machine.workers(needs) < int(machine.cores / (needs.cores or 1)):
        yield (
            f"note: memory allows {machine.workers(needs)} workers on a machine of {machine.cores} "
            f"cores ({machine.memory_gb:g} GB, {needs.memory_gb:g} a worker)"
        )


def _machine(kind: str, site: Site) -> tuple[Machine | None, int]:
    """A machine with workers, where a site says what it is; and how many jobs there are."""
    if kind == "ray":
        return None, 1
    at = submit.section(site, kind.partition("-")[0])
    if kind == "slurm-array":
        return at.array, at.array.parts
    return (at.cpu if kind == "kubernetes" else at), 1


def _worker(site: Site, job: Sequence[str]) -> Stage:
    return _stage(job, "--worker-needs", site.worker)


def foresee(kind: str, site: Site, job: list[str], rates: Path | None) -> str:
    """How long and how large it will be, by what ``estimate --save`` measured."""
    return forecast(kind, site, [*job, *_flags(kind, site, job)], rates)


def _flags(kind: str, site: Site, job: Sequence[str]) -> list[str]:
    """What a site adds to a job."""
    return _alone(site, job) if kind == "slurm-array" else _on_ray(kind, site, job)


def _made(kind: str, site: Site, command: list[str]) -> submit.Submission:
    if kind == "slurm-array":
        return submit.slurm_array(site, command)
    if kind == "slurm":
        return submit.slurm(site, command)
    command += ["--ray-address", "auto"]
    if kind == "ray":
        return submit.ray_job(site, command)
    return submit.kubernetes(site, command, importlib.metadata.version("ray"))


def _check(kind: str, site: Site, job: Sequence[str]) -> None:
    """Hold a job to the parser and to what other machines can find."""
    for flag in SAID_BY_SITE:
        if _given(job, flag):
            raise UserError(f"{flag}: leave it out: it follows from the kind and the site")
    options = parse_shards(job)
    recipe = load_recipe(options.recipe)
    corpora = {source.corpus for source in recipe.sources.present().values()}
    parse_splits(options.split, list(recipe.sources.present()))
    folders = [_folder(option) for option in options.corpus]
    for name, _ in folders:
        if name not in corpora:
            raise UserError(f"--corpus {shown(name)}: {unknown('corpus', shown(name), corpora)}")
    outs = [options.out, *(one.out for one in parse_beside(options.beside))]
    given = [*(("--out", str(out)) for out in outs), *((f"--corpus {n}", at) for n, at in folders)]
    require_everywhere(given)
    require_no_secret([*given, *(("the job:", word) for word in job)])
    if kind == "kubernetes":
        for out in outs:
            require_kept("--out", str(out), submit.on_kubernetes(site).mount)
    there = {name for name, _ in folders}
    for name in sorted(corpora - there):
        if f"CORPUS_{name.upper()}" not in site.environment:
            raise UserError(
                f"the recipe needs corpus {name!r}: give --corpus {name}=DIR, or CORPUS_"
                f"{name.upper()} in the site's environment (this machine's is not taken along)"
            )
    if kind != "ray" and Path(options.recipe).suffix in (".yaml", ".yml"):
        require_everywhere([("recipe", options.recipe)])


def _folder(option: str) -> tuple[str, str]:
    name, equals, folder = option.partition("=")
    if not equals or not folder:
        raise UserError(f"--corpus {shown(option)}: write NAME=DIR")
    return name, folder


def _given(job: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in job)


def _stage(job: Sequence[str], flag: str, otherwise: Stage) -> Stage:
    """What a job says of a stage, or else the site."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument(flag)
    said = vars(known.parse_known_args(list(job))[0])[flag.strip("-").replace("-", "_")]
    return parse_stage(said, flag) if said is not None else otherwise


def _on_ray(kind: str, site: Site, job: Sequence[str]) -> list[str]:
    """The flags that fit a job into a site."""
    worker = _worker(site, job)
    teacher = _stage(job, "--teacher-needs", site.teacher)
    of_job = any(_given(job, flag) for flag in OF_TEACHERS)
    workers, teachers = _room(kind, site, worker, None if of_job else teacher)
    flags = ["--engine", "ray"]
    if not _given(job, "--workers"):
        flags += ["--workers", str(workers)]
    if not _given(job, "--worker-needs"):
        flags += ["--worker-needs", worker.flag()]
    if teachers:
        flags += ["--teacher-device", "cuda", "--teacher-actors", str(teachers)]
        if not _given(job, "--teacher-needs"):
            flags += ["--teacher-needs", teacher.flag()]
    return flags


def _room(kind: str, site: Site, worker: Stage, teacher: Stage | None) -> tuple[int, int]:
    """How many workers a site has room for, and how many of some teachers the GPUs that are there
    at the start."""
    at = submit.section(site, kind)
    if kind == "slurm":
        teachers = [teacher] * at.teachers(teacher) if teacher and at.gpus else []
        return at.nodes * at.workers(worker, teachers), at.nodes * len(teachers)
    if kind == "ray":
        return at.workers, on_gpus(at.gpus, teacher) if teacher else 0
    count = at.gpu.min * at.gpu.teachers(teacher) if teacher and at.gpu else 0
    return at.cpu.max * at.cpu.workers(worker), count


def _alone(site: Site, job: Sequence[str]) -> list[str]:
    """The flags of one task of an array."""
    flags = ["--engine", "local"]
    array: Machine | None = submit.section(site, "slurm").array
    if array and not _given(job, "--workers"):
        flags += ["--workers", str(array.workers(_worker(site, job)))]
    if array and array.gpus and not any(_given(job, flag) for flag in OF_TEACHERS):
        flags += ["--teacher-device", "cuda"]
    return flags
