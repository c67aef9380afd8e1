"""Opus at 16 kHz, encoded and decoded frame by frame (``opuslib`` over the system's libopus)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from data_specs.processors import Opus
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import DropSample, Wave, from_pcm, to_pcm
from pipeline.degrade.interface import Columns, Params, Processor, Waves, draw_fields
from pipeline.rng import Uniform


def draw(spec: Opus, uniform: Uniform, prefix: str) -> Columns:
    """Draw the settings; the encoder takes whole bits per second."""
    columns = draw_fields(spec, uniform, prefix)
    return columns | {"bitrate_bps": np.rint(columns["bitrate_bps"])}


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Code each wave with its own bitrate, frame length and complexity; the delay is taken out."""
    import opuslib

    try:
        return np.stack([_code(wave, p) for wave, p in zip(waves_BT, params, strict=True)])
    except opuslib.OpusError as error:
        raise DropSample("processor_failed", f"opus: {error}") from error


def _code(wave: Wave, params: Params) -> Wave:
    import opuslib
    from opuslib.api import ctl, encoder

    frame = int(SAMPLE_RATE * params["frame_ms"] / 1000)
    coder = opuslib.Encoder(SAMPLE_RATE, 1, opuslib.APPLICATION_VOIP)
    coder.bitrate = int(params["bitrate_bps"])
    coder.complexity = int(params["complexity"])
    delay = int(encoder.encoder_ctl(coder.encoder_state, ctl.get_lookahead))
    decoder = opuslib.Decoder(SAMPLE_RATE, 1)
    pcm = to_pcm(np.pad(wave, (0, delay + frame - (len(wave) + delay) % frame)))
    packets = (coder.encode(block.tobytes(), frame) for block in pcm.reshape(-1, frame))
    decoded = b"".join(decoder.decode(packet, frame) for packet in packets)
    return from_pcm(np.frombuffer(decoded, dtype=np.int16)[delay : delay + len(wave)])


def library_version() -> str:
    """Version of the system's libopus, such as "libopus 1.3.1"."""
    from opuslib.api import libopus

    libopus.opus_get_version_string.restype = ctypes.c_char_p
    return str(libopus.opus_get_version_string().decode())


PROCESSOR = Processor(process, draw, packages=("opuslib",), licence="BSD-3-Clause")
