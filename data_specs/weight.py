"""Weight files: where each comes from, how large it is, its SHA-256 and its licence.

Sizes and hashes are facts with a source (named beside them in ``weights.yaml``) or absent, never
guesses: a wrong one would refuse the right file.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from data_specs.io.errors import UserError
from data_specs.io.names import inside
from data_specs.strict import HERE, Strict, load

Inside = Annotated[str, AfterValidator(inside)]
Address = Annotated[str, Field(pattern=r"^https?://\S+$")]
Size = Annotated[int, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class WeightFile(Strict):
    """One file by its official name. ``sha256_prefix`` is for names of the kind ``name-<hex>.th``.

    There torch.hub's convention is that the hex digits are the first of the content's SHA-256.
    """

    name: Inside
    size: Size | None = None
    sha256: Sha256 | None = None
    sha256_prefix: Annotated[str, Field(pattern=r"^[0-9a-f]{8,63}$")] | None = None

    @model_validator(mode="after")
    def _one_hash(self) -> WeightFile:
        if self.sha256 and self.sha256_prefix:
            raise UserError("give either sha256 or sha256_prefix, not both")
        return self

    @property
    def published(self) -> str:
        """What is known of the SHA-256: all of it, its first digits, or nothing."""
        return self.sha256 or self.sha256_prefix or ""


class Download(WeightFile):
    """A file with an address of its own."""

    url: Address


class _Entry(Strict):
    about: str
    homepage: Address
    licence: Annotated[str, Field(min_length=1)]
    files: Annotated[tuple[WeightFile, ...], Field(min_length=1)]
    or_run: str = ""
    """Another command that brings weights of the same kind."""
    by_default: bool = False
    """Whether ``make weights`` without names fetches it: what the paper's processors read."""

    @property
    def address(self) -> str:
        """Where it is fetched from, or described."""
        return self.homepage


class Plain(_Entry):
    """Files that are fetched one by one."""

    kind: Literal["files"] = "files"
    files: Annotated[tuple[Download, ...], Field(min_length=1)]

    @property
    def address(self) -> str:
        return self.files[0].url


class Archive(_Entry):
    """Files out of one zip; ``flat`` leaves out the folders that they have in it."""

    kind: Literal["zip"] = "zip"
    archive: Download
    flat: bool = False

    @property
    def address(self) -> str:
        return self.archive.url


class HuggingFace(_Entry):
    """Files of a repository on huggingface.co at a commit."""

    kind: Literal["huggingface"] = "huggingface"
    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$"), AfterValidator(inside)]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]

    @property
    def address(self) -> str:
        return f"https://huggingface.co/{self.repository}"


class Wheel(_Entry):
    """Files that a package brings: nothing is fetched. Their names are relative to ``module``."""

    kind: Literal["wheel"] = "wheel"
    package: str
    version: str
    module: str


class Build(_Entry):
    """What a command makes, from sources and weights of its own."""

    kind: Literal["build"] = "build"
    command: str
    files: tuple[WeightFile, ...] = ()


def _kind_is_files(entry: Any) -> Any:
    return {"kind": "files"} | entry if isinstance(entry, dict) else entry


Weights = Annotated[
    Annotated[Plain | Archive | HuggingFace | Wheel | Build, Field(discriminator="kind")],
    BeforeValidator(_kind_is_files),
]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=80)]


class WeightTable(Strict):
    """The file ``weights.yaml``."""

    about: str = ""
    weights: Annotated[dict[Name, Weights], Field(min_length=1)]


@cache
def all_weights() -> dict[str, Weights]:
    """Every entry of ``data_specs/weights.yaml``, by name."""
    return dict(load(WeightTable, HERE / "weights.yaml").weights)
