"""Opus at 16 kHz, encoded and decoded frame by frame (``opuslib`` over a libopus)."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np

from data_specs.distributions import Constant, values
from data_specs.io.errors import UserError
from data_specs.io.rng import Uniform
from data_specs.processors import Opus
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave, from_pcm, to_pcm
from pipeline.render.processors.interface import (
    Columns,
    Params,
    Processor,
    arrives,
    draw_pattern,
    each,
)

PATH_VARIABLE = "LIBOPUS"

NETWORKS = {5: "deep PLC", 6: "LACE", 7: "NoLACE"}
"""What a decoder uses from which complexity on, where libopus was built with it."""

SET_COMPLEXITY = 4010
"""Of a decoder too, since libopus 1.5 (``opus_defines.h``)."""


def draw(spec: Opus, uniform: Uniform, prefix: str) -> Columns:
    """Draw the settings; the encoder takes whole bits per second."""
    columns = draw_pattern(spec, uniform, prefix)  # the pattern says which packets are lost
    if spec.decoder_complexity == Constant(value=0):  # nothing that a plan need say
        del columns["decoder_complexity"]
    return columns | {"bitrate_bps": np.rint(columns["bitrate_bps"])}


@cache
def _package() -> ModuleType:
    """``opuslib`` over the library at ``$LIBOPUS``, else over the system's."""
    ours, find = os.environ.get(PATH_VARIABLE), ctypes.util.find_library
    if ours:
        ctypes.CDLL(ours)  # says what is wrong with it
        ctypes.util.find_library = lambda name: ours  # opuslib asks where it is imported
    try:
        import opuslib.api.ctl
        import opuslib.api.decoder
        import opuslib.api.encoder
    finally:
        ctypes.util.find_library = find
    return opuslib


def code(wave: Wave, params: Params) -> Wave:
    """Code a wave with its bitrate, frame length and complexity; the delay is taken out."""
    require_network(int(params.get("decoder_complexity", 0)))
    frame = int(SAMPLE_RATE * params["frame_ms"] / 1000)
    packets, delay = _encode(wave, frame, params)
    decoded = b"".join(_decode(packets, frame, params))
    return from_pcm(np.frombuffer(decoded, dtype=np.int16)[delay : delay + len(wave)])


def _encode(wave: Wave, frame: int, params: Params) -> tuple[list[bytes], int]:
    opuslib = _package()
    coder = opuslib.Encoder(SAMPLE_RATE, 1, opuslib.APPLICATION_VOIP)
    coder.bitrate = int(params["bitrate_bps"])
    coder.complexity = int(params["complexity"])
    delay = int(opuslib.api.encoder.encoder_ctl(coder.encoder_state, opuslib.api.ctl.get_lookahead))
    pcm = to_pcm(np.pad(wave, (0, delay + frame - (len(wave) + delay) % frame)))
    return [coder.encode(block.tobytes(), frame) for block in pcm.reshape(-1, frame)], delay


def _decode(packets: Sequence[bytes], frame: int, params: Params) -> Iterator[bytes]:
    opuslib = _package()
    decoder = opuslib.Decoder(SAMPLE_RATE, 1)
    complexity = int(params.get("decoder_complexity", 0))
    if complexity:
        setting = opuslib.api.ctl.ctl_set(SET_COMPLEXITY)
        opuslib.api.decoder.decoder_ctl(decoder.decoder_state, setting, complexity)
    for packet, here in zip(packets, arrives(len(packets), params), strict=True):
        yield (
            decoder.decode(packet, frame) if here else _fill(decoder.decoder_state, frame, params)
        )


def _fill(state: Any, frame: int, params: Params) -> bytes:
    """What stands in for a lost packet: ``opus_decode`` conceals where it is given none."""
    concealed = _package().api.decoder.decode(state, None, 0, frame, False, channels=1)
    return concealed if params["conceal"] else bytes(2 * frame)  # decoded to keep the state in step


@cache
def networks() -> tuple[str, ...]:
    """Which ``NETWORKS`` the library has: each changes what a decoder makes of a probe.

    The library does not tell: one that was built without them takes the same complexities.
    """
    time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    buzz = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 40)) * 0.1
    frame = SAMPLE_RATE // 50
    settings = {"bitrate_bps": 16_000.0, "complexity": 5.0, "conceal": 1.0}
    lossy = settings | {"loss": 0.3, "pattern": 1.0}
    packets, _ = _encode(np.asarray(buzz, np.float32), frame, settings)
    try:
        heard = [
            b"".join(_decode(packets, frame, lossy | {"decoder_complexity": complexity}))
            for complexity in (0, *NETWORKS)
        ]
    except _package().exceptions.OpusError:  # before 1.5 a decoder has no complexity
        return ()
    changed = (now != before for before, now in pairwise(heard))
    return tuple(name for name, new in zip(NETWORKS.values(), changed, strict=True) if new)


def require_network(decoder_complexity: int) -> None:
    """Raise ``UserError`` where the library lacks the network that the complexity stands for."""
    name = NETWORKS.get(decoder_complexity)
    if name and name not in networks():
        raise UserError(
            f"decoder_complexity {decoder_complexity} needs a libopus with {name}: this is "
            f"{library_version()}; set {PATH_VARIABLE} to one of 1.5 or later that was built with "
            "--enable-deep-plc --enable-osce, as Debian's is from 13 on"
        )


def require(spec: Opus) -> None:
    """Raise ``UserError`` where the library lacks a network that the recipe may draw."""
    for value in values(spec.decoder_complexity):
        require_network(int(value))


def library_version() -> str:
    """Version and networks of the libopus in use: "libopus 1.6.1 with deep PLC, LACE, NoLACE"."""
    libopus = _package().api.libopus
    libopus.opus_get_version_string.restype = ctypes.c_char_p
    version = str(libopus.opus_get_version_string().decode())
    return " with ".join([version, ", ".join(networks())]).removesuffix(" with ")


PROCESSOR = Processor(
    each(code),
    draw,
    packages=("opuslib",),
    licence="BSD-3-Clause",
    libraries=lambda: {"libopus": library_version()},
    require=require,
)
