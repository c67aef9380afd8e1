"""Submit a training by torchrun: ``python -m train submit KIND --site FILE -- JOB``.

JOB is what follows ``python -m train fit``, without devices and nodes: those are the site's.
Submitted again, a run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse

from data_specs.cluster import submit
from data_specs.cluster.site import Site, load_site
from data_specs.io.errors import UserError

KINDS = {
    "slurm": submit.train_slurm,
    "kubernetes": submit.train_kubernetes,
    "ray": submit.train_ray,
}
SAID_BY_SITE = ("--devices", "--nodes", "--resume")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    submit.add_arguments(parser, tuple(KINDS))


def run(options: argparse.Namespace) -> int:
    """Submit or show; the exit status is that of what was run."""
    made = submission(options.kind, load_site(options.site), options.job)
    return submit.hand_over(made, options.dry_run)


def submission(kind: str, site: Site, job: list[str]) -> submit.Submission:
    """Render a training. Raises ``UserError`` for a job that would fail where it runs."""
    from train.models.student import variant
    from train.student import fit

    submit.refuse_flags(job, SAID_BY_SITE)
    parser = argparse.ArgumentParser(prog="python -m train fit")
    fit.add_arguments(parser)
    options = parser.parse_args(job)
    names = ("shards", "validation", "rated", "rated_validation", "out")
    values = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    paths = [(flag, str(path)) for flag, path in values.items() if path]
    submit.check_paths(kind, site, paths)
    if not (options.shards or options.rated):
        raise UserError("nothing to train on: give --shards, --rated labels.csv, or both")
    if options.student:
        variant(options.student)
    command = ["-m", "train", "fit", *job]
    if not submit.is_given(job, "--device"):
        command += ["--device", "cuda" if submit.section(site, "training").gpus else "cpu"]
    return KINDS[kind](site, command)
