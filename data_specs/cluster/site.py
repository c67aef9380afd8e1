"""A site: a user's description of their cluster. ``site.example.yaml`` explains each field."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator, model_validator

from data_specs.cluster.needs import Stage
from data_specs.io.addresses import SECRET_NAMES, has_secret
from data_specs.io.errors import UserError
from data_specs.strict import SpecError, Strict, load

EXAMPLE = Path(__file__).parent / "site.example.yaml"

RESERVE_GB = 1.0
"""Of a machine's memory, what Ray itself takes: its raylet and agents, and a small object store."""


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise UserError("must be one line")
    return text


def _plain(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.,:/@%+=-]*", text):
        raise UserError(f"{text!r} has a character that Slurm would read as something else")
    return text


def _sbatch_options(options: tuple[str, ...]) -> tuple[str, ...]:
    for option in options:
        if not option.startswith("-"):
            raise UserError(f"{option!r} is no option of sbatch: they begin with --")
    return options


def _absolute(path: PurePosixPath) -> PurePosixPath:
    if not path.is_absolute():
        raise UserError(f"{path} must be absolute: it is a path of the cluster's machines")
    return path


Line = Annotated[str, AfterValidator(_one_line)]
Plain = Annotated[str, AfterValidator(_plain)]
Absolute = Annotated[PurePosixPath, AfterValidator(_absolute)]
NAME = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"  # a DNS label, leaving what KubeRay adds


def on_gpus(gpus: int, stage: Stage) -> int:
    """How many processes of a stage some GPUs hold: a share is on one of them."""
    each = stage.gpus or 1.0
    return gpus * int(1 / each + 1e-9) if each <= 1 else gpus // int(each)


class Machine(Strict):
    """What a machine, or a pod, has."""

    cores: int = Field(ge=1)
    memory_gb: float = Field(gt=RESERVE_GB)
    gpus: int = Field(default=0, ge=0)

    def workers(self, stage: Stage, taken: Sequence[Stage] = ()) -> int:
        """How many workers fit on it beside others. ``SpecError`` where none does."""
        return self._fitting(stage, "worker", math.inf, taken)

    def teachers(self, stage: Stage) -> int:
        """How many teachers its GPUs hold. ``SpecError`` where none fits."""
        return self._fitting(stage, "teacher", on_gpus(self.gpus, stage))

    def _fitting(self, stage: Stage, what: str, most: float, taken: Sequence[Stage] = ()) -> int:
        memory_gb = self.memory_gb - RESERVE_GB - sum(other.memory_gb for other in taken)
        free = [memory_gb, self.cores - sum(other.cores for other in taken)]
        needs = [stage.memory_gb, stage.cores]
        fitting = [has / need + 1e-9 for has, need in zip(free, needs, strict=True) if need]
        found = int(min([*fitting, most]))
        if found < 1:
            raise SpecError(
                f"a machine of {self.cores} cores, {self.gpus} GPUs and {self.memory_gb:g} GB "
                f"({RESERVE_GB:g} of them Ray's) has no room for a {what} of {stage.flag()}"
                + (f" beside {len(taken)} teachers" if taken else "")
            )
        return found


class Array(Machine):
    """What a task of a Slurm array has; 0 ``at_once`` is as many as Slurm lets run."""

    parts: int = Field(ge=1, le=10_000)
    at_once: int = Field(default=0, ge=0)


class Slurm(Machine):
    """Slurm, and each of the nodes that a job gets."""

    partition: Plain = ""
    account: Plain = ""
    time: str = Field(default="24:00:00", pattern=r"^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$")
    grace_s: int = Field(default=120, ge=1, le=65535)
    logs: Annotated[Absolute, AfterValidator(lambda path: PurePosixPath(_plain(str(path))))]
    options: Annotated[tuple[Line, ...], AfterValidator(_sbatch_options)] = ()
    nodes: int = Field(default=1, ge=1)
    array: Array | None = None


class Group(Machine):
    """Pods of one kind, and between how many of them the cluster grows and shrinks."""

    min: int = Field(ge=0)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _bounds(self) -> Group:
        if self.min > self.max:
            raise UserError(f"min {self.min} is more than max {self.max}")
        return self


class Volume(Strict):
    """A PersistentVolumeClaim that every pod can write, and where it is mounted."""

    claim: str = Field(min_length=1)
    mount: Absolute


class Kubernetes(Strict):
    """A cluster with KubeRay (shards), or any (training)."""

    image: str | None = None  # asked for where it is needed
    namespace: str = Field(default="default", pattern=NAME)
    folder: str = ""
    volume: Volume | None = None
    secrets: tuple[str, ...] = ()
    service_account: str = ""
    node_selector: dict[str, str] = Field(default_factory=dict)
    gpu_resource: str = "nvidia.com/gpu"
    retries: int = Field(default=3, ge=0)
    preemptible_grace_s: int = Field(default=0, ge=0)
    head: Machine = Machine(cores=2, memory_gb=8)
    cpu: Group
    gpu: Group | None = None

    @field_validator("gpu")
    @classmethod
    def _has_some(cls, gpu: Group | None) -> Group | None:
        if gpu and (not gpu.gpus or not gpu.min):
            raise UserError("gpus and min must be at least 1: teachers need one when a job starts")
        return gpu


class Ray(Strict):
    """A Ray cluster that runs, with its dashboard."""

    address: str = Field(pattern=r"^https?://[^\s@?]+$")
    workers: int = Field(ge=1)
    gpus: int = Field(default=0, ge=0)
    lock: bool = False


class Training(Machine):
    """The machines of a training run; ``processes`` of each: one for a GPU, or one."""

    nodes: int = Field(default=1, ge=1)
    processes: int = Field(default=0, ge=0)
    restarts: int = Field(default=3, ge=0)

    @property
    def each(self) -> int:
        """Processes of a machine."""
        return self.processes or self.gpus or 1


class Site(Strict):
    """Everything about a cluster that a submission needs."""

    name: str = Field(default="shards", pattern=NAME)
    project: Absolute
    python: Line = "python"
    setup: tuple[Line, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    worker: Stage = Stage(cores=1, memory_gb=6)
    teacher: Stage = Stage(cores=1, memory_gb=4, gpus=1)
    slurm: Slurm | None = None
    kubernetes: Kubernetes | None = None
    ray: Ray | None = None
    training: Training | None = None

    @field_validator("environment")
    @classmethod
    def _no_credentials(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UserError(f"{name!r} is no name of a variable")
            if SECRET_NAMES.search(name.upper()):
                raise UserError(
                    f"{name} looks like a credential, and this file and what is made of it can be "
                    "read by others: use the machines' own environment, or kubernetes.secrets"
                )
            if has_secret(environment[name]):
                raise UserError(
                    f"{name}: its address has a login or a query, and this file and what is made "
                    "of it can be read by others: leave those out"
                )
        return environment


def load_site(path: Path | str) -> Site:
    """Read a site's file. ``SpecError`` names the file, the field and what to do."""
    return load(Site, path)
