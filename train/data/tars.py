"""One tar of a shard, read in place and not trusted.

Only plain members ``KEY.flac`` and ``KEY.json`` are accepted, up to a size, and a FLAC's header is
held to the crop's length before anything is decoded. Nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from data_specs.io.cache import Descriptor
from data_specs.io.errors import UserError
from data_specs.io.tars import PLAIN, Member, content, members
from data_specs.sample import (
    CROP_SAMPLES,
    MOST_AUDIO_BYTES,
    MOST_RECORD_BYTES,
    SAMPLE_RATE,
    SampleRecord,
    parse_sample,
)

Pcm = NDArray[np.int16]


class Span(NamedTuple):
    """Where one sample's members lie in its tar, in bytes."""

    key: str
    audio_start: int
    audio_bytes: int
    record_start: int
    record_bytes: int


MEMBER = re.compile(r"([A-Za-z0-9_-]+)\.(flac|json)")

MOST_BYTES = {"flac": MOST_AUDIO_BYTES, "json": MOST_RECORD_BYTES}


def shard_index(tar: Path) -> list[Span]:
    """Where every sample of a tar lies, in file order; reads the headers only.

    ``ValueError`` naming the tar and the member: damaged, or anything but one plain ``KEY.flac``
    and one plain ``KEY.json`` a sample, in any order.
    """
    return index_of(open_tar(tar), str(tar))


def open_tar(tar: Path) -> Descriptor:
    """A tar's file, open; ``ValueError`` naming it if it cannot be read."""
    try:
        return Descriptor(tar)
    except OSError as error:
        raise UserError(f"{tar}: cannot be read: {error.strerror}") from error


def require_sha256(file: Descriptor, where: str, sha256: str) -> None:
    """``ValueError`` naming the tar if it is not the one that its record was written for."""
    digest, place = hashlib.sha256(), 0
    while block := os.pread(file.number, 1 << 20, place):
        digest.update(block)
        place += len(block)
    if digest.hexdigest() != sha256:
        raise UserError(
            f"{where}: content differs from its record's hash: audio or labels were changed or "
            "damaged; delete it and its record and run the pipeline again"
        )


def index_of(file: Descriptor, where: str) -> list[Span]:
    """See ``shard_index``; of an open tar, which messages call ``where``."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members(file.number, where):
        found = MEMBER.fullmatch(member.name)
        if found is None or member.kind not in PLAIN:
            raise UserError(
                f"{where}: unexpected member {member.name!r} of type {member.kind!r}: a shard "
                "holds plain files KEY.flac and KEY.json"
            )
        key, ending = found.groups()
        if ending in samples.setdefault(key, {}):
            raise UserError(f"{where}: member {member.name} is there twice")
        if member.size > MOST_BYTES[ending]:
            raise UserError(f"{where}: member {member.name}: {member.size} bytes are too many")
        samples[key][ending] = member
    return [_span(where, key, found) for key, found in samples.items()]


def _span(where: str, key: str, found: dict[str, Member]) -> Span:
    for ending, what in (("flac", "audio"), ("json", "label")):
        if ending not in found:
            raise UserError(
                f"{where}: sample {key} has no {what}: member {key}.{ending} is missing"
            )
    audio, record = found["flac"], found["json"]
    return Span(key, audio.start, audio.size, record.start, record.size)


def read_record(tar: Path, span: Span) -> SampleRecord:
    """A sample's record; ``ValueError`` naming shard, member and field."""
    return record_of(open_tar(tar), str(tar), span)


def record_of(file: Descriptor, where: str, span: Span) -> SampleRecord:
    """See ``read_record``; of an open tar."""
    where = f"{where}: {span.key}.json"
    data = content(file.number, span.record_start, span.record_bytes, where)
    record = parse_sample(data, where)
    if record.key != span.key:
        raise UserError(f"{where}: is the record of sample {record.key!r}")
    return record


def read_pcm(tar: Path, span: Span) -> Pcm:
    """A sample's audio, int16 (122880,); ``ValueError`` naming shard and member."""
    pcm_T = np.empty(CROP_SAMPLES, np.int16)
    decode(open_tar(tar), str(tar), span, pcm_T)
    return pcm_T


def decode(file: Descriptor, where: str, span: Span, pcm_T: Pcm) -> None:
    """Decode a sample's audio into ``pcm_T``: never more than that, whatever the file holds."""
    data = audio_of(file, where, span)
    where = f"{where}: {span.key}.flac"
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            _require_crop(sound, where)
            decoded = len(sound.read(out=pcm_T))
    except soundfile.SoundFileError as error:
        raise UserError(f"{where}: not readable as FLAC: {error}") from error
    if decoded != CROP_SAMPLES:
        raise UserError(f"{where}: truncated or damaged ({decoded} of {CROP_SAMPLES} samples)")


def audio_of(file: Descriptor, where: str, span: Span) -> bytes:
    """A sample's audio as it is stored."""
    return content(file.number, span.audio_start, span.audio_bytes, f"{where}: {span.key}.flac")


def _require_crop(sound: soundfile.SoundFile, where: str) -> None:
    if sound.format != "FLAC":
        raise UserError(f"{where}: not FLAC but {sound.format}")
    shape = (sound.frames,) if sound.channels == 1 else (sound.frames, sound.channels)
    if sound.samplerate != SAMPLE_RATE or shape != (CROP_SAMPLES,):
        raise UserError(
            f"{where}: {sound.samplerate} Hz, shape {shape}; need {SAMPLE_RATE} Hz, "
            f"({CROP_SAMPLES},)"
        )
