"""Render what is submitted to Ray, Slurm or Kubernetes, show it, or hand it over.

The verbs ``submit`` of the pipeline and of training are both made of this.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_specs.cluster.needs import require_everywhere, require_kept, require_no_secret
from data_specs.cluster.site import RESERVE_GB, Machine, Site, Training
from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.strict import SpecError

STORE_BYTES = 1 << 28
"""Ray's object store on each machine: shard numbers, and PCM on its way to teachers."""

EXCLUDED = (".git", ".venv", "runs", "tests", ".readme")
"""Of the working directory, what a Ray job does not need."""

JOB_LOG = "%x-%j.log"
"""As Slurm spells a job's name and number."""

UNINTERPRETED = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")
"""What passes through KubeRay's and Ray's own command lines as it is."""


@dataclass(frozen=True)
class Submission:
    """A command, the file it reads from its input, and lines about what runs where."""

    command: tuple[str, ...]
    file: str
    where: str


def add_arguments(parser: argparse.ArgumentParser, kinds: Sequence[str]) -> None:
    """Options of both verbs; the job stands behind ``--``."""
    parser.usage = f"{parser.prog} {{{','.join(kinds)}}} --site FILE [options] -- JOB..."
    parser.add_argument("kind", choices=kinds, help="of cluster")
    parser.add_argument(
        "--site", type=path_here, required=True, help="see data_specs/cluster/site.example.yaml"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    parser.add_argument("job", nargs="+", metavar="JOB", help="the job's own options, behind --")


def hand_over(made: Submission, dry_run: bool) -> int:
    """Run the command, or print its file alone on standard output, so that it can be kept.

    Returns the command's exit status. Raises ``UserError`` where this machine does not have it.
    """
    if not dry_run and not shutil.which(made.command[0]):
        raise UserError(
            f"{made.command[0]} is not on this machine: submit from one that has it, or keep "
            "what --dry-run prints and submit that"
        )
    print(made.where, file=sys.stderr)
    if not dry_run:
        return subprocess.run(made.command, input=made.file or None, text=True).returncode
    print(f"would run: {shlex.join(made.command)}", file=sys.stderr)
    print(made.file.rstrip("\n") or shlex.join(made.command))
    return 0


def is_given(job: Sequence[str], flag: str) -> bool:
    """Whether a job's words have a flag."""
    return any(word == flag or word.startswith(f"{flag}=") for word in job)


def refuse_flags(job: Sequence[str], flags: Sequence[str]) -> None:
    """Raise ``UserError`` for a flag that the site decides."""
    for flag in flags:
        if is_given(job, flag):
            raise UserError(f"{flag}: leave it out: it follows from the kind and the site")


def check_paths(kind: str, site: Site, paths: Sequence[tuple[str, str]]) -> None:
    """Hold a job's (flag, path) pairs, --out among them, to what other machines find and keep.

    Raises ``UserError`` for a path that only this machine has, a credential in an address, an
    output on a pod's own disk.
    """
    require_everywhere(paths)
    require_no_secret(paths)
    if kind == "kubernetes":
        volume = section(site, kind).volume
        require_kept("--out", dict(paths)["--out"], volume and volume.mount)


def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # shell and YAML: every value goes through `sh` or `json`
    )
    found.filters |= {"sh": lambda text: shlex.quote(str(text)), "args": shlex.join}
    found.filters["json"] = json.dumps
    found.globals |= {"ray_memory": _ray_memory, "store_bytes": STORE_BYTES}
    return found


def _render(template: str, site: Site, **values: Any) -> str:
    common = site.model_dump(include={"name", "project", "python", "setup", "environment"})
    text = _templates().get_template(f"{template}.j2").render(common | values)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).rstrip() + "\n"


def section(site: Site, kind: str) -> Any:
    """What a site says of a kind of cluster, or of training. ``SpecError`` where that is missing,
    or names no image for Kubernetes."""
    outer, _, inner = kind.partition("-")
    found = getattr(site, outer)
    if found is None:
        raise SpecError(f"the site says nothing of {outer}: add the section `{outer}:`")
    if inner and getattr(found, inner) is None:
        raise SpecError(
            f"the site says nothing of {outer}.{inner}: add the section `{inner}:` in {outer}"
        )
    if outer == "kubernetes" and not found.image:
        raise SpecError("kubernetes.image: say the container image that has this project installed")
    return getattr(found, inner) if inner else found


def new_name(site: Site, what: str) -> str:
    """A name that no submission had before: applied under an old one, nothing would be run."""
    return f"{site.name[:33]}-{what}-{secrets.token_hex(3)}"


def require_plain(command: Sequence[str]) -> None:
    """Raise ``ValueError`` for an argument that a further shell might read otherwise."""
    for argument in command:
        if not UNINTERPRETED.fullmatch(argument):
            raise UserError(
                f"{argument!r}: Ray and KubeRay pass a command on as text; use paths and names of "
                "letters, digits and _./:=,@%+-"
            )


