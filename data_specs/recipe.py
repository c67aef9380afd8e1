"""The recipe: everything that defines a dataset, and nothing about how or where it is made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_specs.distributions import Constant, Distribution, Normal, Uniform, within
from data_specs.io.errors import UserError
from data_specs.processors import Processor
from data_specs.strict import Name, Strict, load_named

Share = Annotated[float, Field(ge=0, le=1)]
Split = Literal["train", "validation", "test"]


class Holdout(Strict):
    """Shares of the speakers (files, for noise and rooms) kept out of the training split."""

    validation: Share = 0.05
    test: Share = 0.0

    @model_validator(mode="after")
    def _leaves_training(self) -> Holdout:
        if self.validation + self.test >= 1:
            raise UserError("validation and test leave nothing to train on")
        return self


class Source(Strict):
    """A role's corpus, by name; the folder is given on the command line, never here."""

    corpus: Name
    holdout: Holdout = Holdout()


class Sources(Strict):
    """The corpora that a recipe draws from."""

    speech: Source
    noise: Source | None = None
    rooms: Source | None = None
    voices: Source | None = None

    def present(self) -> dict[str, Source]:
        """The roles that the recipe uses, in a fixed order."""
        roles = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: source for name, source in roles.items() if source is not None}


class Room(Strict):
    """Convolution with a room impulse response (section IV-B, step 1)."""

    probability: Share = 0.33


class Noise(Strict):
    """Additive noise (section IV-B, step 2).

    ``snr_db`` is the difference of the *active* levels of speech and noise: of each, the mean power
    of its 20 ms frames within 40 dB of its loudest one (``pipeline.render.mix.active_dbfs``).
    Pauses and padding do not count. The ratio of whole files' RMS, as in the DNS challenge, is
    lower by what the speech pauses, and for impulsive noise higher by many dB.
    """

    probability: Share = 0.67
    snr_db: Distribution = Normal(mean=10, variance=10)


class Voices(Strict):
    """Synthetic speech mixed in (section IV-B)."""

    share: Share = 0.15
    degrade: bool = False


class Option(Strict):
    """One processor of a stage and its weight against the others."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    use: Processor


class Stage(Strict):
    """With ``probability``, one of ``choices`` by weight."""

    stage: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=80)]
    probability: Share = 1.0
    choices: Annotated[tuple[Option, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _kinds_differ(self) -> Stage:
        twice = [k for k, n in Counter(option.use.kind for option in self.choices).items() if n > 1]
        if twice:
            raise UserError(f"kind {twice[0]!r} stands twice in stage {self.stage!r}")
        return self


class Teacher(Strict):
    """Who scores. ``precision`` is data: labels in bf16 differ from fp32 in the last digits."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9:+_-]*$", max_length=200)] = "distillmos"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


class Recipe(Strict):
    """What a dataset is. Hashed; a folder made from another hash is never written to."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=80)]
    about: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    sources: Sources
    voices: Voices | None = None
    speed: Annotated[Distribution, within(0.5, 2)] = Constant(value=1.0)
    level_dbfs: Annotated[Distribution, within(-60, 0, "dBFS")] = Uniform(low=-35, high=-15)
    speech_stages: tuple[Stage, ...] = ()
    room: Room | None = None
    noise: Noise | None = None
    stages: tuple[Stage, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"  # of the neural processors; data, as the teacher's
    allow_noncommercial: bool = False
    teacher: Teacher = Teacher()
    shard_samples: Annotated[int, Field(ge=1, le=100_000)] = 500
    group_samples: Annotated[int, Field(ge=1, le=1_000)] = 10
    max_dropped_share: Share = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = Counter(stage.stage for stage in self.all_stages())
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise UserError(f"stage name {twice[0]!r} stands twice")
        if self.shard_samples % self.group_samples:
            raise UserError("shard_samples must be a multiple of group_samples")
        for role in ("noise", "rooms", "voices"):
            used = getattr(self, "room" if role == "rooms" else role) is not None
            if used != (getattr(self.sources, role) is not None):
                raise UserError(f"sources.{role} and the step that uses it go together")
        return self

    def all_stages(self) -> tuple[Stage, ...]:
        """The stages in the order in which they are applied."""
        return self.speech_stages + self.stages

    def kinds(self) -> tuple[str, ...]:
        """Every processor kind that a sample may meet, sorted."""
        return tuple(sorted({o.use.kind for stage in self.all_stages() for o in stage.choices}))


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe; a bare name means ``data_specs/recipes/NAME.yaml``."""
    return load_named(Recipe, "recipes", path)
