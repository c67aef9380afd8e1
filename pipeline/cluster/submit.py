"""Submit shards to many machines: ``python -m pipeline submit KIND --site FILE -- JOB``.

JOB is what follows ``python -m pipeline shards``, without what says where it runs: that is the
site's. Submitted again, a job goes on where it was. ``--rates``, as ``estimate --save`` wrote them,
print how long the job takes and how large it is.
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
from data_specs.cluster.needs import Stage, parse_stage, require_everywhere, require_no_secret
from data_specs.cluster.site import Machine, Site, load_site, on_gpus
from data_specs.io.addresses import path_here, shown
from data_specs.io.errors import UserError
from data_specs.recipe import Recipe, load_recipe
from data_specs.strict import unknown
from pipeline.cluster import rates as rate_files
from pipeline.options import corpus_and_folder, parse_beside, parse_shards, parse_splits

KINDS = ("ray", "slurm", "slurm-array", "kubernetes")
SAID_BY_SITE = ("--engine", "--ray-address", "--part")
OF_TEACHERS = ("--device", "--teacher-device", "--teacher-actors", "--teachers-per-gpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    submit.add_arguments(parser, KINDS)
    about = "of `python -m pipeline estimate ... --save FILE`: say how long and how large"
    parser.add_argument("--rates", type=path_here, metavar="FILE", help=about)


def run(options: argparse.Namespace) -> int:
    """Submit or show; the exit status is that of what was run."""
    made = submission(options.kind, load_site(options.site), options.job, options.rates)
    return submit.hand_over(made, options.dry_run)


def submission(
    kind: str, site: Site, job: list[str], rates: Path | None = None
) -> submit.Submission:
    """Render a job. Raises ``UserError`` for one that would fail where it runs."""
    flags = _flags(kind, site, job, _checked(kind, site, job))
    command = [site.python, "-m", "pipeline", "shards", *job, *flags]
    if kind == "kubernetes":
        made = submit.kubernetes(site, command, importlib.metadata.version("ray"))
    else:
        kinds = {"ray": submit.ray_job, "slurm": submit.slurm, "slurm-array": submit.slurm_array}
        made = kinds[kind](site, command)
    options = parse_shards([*job, *flags])
    recipe = load_recipe(options.recipe)
    notes = [made.where, f"how: {shlex.join(flags)}", *_what(kind, site, recipe, options)]
    return replace(made, where="\n".join([*notes, _how_long(kind, site, recipe, options, rates)]))


def _checked(kind: str, site: Site, job: Sequence[str]) -> argparse.Namespace:
    """Parse a job, and hold it to what other machines can find."""
    submit.refuse_flags(job, SAID_BY_SITE)
    options = parse_shards(job)
    recipe = load_recipe(options.recipe)
    corpora = {source.corpus for source in recipe.sources.present().values()}
    parse_splits(options.split, list(recipe.sources.present()))
    folders = [corpus_and_folder(option) for option in options.corpus]
    for name in sorted({name for name, _ in folders} - corpora):
        raise UserError(f"--corpus {shown(name)}: {unknown('corpus', shown(name), corpora)}")
    paths = [(f"--corpus {name}", folder) for name, folder in folders]
    outs = [("--out", options.out), *(("--and", out) for _, _, out in parse_beside(options.beside))]
    submit.check_paths(kind, site, [*((flag, str(out)) for flag, out in outs), *paths])
    require_no_secret([("the job:", word) for word in job])
    for name in sorted(corpora - {name for name, _ in folders}):
        if f"CORPUS_{name.upper()}" not in site.environment:
            raise UserError(
                f"the recipe needs corpus {name!r}: give --corpus {name}=DIR, or CORPUS_"
                f"{name.upper()} in the site's environment (this machine's is not taken along)"
            )
    if kind != "ray" and Path(options.recipe).suffix in (".yaml", ".yml"):
        require_everywhere([("recipe", options.recipe)])
    return options


# --- what a site adds to a job --------------------------------------------------------------------


def _flags(kind: str, site: Site, job: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The flags that fit a job into a site."""
    worker = parse_stage(options.worker_needs, "--worker-needs") if options.worker_needs else None
    teacher = (
        parse_stage(options.teacher_needs, "--teacher-needs") if options.teacher_needs else None
    )
    of_job = any(submit.is_given(job, flag) for flag in OF_TEACHERS)
    stage = None if of_job else teacher or site.teacher
    workers, teachers = _capacity(kind, site, worker or site.worker, stage)
    alone = kind == "slurm-array"
    flags = ["--engine", "local" if alone else "ray"]
    if not submit.is_given(job, "--workers"):
        flags += ["--workers", str(workers)]
    if not alone and worker is None:
        flags += ["--worker-needs", site.worker.flag()]
    if teachers:
        flags += ["--teacher-device", "cuda"]
    if teachers and not alone:
        flags += ["--teacher-actors", str(teachers)]
        flags += [] if teacher else ["--teacher-needs", site.teacher.flag()]
    return flags if kind.startswith("slurm") else [*flags, "--ray-address", "auto"]


