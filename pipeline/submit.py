"""Submits shards to many machines. ``python -m pipeline submit KIND --site FILE -- JOB``.

JOB is what follows ``python -m pipeline shards``, without what says where it runs: that is the
site's. Submitted again, a job goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_specs.addresses import shown
from data_specs.cluster import submit
from data_specs.cluster.needs import Stage, parse_stage, require_everywhere, require_no_secret
from data_specs.cluster.site import Machine, Site, on_gpus
from data_specs.recipe import load_recipe
from pipeline.forecast import forecast

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
    return replace(made, where=f"{made.where}\nhow: {shlex.join(flags)}")


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
    from pipeline.__main__ import parser

    for flag in SAID_BY_SITE:
        if _given(job, flag):
            raise ValueError(f"{flag}: leave it out: it follows from the kind and the site")
    options = parser().parse_args(["shards", *job])
    recipe = load_recipe(options.recipe)
    folders = [_folder(option) for option in options.corpus]
    given = [("--out", str(options.out)), *((f"--corpus {name}", at) for name, at in folders)]
    require_everywhere(given)
    require_no_secret(given)
    there = {name for name, _ in folders}
    for name in {source.corpus for source in recipe.sources.present().values()} - there:
        if f"CORPUS_{name.upper()}" not in site.environment:
            raise ValueError(
                f"the recipe needs corpus {name!r}: give --corpus {name}=DIR, or CORPUS_"
                f"{name.upper()} in the site's environment (this machine's is not taken along)"
            )
    if kind != "ray" and Path(options.recipe).suffix in (".yaml", ".yml"):
        require_everywhere([("recipe", options.recipe)])


def _folder(option: str) -> tuple[str, str]:
    name, equals, folder = option.partition("=")
    if not equals or not folder:
        raise ValueError(f"--corpus {shown(option)}: write NAME=DIR")
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
    worker = _stage(job, "--worker-needs", site.worker)
    teacher = _stage(job, "--teacher-needs", site.teacher)
    workers, teachers = _room(kind, site, worker, teacher)
    flags = ["--engine", "ray"]
    if not _given(job, "--workers"):
        flags += ["--workers", str(workers)]
    if not _given(job, "--worker-needs"):
        flags += ["--worker-needs", worker.flag()]
    if teachers and not any(_given(job, flag) for flag in OF_TEACHERS):
        flags += ["--teacher-device", "cuda", "--teacher-actors", str(teachers)]
        if not _given(job, "--teacher-needs"):
            flags += ["--teacher-needs", teacher.flag()]
    return flags


def _room(kind: str, site: Site, worker: Stage, teacher: Stage) -> tuple[int, int]:
    """How many workers a site has room for, and teachers on the GPUs there at the start."""
    at = submit.section(site, kind)
    if kind == "slurm":
        return at.nodes * at.workers(worker), at.nodes * at.teachers(teacher) if at.gpus else 0
    if kind == "ray":
        return at.workers, on_gpus(at.gpus, teacher)
    teachers = at.gpu.min * at.gpu.teachers(teacher) if at.gpu else 0
    return at.cpu.max * at.cpu.workers(worker), teachers


def _alone(site: Site, job: Sequence[str]) -> list[str]:
    """The flags of one task of an array."""
    flags = ["--engine", "local"]
    array: Machine | None = submit.section(site, "slurm").array
    if array and not _given(job, "--workers"):
        flags += ["--workers", str(array.workers(_stage(job, "--worker-needs", site.worker)))]
    if array and array.gpus and not any(_given(job, flag) for flag in OF_TEACHERS):
        flags += ["--teacher-device", "cuda"]
    return flags
