"""A shard's tar as the trainer reads it: labels, and audio that is decoded to a crop and no more.

Which members there may be, and how large, ``data_specs.io.tars`` holds; a FLAC's header is held to
the crop's length before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import os

import numpy as np
import soundfile
from numpy.typing import NDArray

from data_specs.io import tars
from data_specs.io.cache import Descriptor
from data_specs.io.errors import UserError
from data_specs.io.tars import Span
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE, SampleRecord, parse_sample

Pcm = NDArray[np.int16]


def require_sha256(file: Descriptor, where: str, sha256: str) -> None:
    """Raise ``UserError`` naming the tar if it is not the one that its record was written for."""
    digest, place = hashlib.sha256(), 0
    while block := os.pread(file.number, 1 << 20, place):
        digest.update(block)
        place += len(block)
    if digest.hexdigest() != sha256:
        raise UserError(
            f"{where}: content differs from its record's hash: audio or labels were changed or "
            "damaged; delete it and its record and run the pipeline again"
        )


def record_of(file: Descriptor, where: str, span: Span) -> SampleRecord:
    """Read a sample's record out of an open tar, which messages call ``where``."""
    data = tars.record_of(file.number, where, span)
    where = f"{where}: {span.key}.json"
    record = parse_sample(data, where)
    if record.key != span.key:
        raise UserError(f"{where}: is the record of sample {record.key!r}")
    return record


def decode(file: Descriptor, where: str, span: Span, pcm_T: Pcm) -> None:
    """Decode a sample's audio into ``pcm_T``: never more than that, whatever the file holds."""
    data = tars.audio_of(file.number, where, span)
    where = f"{where}: {span.key}.flac"
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            _require_crop(sound, where)
            decoded = len(sound.read(out=pcm_T))
    except soundfile.SoundFileError as error:
        raise UserError(f"{where}: not readable as FLAC: {error}") from error
    if decoded != CROP_SAMPLES:
        raise UserError(f"{where}: truncated or damaged ({decoded} of {CROP_SAMPLES} samples)")


def _require_crop(sound: soundfile.SoundFile, where: str) -> None:
    if sound.format != "FLAC":
        raise UserError(f"{where}: not FLAC but {sound.format}")
    shape = (sound.frames,) if sound.channels == 1 else (sound.frames, sound.channels)
    if sound.samplerate != SAMPLE_RATE or shape != (CROP_SAMPLES,):
        raise UserError(
            f"{where}: {sound.samplerate} Hz, shape {shape}; need {SAMPLE_RATE} Hz, "
            f"({CROP_SAMPLES},)"
        )
