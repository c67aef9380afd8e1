"""Audio of the pipeline: parts of recordings at 16 kHz, what shards hold, and resampling."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from data_specs.io.audio import BadAudio, Header, Recording, examine, header_of, open_audio
from data_specs.io.cache import RemoteFile, remote_clip
from data_specs.io.errors import UserError
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE

Wave = NDArray[np.float32]

AudioFile = Path | RemoteFile
"""A file of a corpus; messages show either as it stands."""

EDGE_SECONDS = 0.05
"""Read this much more on both sides, so that the resampler's filter starts on real samples."""


DROP_REASONS = {
    "unreadable": "the audio data behind a good header cannot be decoded, or ends early",
    "non_finite": "NaN or infinity in a source file or in a processor's output",
    "silent": "no speech, or no noise, above -70 dBFS in the part that was drawn",
    "processor_failed": "a processor raised an error on this sample",
    "processor_timeout": "a processor did not answer within its time limit on this sample",
    "processor_crashed": "a processor's native code ended its process on this sample",
}
"""Every reason for which a sample may be dropped."""


class DropSample(Exception):
    """This sample cannot be made, for a listed reason; the shard goes on without it."""

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in DROP_REASONS:
            raise RuntimeError(f"{reason!r} is no listed reason to drop a sample")
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[DropSample], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def read_remote_header(root: str, path: str) -> Header:
    """Read a header below an address: of most formats only the parts of the file that it takes.

    Over HTTP the whole file is fetched into the cache, for many servers send nothing less. Raises
    ``BadAudio`` where not all can be decoded, and ``OSError`` where the store cannot be read.
    """
    clip = remote_clip(root, path)
    if root.startswith("http"):
        with _local(clip) as name:
            return header_of(name)
    source = RemoteSource(clip)
    try:
        return examine(source).header
    finally:
        if source.error:  # soundfile swallows it, and says that there is no header
            raise source.error


class RemoteSource:
    """A remote file's bytes, fetched in blocks, the last four of which are kept."""

    def __init__(self, clip: RemoteFile, block_bytes: int = 1 << 16) -> None:
        self.clip, self.block_bytes = clip, block_bytes
        self.name, self.size = str(clip), clip.size
        self.block = lru_cache(maxsize=4)(self._fetched)
        self.error: Exception | None = None

    def at(self, start: int, count: int) -> bytes:
        """Bytes from ``start``; nothing more comes after an error, which is kept."""
        end, found = min(start + count, self.size), b""
        while start < end and not self.error:
            number, offset = divmod(start, self.block_bytes)
            data = self.block(number)[offset : offset + end - start]
            found, start = found + data, start + len(data)
        return found

    def _fetched(self, number: int) -> bytes:
        start = number * self.block_bytes
        end = min(start + self.block_bytes, self.size)
        try:
            data = self.clip.folder.part(self.clip.name, start, end)
            if len(data) != end - start:
                raise OSError(f"{self.clip}: {len(data)} of {end - start} bytes came")
        except (OSError, ValueError) as error:
            self.error, data = error, b""
        return data


@contextmanager
def _local(file: AudioFile) -> Iterator[str]:
    """A name on this machine under which a file can be opened; a remote one is fetched.

    It is a name of the open file itself: room for others may be made in the cache meanwhile.
    """
    if isinstance(file, Path):
        os.stat(file)  # a missing file or mount is the job's trouble (OSError), not the sample's
        yield str(file)
    else:
        descriptor = file.open()
        yield f"/proc/self/fd/{descriptor.number}"


def read_part(path: AudioFile, start: int, count: int, speed: float = 1.0) -> Wave:
    """Read part of the first channel at 16 kHz.

    ``start`` (at 16 kHz of the file's own time) and ``count`` (output samples) say which; a
    ``speed`` above 1 plays faster, as tape does. The result is shorter than ``count`` where the
    file ends. Raises ``DropSample`` for audio that cannot be decoded or is not finite, ``OSError``
    for a file that cannot be opened.
    """
    try:
        with _local(path) as name, open_audio(name) as file:
            rate_hz = file.header.sample_rate_hz
            wave, before = _read_native(file, start, int(np.ceil(count * speed)))
    except BadAudio as error:
        raise DropSample("unreadable", f"{path}: {error.reason}") from error
    if not np.isfinite(wave).all():
        raise DropSample("non_finite", f"{path}: NaN or infinity in the audio")
    if rate_hz * speed != SAMPLE_RATE:
        wave = soxr.resample(wave, rate_hz * speed, SAMPLE_RATE, quality="HQ")
    first = round(before / speed)
    return np.ascontiguousarray(wave[first : first + count], dtype=np.float32)


