"""Voices: which text-to-speech models speak, in which languages, what they say, whose they are."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, RootModel, model_validator

from data_specs.io.errors import UserError
from data_specs.strict import HERE, Name, Strict, checked, load_named, read_yaml

NOT_STATED = "not stated in the library's list"
"""The licence of a model for which the library states none."""

FREE_LICENCES = {
    *("Apache-2.0", "CC0-1.0"),
    *("Apache 2.0", "apache 2.0", "bsd-3-clause", "CC-BY-4.0", "CC-BY-SA 4.0", "MIT", "MPL"),
    *("openrail", NOT_STATED),
    "custom - see https://github.com/dioco-group/jenny-tts-dataset#important",
}
"""Licences that permit commercial use, or of which Coqui's list does not say; no others do."""

Language = Annotated[str, Field(pattern=r"^[a-z]{2}$")]

COQUI_NAME = r"tts_models/[^/\s]+/[^/\s]+/[^/\s]+"
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"


class VoiceModel(Strict):
    """One model of an engine: of Coqui's list, as it stands there; Kokoro; a voice of Piper's.

    ``languages`` are the two-letter ones it shall speak, ``vocoder`` the default of Coqui's list
    for it and ``weight`` its share of the clips against the others'. A model with many languages
    may stand in several entries, each with its weight.
    """

    engine: Literal["coqui", "kokoro", "piper"] = "coqui"
    name: str
    languages: Annotated[tuple[Language, ...], Field(min_length=1)]
    licence: str
    vocoder: str | None = None
    vocoder_licence: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _name_is_the_engine_s(self) -> VoiceModel:
        coqui = self.engine == "coqui"
        if not re.fullmatch(COQUI_NAME if coqui else PLAIN_NAME, self.name):
            form = "like tts_models/en/vctk/vits" if coqui else "a file's, without its ending"
            raise UserError(f"name {self.name!r}: {self.engine} has names {form}")
        return self

    @model_validator(mode="after")
    def _vocoder_has_a_licence(self) -> VoiceModel:
        if (self.vocoder is None) != (self.vocoder_licence is None):
            raise UserError("vocoder and vocoder_licence go together")
        return self

    @property
    def noncommercial(self) -> bool:
        """Whether the licence of the model or of its vocoder is not one for commercial use too."""
        return bool({self.licence, self.vocoder_licence or NOT_STATED} - FREE_LICENCES)


class Sentences(Strict):
    """Which lines of a text file are spoken: one sentence each.

    In a line with tabs the sentence is column ``column`` (from 1); a line without is the sentence.
    MultiSubs (Wang et al. 2021, https://doi.org/10.5281/zenodo.5034604) writes
    ``sentence-id TAB sentence`` in ``en.sents.det``.
    """

    column: Annotated[int, Field(ge=1)] = 2
    min_words: Annotated[int, Field(ge=1)] = 4
    max_words: Annotated[int, Field(ge=1)] = 20

    @model_validator(mode="after")
    def _ordered(self) -> Sentences:
        if self.min_words > self.max_words:
            raise UserError(f"min_words {self.min_words} is above max_words {self.max_words}")
        return self


class VoiceSpec(Strict):
    """A corpus of synthetic speech: what ``python -m pipeline speak`` makes.

    A clip is one sentence after another until it has ``min_seconds``; a sentence that comes out
    empty, silent or broken is replaced by the next draw, ``retries`` times in one clip. ``texts``
    names the sentences that are said where no file of texts is given.
    """

    name: Name
    about: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    sentences: Sentences = Sentences()
    texts: Name = "sentences"
    min_seconds: Annotated[float, Field(ge=0, le=60)] = 8.2
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    models: Annotated[tuple[VoiceModel, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _each_model_once(self) -> VoiceSpec:
        said = Counter(f"{m.name} ({language})" for m in self.models for language in m.languages)
        twice = sorted(name for name, count in said.items() if count > 1)
        if twice:
            raise UserError(f"models: {', '.join(twice)} is there more than once")
        return self

    @property
    def languages(self) -> list[str]:
        """Every language that a model speaks, sorted."""
        return sorted({language for model in self.models for language in model.languages})


class _Texts(RootModel[dict[Language, list[str]]]):
    """A file of sentences: two-letter languages, and what is said in each."""


def load_voices(path: Path | str) -> VoiceSpec:
    """Read a voice spec; a bare name means ``data_specs/voices/NAME.yaml``."""
    return load_named(VoiceSpec, "voices", path)


@cache
def sentences(name: str = "sentences") -> dict[str, list[str]]:
    """The project's own sentences ``data_specs/voices/NAME.yaml``, by language."""
    path = HERE / "voices" / f"{name}.yaml"
    return dict(checked(_Texts, read_yaml(path), path).root)
