"""Submits a training by torchrun. ``python -m train submit KIND --site FILE -- JOB``.

JOB is what follows ``python -m train fit``, without devices and nodes: those are the site's.
Submitted again, a run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_specs.cluster import submit
from data_specs.cluster.needs import require_everywhere, require_kept, require_no_secret
from data_specs.cluster.site import Site
from data_specs.io.errors import UserError

KINDS = {
    "slurm": submit.train_slurm,
    "kubernetes": submit.train_kubernetes,
    "ray": submit.train_ray,
}
SAID_BY_SITE = ("--devices", "--nodes", "--resume")


def main(argv: Sequence[str]) -> int:
    """Run the verb; exit status as of what was run (2: bad input)."""
    return submit.main(argv, "python -m train submit", tuple(KINDS), __doc__ or "", submission)


def submission(kind: str, site: Site, job: list[str]) -> submit.Submission:
    """What is handed over. ``ValueError`` for a job that would fail where it runs."""
    from train.models.student import variant
    from train.student import fit

    for flag in SAID_BY_SITE:
        if any(word == flag or word.startswith(f"{flag}=") for word in job):
            raise UserError(f"{flag}: leave it out: the site says it, and a run always goes on")
    parser = argparse.ArgumentParser(prog="python -m train fit")
    fit.add_arguments(parser)
    options = parser.parse_args(job)
    places = ("shards", "validation", "rated", "rated_validation", "out")
    found = {f"--{name.replace('_', '-')}": getattr(options, name) for name in places}
    given = [(flag, str(path)) for flag, path in found.items() if path]
    require_everywhere(given)
    require_no_secret(given)
    if not (options.shards or options.rated):
        raise UserError("nothing to train on: give --shards, --rated labels.csv, or both")
    if options.student:
        variant(options.student)
    if kind == "kubernetes":
        require_kept("--out", str(options.out), submit.on_kubernetes(site).mount)
    device = [] if any(word.startswith("--device") for word in job) else _device(site)
    return KINDS[kind](site, ["-m", "train", "fit", *job, *device])


def _device(site: Site) -> list[str]:
    return ["--device", "cuda" if submit.section(site, "training").gpus else "cpu"]
