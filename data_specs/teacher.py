"""The teachers by name: what each hears (its front end) and what makes a score of it (its head)."""

from __future__ import annotations

from functools import cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from data_specs.io.errors import UserError
from data_specs.strict import HERE, Strict, load, unknown
from data_specs.weight import Inside, Name

Layer = Annotated[int, Field(ge=1, le=48)]


class Mfcc(Strict):
    """40 mel-frequency cepstral coefficients every 12.5 ms, torchaudio's defaults (xls-r-sqa)."""

    packages: ClassVar[frozenset[str]] = frozenset({"torchaudio"})
    kind: Literal["mfcc"] = "mfcc"


class XlsR(Strict):
    """Hidden states of an XLS-R encoder every 20 ms; two layers for a fusion head.

    ``weights`` names an entry of ``weights.yaml``: the whole encoder, or the published cut of it.
    """

    packages: ClassVar[frozenset[str]] = frozenset({"transformers"})
    kind: Literal["xlsr"] = "xlsr"
    weights: Annotated[tuple[str, ...], Field(min_length=1)]
    """Any of these does; the first that is there is taken."""
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=2)]


class StudentFeatures(Strict):
    """What the convolutions of the published student (v7) give its head, every 20 ms."""

    packages: ClassVar[frozenset[str]] = frozenset()
    kind: Literal["student-features"] = "student-features"


class EncoderStates(Strict):
    """A layer's states of an encoder that ``transformers`` has (wav2vec 2.0, HuBERT, Whisper).

    ``weights`` as of ``XlsR``; layer 0 is what the first layer hears.
    """

    packages: ClassVar[frozenset[str]] = frozenset({"transformers"})
    kind: Literal["encoder"] = "encoder"
    weights: Annotated[tuple[str, ...], Field(min_length=1)]
    layer: Annotated[int, Field(ge=0, le=48)]


FrontEnd = Annotated[Mfcc | XlsR | StudentFeatures | EncoderStates, Field(discriminator="kind")]


class Filled(Strict):
    """What stands behind a clip that is shorter than 7.68 s: zeros, or the clip again."""

    filling: Literal["zero", "repeat"] = "zero"


class Student(Filled):
    """The published student (v7) as a teacher."""

    kind: Literal["distillmos"] = "distillmos"


class DnsMos(Filled):
    """DNSMOS, overall quality: of ITU-T P.835, or of P.808."""

    kind: Literal["dnsmos"] = "dnsmos"
    scale: Literal["p835", "p808"] = "p835"


class Mean(Filled):
    """The mean score of other teachers, by their weights."""

    kind: Literal["mean"] = "mean"
    of: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=2)]


class PublishedHead(Filled):
    """A head out of the ``xls-r-sqa`` wheel, by its file in ``models/sqa-v2`` there."""

    kind: Literal["published"] = "published"
    front_end: str
    file: Inside


class TrainedHead(Filled):
    """A head that ``python -m train teacher`` made; ``weights`` names an entry of the cache."""

    kind: Literal["trained"] = "trained"
    front_end: str
    weights: str


Teacher = Annotated[
    Student | DnsMos | Mean | PublishedHead | TrainedHead, Field(discriminator="kind")
]


class TeacherTable(Strict):
    """The file ``teachers.yaml``."""

    about: str = ""
    front_ends: dict[Name, FrontEnd]
    teachers: dict[Name, Teacher]

    @model_validator(mode="after")
    def _front_ends_exist(self) -> TeacherTable:
        for name, teacher in self.teachers.items():
            for part in teacher.of if isinstance(teacher, Mean) else ():
                if isinstance(self.teachers.get(part), Mean | None):
                    raise UserError(f"teacher {name!r}: {unknown('teacher', part, self.teachers)}")
            front_end = getattr(teacher, "front_end", None)
            if front_end is not None and front_end not in self.front_ends:
                known = unknown("front end", front_end, self.front_ends)
                raise UserError(f"teacher {name!r}: {known}")
        return self


MEAN = "mean:"
"""``mean:a+b`` is the mean of the teachers a and b."""


def parts_of(name: str) -> list[str]:
    """The names in ``mean:a+b``; otherwise the name itself."""
    return name.removeprefix(MEAN).split("+") if name.startswith(MEAN) else [name]


def packages_of(name: str) -> set[str]:
    """Packages besides numpy and torch whose versions a teacher's scores depend on."""
    table = teacher_table()
    found = set()
    for part in parts_of(name):
        spec = table.teachers.get(part)
        if isinstance(spec, Mean):
            found |= packages_of(MEAN + "+".join(spec.of))
        elif isinstance(spec, DnsMos):
            found |= {"onnxruntime"} | ({"librosa"} if spec.scale == "p808" else set())
        elif isinstance(spec, PublishedHead | TrainedHead):
            found |= table.front_ends[spec.front_end].packages
    return found


@cache
def teacher_table() -> TeacherTable:
    """``data_specs/teachers.yaml``."""
    return load(TeacherTable, HERE / "teachers.yaml")