def _capacity(kind: str, site: Site, worker: Stage, teacher: Stage | None) -> tuple[int, int]:
    """How many workers a site holds (of a Slurm array: a task), and how many of some teachers the
    GPUs that are there at the start."""
    at = submit.section(site, kind)
    if kind == "slurm-array":
        return at.workers(worker), int(bool(teacher and at.gpus))
    if kind == "slurm":
        teachers = [teacher] * at.teachers(teacher) if teacher and at.gpus else []
        return at.nodes * at.workers(worker, teachers), at.nodes * len(teachers)
    if kind == "ray":
        return at.workers, on_gpus(at.gpus, teacher) if teacher else 0
    count = at.gpu.min * at.gpu.teachers(teacher) if teacher and at.gpu else 0
    return at.cpu.max * at.cpu.workers(worker), count


# --- notes ----------------------------------------------------------------------------------------


def _what(kind: str, site: Site, recipe: Recipe, options: argparse.Namespace) -> Iterator[str]:
    """What is asked for, and what of the machines will lie idle."""
    shards = math.ceil(options.samples / recipe.shard_samples)
    machine, jobs, _ = _machines(kind, site, shards)
    workers = options.workers * jobs
    few = f": fewer than the {workers} workers, some have nothing to do" if shards < workers else ""
    yield f"what: {options.samples} samples of {recipe.name} in {shards} shards{few}"
    needs = (
        parse_stage(options.worker_needs, "--worker-needs") if options.worker_needs else site.worker
    )
    if machine and machine.workers(needs) < int(machine.cores / (needs.cores or 1)):
        yield (
            f"note: memory allows {machine.workers(needs)} workers on a machine of {machine.cores} "
            f"cores ({machine.memory_gb:g} GB, {needs.memory_gb:g} a worker)"
        )


def _machines(kind: str, site: Site, shards: int) -> tuple[Machine | None, int, int]:
    """A machine with workers where a site says what it is, how many jobs are at work at once, and
    the GPUs of all."""
    at = submit.section(site, kind)
    if kind == "slurm-array":
        at_once = min(at.at_once or at.parts, at.parts, shards)
        return at, at_once, at_once * at.gpus
    if kind == "slurm":
        return at, 1, at.nodes * at.gpus
    if kind == "ray":
        return None, 1, at.gpus
    return at.cpu, 1, at.gpu.min * at.gpu.gpus if at.gpu else 0


def _how_long(
    kind: str, site: Site, recipe: Recipe, options: argparse.Namespace, path: Path | None
) -> str:
    """How long and how large, by the rates of a file, or how to come by such a file."""
    device = (options.teacher_device or options.device).partition(":")[0]
    words = ["python", "-m", "pipeline", "estimate", options.recipe]
    words += [word for corpus in options.corpus for word in ("--corpus", corpus)]
    measure = shlex.join([*words, "--teacher-device", device, "--save", "rates.yaml"])
    if path is None:
        return f"how long: run `{measure}` on such a machine, then give --rates rates.yaml"
    rates = rate_files.read(path, recipe)
    if options.device != "cpu" or bool(rates.gpu_s) != (device != "cpu"):
        raise UserError(
            f"--rates {path}: was measured with processors on cores and the teacher on "
            f"{'a GPU' if rates.gpu_s else 'cores'}, and the job runs otherwise: `{measure}`"
        )
    shards = math.ceil(options.samples / recipe.shard_samples)
    _, jobs, gpus = _machines(kind, site, shards)
    workers = options.workers * jobs
    found = rate_files.predict(rates, options.samples, recipe.shard_samples, workers, gpus)
    return (
        f"how long: {found.seconds / 3600:.2f} h with {workers} workers at once, bottleneck: "
        f"{found.bottleneck}; how large: {found.written_bytes / 1e9:.2f} GB; by rates of "
        f"{rates.about or 'an unnamed machine'}, as if everything there were as fast"
    )
