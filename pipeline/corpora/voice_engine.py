"""What speaks: the one interface of every text-to-speech engine, and how one is missed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_specs.io.errors import UserError

Wave = NDArray[np.float32]


class Engine(Protocol):
    """A loaded model. ``languages`` are its own names of them, empty where it asks for none."""

    @property
    def rate_hz(self) -> int: ...
    @property
    def languages(self) -> Sequence[str]: ...
    @property
    def version(self) -> str: ...

    def speakers(self, language: str) -> Sequence[str]:
        """Who speaks a two-letter language; empty where the model has but one speaker."""

    def say(self, text: str, speaker: str | None, language: str | None, seed: int) -> Wave:
        """Speech (T,) at ``rate_hz``; the same bits for the same arguments on one machine, device
        and number of threads."""


def require_package(package: str, module: str, extra: str) -> str:
    """The version of a package; ``UserError`` with what brings it where it is not installed."""
    if importlib.util.find_spec(module) is None:  # finds it without importing it
        raise UserError(
            f"{package} is not installed: run make setup, or pip install "
            f"'distill-mos-factory[{extra}]'"
        )
    return importlib.metadata.version(package)


def first_line(error: Exception) -> str:
    """The first line of an error, or its type's name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
