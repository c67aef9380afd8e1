"""The teachers by name: what each hears (its front end) and what makes a score of it (its head)."""

from __future__ import annotations

from functools import cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from data_specs.io.errors import UserError
from data_specs.strict import HERE, Strict, load, unknown
from data_specs.weight import Inside

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


FrontEnd = Annotated[Mfcc | XlsR | StudentFeatures, Field(discriminator="kind")]


class Student(Strict):
    """The published student (v7) as a teacher."""

    kind: Literal["distillmos"] = "distillmos"


class DnsMos(Strict):
    """DNSMOS P.835, overall quality."""

    kind: Literal["dnsmos"] = "dnsmos"


class PublishedHead(Strict):
    """A head out of the ``xls-r-sqa`` wheel, by its file in ``models/sqa-v2`` there."""

    kind: Literal["published"] = "published"
    front_end: str
    file: Inside


class TrainedHead(Strict):
    """A head that ``python -m train teacher`` made; ``weights`` names an entry of the cache."""

    kind: Literal["trained"] = "trained"
    front_end: str
    weights: str


Teacher = Annotated[Student | DnsMos | PublishedHead | TrainedHead, Field(discriminator="kind")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class TeacherTable(Strict):
    """The file ``teachers.yaml``."""

    about: str = ""
    front_ends: dict[Name, FrontEnd]
    teachers: dict[Name, Teacher]

    @model_validator(mode="after")
    def _front_ends_exist(self) -> TeacherTable:
        for name, teacher in self.teachers.items():
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
        if isinstance(spec, DnsMos):
            found.add("onnxruntime")
        elif isinstance(spec, PublishedHead | TrainedHead):
            found |= table.front_ends[spec.front_end].packages
    return found


@cache
def teacher_table() -> TeacherTable:
    """``data_specs/teachers.yaml``."""
    return load(TeacherTable, HERE / "teachers.yaml")