def _read_native(file: Recording, start: int, count: int) -> tuple[Wave, int]:
    """Samples at the file's own rate, and how many 16 kHz samples lie before ``start``.

    Reading begins where a sample of the file and one at 16 kHz fall together, so that a part is in
    place to a fraction of a sample at every rate.
    """
    rate_hz, frames = file.header.sample_rate_hz, file.header.frames
    common = math.gcd(rate_hz, SAMPLE_RATE)
    native_step, step = rate_hz // common, SAMPLE_RATE // common
    edge = int(EDGE_SECONDS * SAMPLE_RATE)
    first = max(0, start - edge) // step
    begin = min(first * native_step, frames)
    end = min(frames, -(-(start + count + edge) * native_step // step))
    return file.read(begin, end - begin)[:, 0], start - first * step


def read_whole(path: AudioFile, limit_seconds: float) -> Wave:
    """Read the first channel at 16 kHz, at most ``limit_seconds`` of it."""
    return read_part(path, 0, int(limit_seconds * SAMPLE_RATE))


def read_clip(path: AudioFile, longest_s: int) -> Wave:
    """Read the first channel of a whole clip at 16 kHz; ``DropSample`` for a longer, an empty one.

    For clips whose label is of all of it.
    """
    wave = read_part(path, 0, longest_s * SAMPLE_RATE + 1)
    if not 0 < len(wave) <= longest_s * SAMPLE_RATE:
        what = f"longer than {longest_s} s: cut it" if len(wave) else "no samples"
        raise DropSample("unreadable", f"{path}: {what}")
    return wave


def to_pcm(wave: Wave) -> NDArray[np.int16]:
    """Quantise to 16 bits; louder than full scale is clipped."""
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def from_pcm(pcm: NDArray[np.int16]) -> Wave:
    """The float wave that a reader of the shard gets: int16 / 32768."""
    return pcm.astype(np.float32) / np.float32(32768.0)


def encode_flac(pcm: NDArray[np.int16]) -> bytes:
    """FLAC, 16 bit, 16 kHz, mono."""
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def decode_flac(data: bytes) -> NDArray[np.int16]:
    """The PCM of a shard's FLAC member. Raises ``ValueError`` where it is not one.

    What its header says is held to a sample's before anything is decoded.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if (file.format, file.samplerate, file.channels) != ("FLAC", SAMPLE_RATE, 1):
                raise UserError(
                    f"must be mono FLAC at {SAMPLE_RATE} Hz, is {file.format} with "
                    f"{file.channels} channels at {file.samplerate} Hz"
                )
            if file.frames > CROP_SAMPLES:
                raise UserError(f"{file.frames} samples, must be {CROP_SAMPLES}")
            return file.read(dtype="int16")  # type: ignore[no-any-return]
    except soundfile.LibsndfileError as error:
        raise UserError(f"not decodable: {error.error_string.strip()}") from error


def resample(waves_BT: Wave, from_hz: int, to_hz: int) -> Wave:
    """Resample every row of (B, T), without delay, to T * to_hz / from_hz samples, rounded up."""
    out_BT = np.zeros((len(waves_BT), -(-waves_BT.shape[1] * to_hz // from_hz)), np.float32)
    for wave_T, out_T in zip(waves_BT, out_BT, strict=True):
        resampled = soxr.resample(wave_T, from_hz, to_hz, quality="HQ")[: len(out_T)]
        out_T[: len(resampled)] = resampled
    return out_BT


def pcm_sha256(pcm: NDArray[np.int16]) -> str:
    """Hash of the audio itself, which no FLAC encoder's version changes."""
    return hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest()
