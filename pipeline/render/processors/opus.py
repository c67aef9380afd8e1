"""Opus at 16 kHz, encoded and decoded frame by frame (``opuslib`` over the system's libopus)."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.io.rng import Uniform, spelled_out
from data_specs.processors import Opus
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave, from_pcm, to_pcm
from pipeline.render.processors.interface import Columns, Params, Processor, draw_pattern, each


def draw(spec: Opus, uniform: Uniform, prefix: str) -> Columns:
    """Draw the settings; the encoder takes whole bits per second."""
    columns = draw_pattern(spec, uniform, prefix)  # the pattern says which packets are lost
    return columns | {"bitrate_bps": np.rint(columns["bitrate_bps"])}


def code(wave: Wave, params: Params) -> Wave:
    """Code a wave with its bitrate, frame length and complexity; the delay is taken out."""
    import opuslib
    from opuslib.api import ctl, encoder

    frame = int(SAMPLE_RATE * params["frame_ms"] / 1000)
    coder = opuslib.Encoder(SAMPLE_RATE, 1, opuslib.APPLICATION_VOIP)
    coder.bitrate = int(params["bitrate_bps"])
    coder.complexity = int(params["complexity"])
    delay = int(encoder.encoder_ctl(coder.encoder_state, ctl.get_lookahead))
    decoder = opuslib.Decoder(SAMPLE_RATE, 1)
    pcm = to_pcm(np.pad(wave, (0, delay + frame - (len(wave) + delay) % frame)))
    packets = [coder.encode(block.tobytes(), frame) for block in pcm.reshape(-1, frame)]
    arrives = _arrives(len(packets), params)
    frames = (
        decoder.decode(packet, frame) if here else _fill(decoder.decoder_state, frame, params)
        for packet, here in zip(packets, arrives, strict=True)
    )
    decoded = b"".join(frames)
    return from_pcm(np.frombuffer(decoded, dtype=np.int16)[delay : delay + len(wave)])


def _arrives(count: int, params: Params) -> NDArray[np.bool_]:
    loss = params.get("loss", 0.0)
    if not loss:
        return np.ones(count, dtype=bool)
    return spelled_out(params["pattern"]).random(count) >= loss


def _fill(state: Any, frame: int, params: Params) -> bytes:
    """What stands in for a lost packet: ``opus_decode`` conceals where it is given none."""
    from opuslib.api import decoder

    concealed = decoder.decode(state, None, 0, frame, False, channels=1)  # keeps the state in step
    return concealed if params["conceal"] else bytes(2 * frame)


def library_version() -> str:
    """Version of the system's libopus, such as "libopus 1.3.1"."""
    from opuslib.api import libopus

    libopus.opus_get_version_string.restype = ctypes.c_char_p
    return str(libopus.opus_get_version_string().decode())


PROCESSOR = Processor(each(code), draw, packages=("opuslib",), licence="BSD-3-Clause")
