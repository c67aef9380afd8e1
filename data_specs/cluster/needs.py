"""What one process of a stage needs of a machine, and which shards one of several parts makes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pydantic import Field, ValidationError, field_validator

from data_specs.io.addresses import has_secret, is_address, redacted
from data_specs.io.errors import UserError
from data_specs.strict import Strict, describe

GIGABYTE = 10**9


class Stage(Strict):
    """What one worker, or one teacher, takes; ``gpus`` below one shares a GPU, unsaid is fair."""

    cores: float = Field(default=1.0, ge=0, le=1024)
    memory_gb: float = Field(default=0.0, ge=0)
    gpus: float | None = Field(default=None, ge=0)

    @field_validator("gpus")
    @classmethod
    def _a_share_or_whole_ones(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise UserError(f"must be a share below 1 or a whole number, not {gpus:g}")
        return gpus

    def options(self, gpus: float = 0.0) -> dict[str, Any]:
        """As Ray wants it; ``gpus`` where the stage itself says none. Memory 0 is not counted."""
        share = gpus if self.gpus is None else self.gpus
        memory = {"memory": int(self.memory_gb * GIGABYTE)} if self.memory_gb else {}
        return {"num_cpus": self.cores, "num_gpus": share, **memory}

    def flag(self) -> str:
        """As a flag's value: ``parse_stage`` of it is this stage."""
        said = self.model_dump(exclude_none=True)
        return ",".join(f"{name}={value:g}" for name, value in said.items())


ONE_CORE = Stage()
"""What a stage needs of which nothing is said."""


def parse_stage(text: str, flag: str) -> Stage:
    """``cores=2,memory_gb=6,gpus=.25`` as a stage; ``ValueError`` naming ``flag`` and the field."""
    said: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{flag} {text}: {item!r} must be NAME=NUMBER, such as cores=2")
        said[name.strip()] = value
    try:
        return Stage.model_validate(said)
    except ValidationError as error:
        raise UserError(describe(error, said, flag)) from error


@dataclass(frozen=True)
class Part:
    """Part ``index`` (from 1) of ``count``: every count-th shard.

    Parts of one count share no shard and leave none out. Which shards a part makes does not depend
    on how many there are: a larger dataset moves none to another part.
    """

    index: int = 1
    count: int = 1

    def own(self, shards: Iterable[int]) -> list[int]:
        """Those of some shards that are this part's."""
        return [shard for shard in shards if shard % self.count == self.index - 1]

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


EVERY = Part()
"""All shards: the job is not divided."""


def parse_part(text: str) -> Part:
    """``i/n`` as a part; ``ValueError`` where it is none."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--part {text}: write i/n with i from 1 to n, such as 3/16")
    return Part(int(found[1]), int(found[2]))


def parse_address(text: str) -> str:
    """A Ray address that a driver on one of its machines can use; ``ValueError`` for others."""
    if text in ("", "auto") or re.fullmatch(r"[^\s:/]+:[0-9]+", text):
        return text
    hint = ""
    if text.startswith("ray://"):
        hint = "; ray:// is for drivers elsewhere: submit the job (python -m pipeline submit ray)"
    raise UserError(f"--ray-address {text}: write auto or HOST:PORT{hint}")


def require_everywhere(given: Sequence[tuple[str, str]]) -> None:
    """Raise ``ValueError`` for a (flag, path) that other machines would read as another place."""
    for flag, path in given:
        if not path.startswith("/") and not re.match(r"[a-z0-9]+:/", path):
            raise UserError(
                f"{flag} {redacted(path)}: on a cluster it must be absolute, on a file system that "
                "every machine has, or an address such as s3://bucket/folder"
            )


def require_kept(flag: str, path: str, mount: PurePosixPath | None) -> None:
    """Raise ``ValueError`` for an output on a pod's own disk, which is gone with the pod."""
    if is_address(path) or (mount and PurePosixPath(path).is_relative_to(mount)):
        return
    there = f"{mount}" if mount else "its mount: the site says none"
    raise UserError(
        f"{flag} {redacted(path)}: a pod's own disk is gone with the pod: on Kubernetes give a "
        f"path of kubernetes.volume, under {there}; or for shards an address"
    )


def require_no_secret(given: Sequence[tuple[str, str]]) -> None:
    """Raise ``ValueError`` for a (flag, path) with a login or a signature: job files are read."""
    for flag, path in given:
        if has_secret(path):
            raise UserError(
                f"{flag} {redacted(path)}: its login or query would stand in the job's file, where "
                "others can read it: leave it out, and give the machines credentials in their "
                "environment"
            )