def _sbatch(
    template: str, site: Site, node: Machine, where: str, command: Sequence[str], log: str
) -> Submission:
    """A batch script for Slurm, on nodes (one, if it does not say) that have what ``node`` says."""
    at, mebibytes = section(site, "slurm"), math.floor(node.memory_gb * 10**9 / 2**20)
    values = {"slurm": at, "node": node, "memory_mb": mebibytes, "command": command, "log": log}
    return Submission(("sbatch",), _render(template, site, **values), f"Slurm: {where}")


def _apply(
    template: str, site: Site, name: str, objects: str, where: str, **values: Any
) -> Submission:
    """A file for kubectl; ``objects`` are the kinds that it makes under ``name``."""
    k = section(site, "kubernetes")
    file = _render(template, site, job=name, k=k, **values)
    follow = f"kubectl -n {k.namespace} logs -f job/{name}"
    stop = f"kubectl -n {k.namespace} delete {objects} {name}"
    where = f"Kubernetes: {where}\nname: {name}; follow: {follow}; stop: {stop}"
    return Submission(("kubectl", "apply", "-f", "-"), file, where)


# --- shards ---------------------------------------------------------------------------------------


def slurm(site: Site, command: Sequence[str]) -> Submission:
    """Ray over an allocation."""
    at = section(site, "slurm")
    where = f"Ray on {at.nodes} nodes of {_size(at)}"
    return _sbatch("slurm", site, at, where, command, JOB_LOG)


def slurm_array(site: Site, command: Sequence[str]) -> Submission:
    """Parts without Ray, each a task of an array."""
    array = section(site, "slurm-array")
    many = f", at most {array.at_once} at once" if array.at_once else ""
    where = f"{array.parts} tasks{many}, each with {_size(array)}"
    return _sbatch("slurm-array", site, array, where, command, "%x-%A_%a.log")


def kubernetes(site: Site, command: Sequence[str], ray_version: str) -> Submission:
    """A KubeRay RayJob."""
    k = section(site, "kubernetes")
    require_plain(command)
    where = f"{k.cpu.min} to {k.cpu.max} pods of {_size(k.cpu)}"
    if k.gpu:
        where += f", and {k.gpu.min} to {k.gpu.max} of {_size(k.gpu)}"
    name, values = new_name(site, "shards"), {"command": command, "ray_version": ray_version}
    return _apply("kubernetes", site, name, "rayjob", where, **values)


def ray_job(site: Site, command: Sequence[str], gpus: float = 0.0) -> Submission:
    """A job on a Ray cluster that runs: the project's folder travels with it."""
    at = section(site, "ray")
    require_plain(command)
    environment: dict[str, Any] = {"excludes": list(EXCLUDED)}
    if site.environment:
        environment["env_vars"] = site.environment
    if at.lock:
        environment["pip"] = {
            "packages": str(site.project / "requirements.lock"),
            "pip_check": False,
            "pip_install_options": ["--no-deps", "--require-hashes", "--no-cache-dir"],
        }
    submit = ["ray", "job", "submit", "--address", at.address, "--no-wait"]
    submit += ["--working-dir", str(site.project), "--runtime-env-json", json.dumps(environment)]
    if gpus:
        submit += ["--entrypoint-num-gpus", f"{gpus:g}"]
    return Submission((*submit, "--", *command), "", f"Ray: a job on the cluster at {at.address}")


def _ray_memory(machine: Machine) -> int:
    """Bytes that Ray may give to workers."""
    return int((machine.memory_gb - RESERVE_GB) * 10**9)


def _size(machine: Machine) -> str:
    gpus = f", {machine.gpus} GPUs" if machine.gpus else ""
    return f"{machine.cores} cores, {machine.memory_gb:g} GB{gpus}"


# --- training -------------------------------------------------------------------------------------


def train_slurm(site: Site, arguments: Sequence[str]) -> Submission:
    """torchrun on each node of an allocation; ``arguments`` follow torchrun's own."""
    training = section(site, "training")
    return _sbatch("train-slurm", site, training, _trainers(training), arguments, JOB_LOG)


def train_kubernetes(site: Site, arguments: Sequence[str]) -> Submission:
    """An indexed Job of pods with torchrun, which find each other by name."""
    training, name = section(site, "training"), new_name(site, "train")
    argv = [site.python, "-m", "torch.distributed.run", f"--nnodes={training.nodes}"]
    argv += [f"--nproc-per-node={training.each}", f"--max-restarts={training.restarts}"]
    argv += [f"--rdzv-id={name}", "--rdzv-backend=c10d"]
    argv += [f"--rdzv-endpoint={name}-0.{name}:29500", *arguments]
    where, values = _trainers(training), {"argv": argv, "needs": training}
    return _apply("train-kubernetes", site, name, "job,service", where, **values)


def train_ray(site: Site, arguments: Sequence[str]) -> Submission:
    """torchrun on one machine of a Ray cluster that runs."""
    training = section(site, "training")
    if training.nodes > 1:
        raise SpecError(
            f"training.nodes: a Ray job trains on one machine, not {training.nodes}: submit to "
            "slurm or kubernetes"
        )
    argv = [site.python, "-m", "torch.distributed.run", "--standalone"]
    argv += [f"--nproc-per-node={training.each}", *arguments]
    return ray_job(site, argv, training.gpus)


def _trainers(training: Training) -> str:
    return f"{training.nodes} nodes x {training.each} processes, each node {_size(training)}"
