"""Renders what is submitted to Ray, Slurm or Kubernetes, shows it, or hands it over."""

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_specs.cluster.site import RESERVE_GB, Kubernetes, Machine, Site, load_site
from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.strict import SpecError

STORE_BYTES = 1 << 28
"""Ray's object store on each machine: shard numbers, and PCM on its way to teachers."""

EXCLUDED = (".git", ".venv", "runs", "tests", ".readme")
"""Of the working directory, what a Ray job does not need."""

UNINTERPRETED = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")
"""What passes through KubeRay's and Ray's own command lines as it is."""


@dataclass(frozen=True)
class Submission:
    """A command, the file it reads from its input, and lines about what runs where."""

    command: tuple[str, ...]
    file: str
    where: str

    def show(self) -> None:
        """Print what would be handed over: alone on standard output, so that it can be kept."""
        print(self.where, file=sys.stderr)
        print(f"would run: {shlex.join(self.command)}", file=sys.stderr)
        print(self.file.rstrip("\n") or shlex.join(self.command))

    def hand_over(self) -> int:
        """Run the command. ``ValueError`` where this machine does not have it."""
        if not shutil.which(self.command[0]):
            raise UserError(
                f"{self.command[0]} is not on this machine: submit from one that has it, or keep "
                "what --dry-run prints and submit that"
            )
        print(self.where, file=sys.stderr)
        return subprocess.run(self.command, input=self.file or None, text=True).returncode


def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell and YAML: every value goes through `sh` or `json`
    )
    found.filters["sh"] = lambda value: shlex.quote(str(value))
    found.filters["args"] = shlex.join
    found.filters["json"] = lambda value: json.dumps(value)
    return found


def _render(template: str, site: Site, **values: Any) -> str:
    common = site.model_dump(include={"name", "project", "python", "setup", "environment"})
    text = _templates().get_template(f"{template}.j2").render(common | values)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).rstrip() + "\n"


def section(site: Site, name: str) -> Any:
    """A part of a site's file. ``SpecError`` where it is missing."""
    found = getattr(site, name)
    if found is None:
        raise SpecError(f"the site says nothing of {name}: add the section `{name}:`")
    return found


def on_kubernetes(site: Site) -> Kubernetes:
    """That section of a site. ``SpecError`` without it, or where it names no image."""
    found: Kubernetes = section(site, "kubernetes")
    if not found.image:
        raise SpecError("kubernetes.image: say the container image that has this project installed")
    return found


def named_anew(site: Site, what: str) -> str:
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


# --- shards ---------------------------------------------------------------------------------------


def slurm(site: Site, command: Sequence[str]) -> Submission:
    """Ray over an allocation."""
    at = section(site, "slurm")
    file = _slurm(
        "slurm",
        site,
        at,
        nodes=at.nodes,
        log="%x-%j.log",
        command=command,
        ray_memory_bytes=_ray_memory(at),
        store_bytes=STORE_BYTES,
    )
    return Submission(("sbatch",), file, f"Slurm: Ray on {at.nodes} nodes of {_size(at)}")


def slurm_array(site: Site, command: Sequence[str]) -> Submission:
    """Parts without Ray, each a task of an array."""
    at = section(site, "slurm")
    if at.array is None:
        raise SpecError("the site says nothing of slurm.array: add the section `array:` in slurm")
    file = _slurm(
        "slurm-array",
        site,
        at,
        at.array,
        nodes=1,
        log="%x-%A_%a.log",
        command=command,
        parts=at.array.parts,
        at_once=at.array.at_once,
    )
    many = f", at most {at.array.at_once} at once" if at.array.at_once else ""
    where = f"Slurm: {at.array.parts} tasks{many}, each with {_size(at.array)}"
    return Submission(("sbatch",), file, where)


def _slurm(template: str, site: Site, at: Any, each: Machine | None = None, **values: Any) -> str:
    each = each or at
    mebibytes = math.floor(each.memory_gb * 10**9 / 2**20)
    size = {"cores": each.cores, "gpus": each.gpus, "memory_mb": mebibytes}
    return _render(template, site, slurm=at, **size, **values)


