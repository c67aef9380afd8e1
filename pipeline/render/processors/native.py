"""Codecs of C libraries that no Python package wraps as needed, frame by frame through ctypes.

Each takes 16-bit PCM at its own rate in whole frames and gives as much back, delayed.
"""

from __future__ import annotations

import _ctypes
import ctypes
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_void_p
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from pipeline.render.processors.interface import Params, arrives

Pcm = NDArray[np.int16]

SPEEX_SET_BITRATE = 18
SPEEX_BITS_BYTES = 64
"""More than ``sizeof(SpeexBits)``, which is 40."""

CODEC2_MODES = {3_200: 0, 2_400: 1, 1_600: 2, 1_400: 3, 1_300: 4, 1_200: 5, 700: 8}
AMR_WB_MODES = (6_600, 8_850, 12_650, 14_250, 15_850, 18_250, 19_850, 23_050, 23_850)
AMR_WB_FRAME = 320
AMR_WB_MOST_BYTES = 64  # a frame has 61 at most


def frames_of(pcm: Pcm, samples: int) -> Pcm:
    """Whole frames (count, samples), a copy; the last is filled with zeros."""
    return np.pad(pcm, (0, -len(pcm) % samples)).reshape(-1, samples)


def _load(soname: str, variable: str, brings: str) -> ctypes.CDLL:
    path = os.environ.get(variable) or soname
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise UserError(
            f"needs the library {soname} ({error}): {brings}, or set {variable} to its path"
        ) from error


@cache
def _speex() -> ctypes.CDLL:
    library = _load("libspeex.so.1", "LIBSPEEX", "apt-get install libspeex1")
    library.speex_lib_get_mode.restype = c_void_p
    library.speex_encoder_init.restype = library.speex_decoder_init.restype = c_void_p
    return library


@cache
def _amr_wb() -> ctypes.CDLL:
    brings = "apt-get install libvo-amrwbenc0"
    library = _load("libvo-amrwbenc.so.0", "LIBVO_AMRWBENC", brings)
    library.E_IF_init.restype = c_void_p
    return library


def speex_version() -> dict[str, str]:
    """What the library says of itself, such as "speex-1.2.1"."""
    told = c_char_p()
    _speex().speex_lib_ctl(9, byref(told))  # SPEEX_LIB_GET_VERSION_STRING
    return {"libspeex": (told.value or b"").decode()}


def amr_wb_sha256() -> str:
    """Hash of the encoder's file: the library does not tell its version."""

    class Found(ctypes.Structure):
        _fields_ = (("file", c_char_p), ("base", c_void_p), ("name", c_char_p), ("at", c_void_p))

    found = Found()
    ctypes.CDLL(None).dladdr(_amr_wb().E_IF_init, byref(found))
    return sha256_of(Path(os.fsdecode(found.file)))


def codec2_version() -> dict[str, str]:
    """Hash of the library's file, which does not tell its version."""
    return {"libcodec2": sha256_of(codec2_path())}


def codec2_path() -> Path:
    """``$LIBCODEC2``, else the library in the wheel of ``pycodec2``. Raises ``UserError``."""
    if given := os.environ.get("LIBCODEC2"):
        return Path(given)
    try:
        files = importlib.metadata.files("pycodec2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.startswith("libcodec2"):
            return Path(str(file.locate()))
    raise UserError(
        "needs the library in the wheel of pycodec2: pip install pycodec2, or set LIBCODEC2 to "
        "the path of a libcodec2.so"
    )


def speex(pcm: Pcm, bitrate_bps: int, params: Params, mode: int, samples: int) -> Pcm:
    """Code at 8 kHz (``mode`` 0) or 16 kHz (1), in frames of so many samples.

    In place; where a frame is lost the decoder is given no bits, and conceals.
    """
    library, frames = _speex(), frames_of(pcm, samples)
    bits = ctypes.create_string_buffer(SPEEX_BITS_BYTES)
    with _speex_states(library, mode, bits) as (encoder, decoder):
        library.speex_encoder_ctl(encoder, SPEEX_SET_BITRATE, byref(c_int(bitrate_bps)))
        for frame, here in zip(frames, arrives(len(frames), params), strict=True):
            at = c_void_p(frame.ctypes.data)
            library.speex_bits_reset(bits)
            library.speex_encode_int(encoder, at, bits)
            library.speex_bits_rewind(bits)
            library.speex_decode_int(decoder, bits if here else None, at)
    return frames.reshape(-1)


@contextmanager
def _speex_states(
    library: ctypes.CDLL, mode: int, bits: ctypes.Array[ctypes.c_char]
) -> Iterator[tuple[c_void_p, c_void_p]]:
    which = c_void_p(library.speex_lib_get_mode(mode))
    encoder = c_void_p(library.speex_encoder_init(which))
    decoder = c_void_p(library.speex_decoder_init(which))
    library.speex_bits_init(bits)
    try:
        yield encoder, decoder
    finally:
        library.speex_bits_destroy(bits)
        library.speex_decoder_destroy(decoder)
        library.speex_encoder_destroy(encoder)


def amr_wb_packets(pcm: Pcm, bitrate_bps: int) -> list[bytes]:
    """Encode at 16 kHz, to frames of 20 ms in the storage format of RFC 4867."""
    library, mode = _amr_wb(), AMR_WB_MODES.index(bitrate_bps)
    out, packets = ctypes.create_string_buffer(AMR_WB_MOST_BYTES), []
    state = c_void_p(library.E_IF_init())
    try:
        for frame in frames_of(pcm, AMR_WB_FRAME):
            size = library.E_IF_encode(state, mode, c_void_p(frame.ctypes.data), out, 0)
            packets.append(out.raw[:size])
    finally:
        library.E_IF_exit(state)
    return packets


_ONE_AT_A_TIME = Lock()


def codec2(pcm: Pcm, bitrate_bps: int, params: Params) -> Pcm:
    """Code at 8 kHz.

    The library has one random generator for all decoders and no way to seed it (``codec2_rand``):
    it is loaded for each wave anew, so that a wave sounds the same whatever came before.
    """
    with _ONE_AT_A_TIME:
        library = ctypes.CDLL(str(codec2_path()))
        try:
            return _code_codec2(library, pcm, CODEC2_MODES[bitrate_bps])
        finally:
            _ctypes.dlclose(library._handle)


def _code_codec2(library: ctypes.CDLL, pcm: Pcm, mode: int) -> Pcm:
    library.codec2_create.restype = c_void_p
    state = c_void_p(library.codec2_create(mode))
    bits = ctypes.create_string_buffer(library.codec2_bytes_per_frame(state))
    frames = frames_of(pcm, library.codec2_samples_per_frame(state))
    try:
        for frame in frames:
            at = c_void_p(frame.ctypes.data)
            library.codec2_encode(state, bits, at)
            library.codec2_decode(state, at, bits)
    finally:
        library.codec2_destroy(state)
    return frames.reshape(-1)
