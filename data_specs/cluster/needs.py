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


class Stage(Strict):
    """What one worker, or one teacher, takes; a part of a GPU where ``gpus`` is below one."""

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
        """Options of a Ray task; ``gpus`` where the stage has none. Memory 0 is not counted."""
        share = gpus if self.gpus is None else self.gpus
        memory = {"memory": int(self.memory_gb * 10**9)} if self.memory_gb else {}
        return {"num_cpus": self.cores, "num_gpus": share, **memory}

    def flag(self) -> str:
        """Spell the stage as a flag's value, which ``parse_stage`` reads."""
        values = self.model_dump(exclude_none=True)
        return ",".join(f"{name}={value:g}" for name, value in values.items())


def parse_stage(text: str, flag: str) -> Stage:
    """Parse ``cores=2,memory_gb=6,gpus=.25``. Raises ``UserError`` naming flag and field."""
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{flag} {text}: {item!r} must be NAME=NUMBER, such as cores=2")
        values[name.strip()] = value
    try:
        return Stage.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error, values, flag)) from error


@dataclass(frozen=True)
class Part:
    """Part ``index`` (from 1) of ``count``: every count-th shard.

    Parts of one count share no shard and leave none out. Which shards a part makes does not depend
    on how many there are: a larger dataset moves none to another part.
    """

    index: int = 1
    count: int = 1

    def own(self, shards: Iterable[int]) -> list[int]:
        """Select this part's shards."""
        return [shard for shard in shards if shard % self.count == self.index - 1]

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


EVERY = Part()
"""All shards: the job is not divided."""


def parse_part(text: str) -> Part:
    """Parse ``i/n``. Raises ``UserError`` where it is none."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--part {text}: write i/n with i from 1 to n, such as 3/16")
    return Part(int(found[1]), int(found[2]))


def parse_address(text: str) -> str:
    """Accept a Ray address that a driver on one of its machines can use. Raises ``UserError``."""
    if text in ("", "auto") or re.fullmatch(r"[^\s:/]+:[0-9]+", text):
        return text
    hint = ""
    if text.startswith("ray://"):
        hint = "; ray:// is for drivers elsewhere: submit the job (python -m pipeline submit ray)"
    raise UserError(f"--ray-address {text}: write auto or HOST:PORT{hint}")


def require_everywhere(paths: Sequence[tuple[str, str]]) -> None:
    """Raise ``UserError`` for a (flag, path) that other machines would read otherwise."""
    for flag, path in paths:
        if not path.startswith("/") and not re.match(r"[a-z0-9]+:/", path):
            raise UserError(
                f"{flag} {redacted(path)}: on a cluster it must be absolute, on a file system that "
                "every machine has, or an address such as s3://bucket/folder"
            )


def require_kept(flag: str, path: str, mount: PurePosixPath | None) -> None:
    """Raise ``UserError`` for an output on a pod's own disk, which is gone with the pod."""
    if is_address(path) or (mount and PurePosixPath(path).is_relative_to(mount)):
        return
    below = mount or "its mount: the site says none"
    raise UserError(
        f"{flag} {redacted(path)}: a pod's own disk is gone with the pod: on Kubernetes give a "
        f"path of kubernetes.volume, under {below}; or for shards an address"
    )


def require_no_secret(paths: Sequence[tuple[str, str]]) -> None:
    """Raise ``UserError`` for a (flag, path) with a login or a signature: job files are read."""
    for flag, path in paths:
        if has_secret(path):
            raise UserError(
                f"{flag} {redacted(path)}: its login or query would stand in the job's file, where "
                "others can read it: leave it out, and give the machines credentials in their "
                "environment"
            )