def kubernetes(site: Site, command: Sequence[str], ray_version: str) -> Submission:
    """A KubeRay RayJob."""
    k = on_kubernetes(site)
    require_plain(command)
    name = named_anew(site, "shards")
    file = _render(
        "kubernetes",
        site,
        job=name,
        k=k,
        command=command,
        ray_version=ray_version,
        ray_memory=_ray_memory,
        store_bytes=STORE_BYTES,
    )
    where = f"Kubernetes: {k.cpu.min} to {k.cpu.max} pods of {_size(k.cpu)}"
    if k.gpu:
        where += f", and {k.gpu.min} to {k.gpu.max} of {_size(k.gpu)}"
    where += _follow("rayjob", name, k)
    return Submission(("kubectl", "apply", "-f", "-"), file, where)


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
    at, training = section(site, "slurm"), section(site, "training")
    file = _slurm(
        "train-slurm",
        site,
        at,
        training,
        nodes=training.nodes,
        log="%x-%j.log",
        command=arguments,
        processes=training.each,
        restarts=training.restarts,
    )
    return Submission(("sbatch",), file, f"Slurm: {_trainers(site)}")


def train_kubernetes(site: Site, arguments: Sequence[str]) -> Submission:
    """An indexed Job of pods with torchrun, which find each other by name."""
    k, training, name = on_kubernetes(site), section(site, "training"), named_anew(site, "train")
    argv = [site.python, "-m", "torch.distributed.run", f"--nnodes={training.nodes}"]
    argv += [f"--nproc-per-node={training.each}", f"--max-restarts={training.restarts}"]
    argv += [f"--rdzv-id={name}", "--rdzv-backend=c10d"]
    argv += [f"--rdzv-endpoint={name}-0.{name}:29500", *arguments]
    sizes = {"needs": training, "nodes": training.nodes}
    file = _render("train-kubernetes", site, job=name, k=k, argv=argv, **sizes)
    where = f"Kubernetes: {_trainers(site)}{_follow('job,service', name, k)}"
    return Submission(("kubectl", "apply", "-f", "-"), file, where)


def _follow(kind: str, name: str, k: Kubernetes) -> str:
    logs = f"kubectl -n {k.namespace} logs -f job/{name}"
    return f"\nname: {name}; follow: {logs}; stop: kubectl -n {k.namespace} delete {kind} {name}"


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


def _trainers(site: Site) -> str:
    training = section(site, "training")
    return f"{training.nodes} nodes x {training.each} processes, each node {_size(training)}"


# --- the verb -------------------------------------------------------------------------------------

Make = Callable[[str, Site, list[str]], Submission]

Foresee = Callable[[str, Site, list[str], Path | None], str]
"""How long and how large a job is by the rates of a file, or how to come by such a file."""


def main(
    argv: Sequence[str],
    prog: str,
    kinds: Sequence[str],
    about: str,
    make: Make,
    foresee: Foresee | None = None,
) -> int:
    """``submit KIND --site FILE [--dry-run] -- JOB``; exit status as of what was run."""
    parser = _parser(prog, kinds, about, foresee is not None)
    given = list(argv)
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    job = given[cut + 1 :]
    if not job:
        parser.error("give the job behind --")
    site = load_site(options.site)
    submission = make(options.kind, site, job)
    if foresee:
        told = foresee(options.kind, site, job, options.rates)
        submission = replace(submission, where=f"{submission.where}\n{told}")
    if options.dry_run:
        submission.show()
        return 0
    return submission.hand_over()


def _parser(
    prog: str, kinds: Sequence[str], about: str, with_rates: bool
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=about, allow_abbrev=False)
    rates = " [--rates FILE]" if with_rates else ""
    parser.usage = f"{prog} {{{','.join(kinds)}}} --site FILE{rates} [--dry-run] -- JOB..."
    parser.add_argument("kind", choices=kinds)
    parser.add_argument(
        "--site", type=path_here, required=True, help="see data_specs/cluster/site.example.yaml"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    if with_rates:
        about_rates = "of `python -m pipeline estimate ... --save FILE`: say how long and how large"
        parser.add_argument("--rates", type=path_here, metavar="FILE", help=about_rates)
    return parser
