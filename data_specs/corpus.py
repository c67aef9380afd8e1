"""Corpora: which files of a folder belong, who speaks in them, and under which licence."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from data_specs.io.errors import UserError
from data_specs.strict import HERE, Name, SpecError, Strict, load, unknown


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"not a regular expression: {error}") from error
    return pattern


class Part(Strict):
    """Files of a corpus that share language and licence.

    ``include`` are globs relative to the corpus folder. ``patterns`` are searched in the relative
    path in turn, and the first that matches gives the named groups ``speaker`` and ``language``;
    without a match the file stands for its own speaker.
    """

    include: Annotated[tuple[str, ...], Field(min_length=1)] = ("**/*",)
    patterns: tuple[Annotated[str, AfterValidator(_compiles)], ...] = ()
    language: str | None = None
    licence: str
    urls: tuple[str, ...] = ()


class Corpus(Strict):
    """A named set of audio files with one use."""

    kind: Literal["speech", "noise", "rooms", "voices"]
    about: str = ""
    min_sample_rate_hz: Annotated[int, Field(ge=1)] = 8_000
    min_seconds: Annotated[float, Field(ge=0)] = 0.1
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]


class CorpusFile(Strict):
    """One YAML file of ``data_specs/corpora``."""

    about: str = ""
    corpora: Annotated[dict[Name, Corpus], Field(min_length=1)]


@cache
def all_corpora() -> dict[str, Corpus]:
    """Every corpus of ``data_specs/corpora``, by name."""
    found: dict[str, Corpus] = {}
    for path in sorted((HERE / "corpora").glob("*.yaml")):
        for name, corpus in load(CorpusFile, path).corpora.items():
            if name in found:
                raise SpecError(f"{path}: corpora.{name}: another file has a corpus of this name")
            found[name] = corpus
    return found


def find_corpus(name: str, where: Path | str) -> Corpus:
    """The corpus called ``name``, or a ``SpecError`` that names ``where`` it was asked for."""
    corpora = all_corpora()
    if name not in corpora:
        raise SpecError(f"{where}: {unknown('corpus', name, corpora)}")
    return corpora[name]
