"""The record of one sample: what the pipeline writes into a shard and the trainer reads out of it.

A shard is a plain WebDataset tar with two members a sample: ``{key}.flac``, the audio (16 kHz,
mono, 16-bit, exactly ``CROP_SAMPLES`` samples: 7.68 s), and ``{key}.json``, a ``SampleRecord``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_specs.io.errors import UserError
from data_specs.io.parse import json_object

SAMPLE_RATE = 16_000
"""Hz. Everything is resampled to it (section IV-B)."""

FRAME_SAMPLES = SAMPLE_RATE // 50
"""20 ms."""

CROP_SAMPLES = 122_880
"""7.68 s at 16 kHz: 384 frames of the teacher's 20 ms hop, the fixed input of all models."""

DATASET_FILE = "dataset.json"
"""Name of the file beside the shards that says what the dataset is."""

MOST_AUDIO_BYTES, MOST_RECORD_BYTES = 4 << 20, 1 << 20
"""Of a sample's members; 7.68 s are 0.25 MB uncompressed, a record is a few kB."""

MOST_SAMPLES, MOST_SHARDS, MOST_SHARD_SAMPLES = 10**9 - 1, 10**6 - 1, 100_000
"""Of a dataset and of a shard: what their keys, names and recipes have room for."""


def sample_key(index: int) -> str:
    """Nine digits: contiguous, sorted, without the dots that WebDataset splits at."""
    return f"{index:09d}"


def shard_name(shard: int) -> str:
    """File name of a shard without its ending."""
    return f"shard-{shard:06d}"


class SampleRecord(BaseModel):
    """The JSON member of a sample.

    ``mos`` is the teacher's score (1 to 5), ``logit`` the value before its sigmoid where the
    teacher has one, ``licences`` those of the processors that the sample went through, and ``plan``
    every value that was drawn to make the sample, so that the sample can be made again from its own
    record (``python -m pipeline replay KEY``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    mos: Annotated[float, Field(ge=1, le=5, allow_inf_nan=False)]
    logit: Annotated[float, Field(allow_inf_nan=False)] | None
    teacher: str
    teacher_sha256: str
    pcm_sha256: str
    licences: tuple[str, ...] = ()
    plan: dict[str, Any]


def parse_sample(data: bytes, where: str) -> SampleRecord:
    """Parse a sample's JSON member.

    Raises ``ValueError`` naming ``where`` (shard and member) and the field that is wrong.
    """
    try:
        return SampleRecord.model_validate(json_object(data, where))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "(whole)"
        raise UserError(f"{where}: field {field!r}: {first['msg']}") from error
