"""Telephone and low-rate codecs that libraries bring: one table, a kind each.

FFmpeg's come with the package ``av``, which bundles it; GSM and Vorbis with ``soundfile``'s
libsndfile; Codec 2, Speex and AMR-WB's encoder are in ``native``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import inf
from types import ModuleType
from typing import Any

import numpy as np
import soundfile

from data_specs.distributions import Choice, Constant
from data_specs.io.errors import UserError
from data_specs.io.rng import Uniform
from data_specs.processors import CODEC_BITRATES
from data_specs.processors import Codec as Spec
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave, from_pcm, resample, to_pcm
from pipeline.draw import sample
from pipeline.render.processors import native
from pipeline.render.processors.interface import (
    Columns,
    Params,
    Processor,
    arrives,
    draw_pattern,
    each,
)
from pipeline.render.processors.native import Pcm

NARROW = 8_000
VORBIS_WIDE_BPS = 24_000
TAIL = 480
"""Zeros after a wave, in samples: what is on its way in a decoder comes out before them."""

AMR_LOST = b"\x7c"
"""NO_DATA (RFC 4867): a decoder conceals."""

G723_1_LOST = b"\0\0\0\xfc\x01".ljust(24, b"\0")
"""A pitch lag of 127, which no frame may have: FFmpeg's decoder takes the frame for erased."""

Code = Callable[[Pcm, int, int, Params], Wave]
"""From 16-bit PCM at the codec's rate in Hz, bit/s and loss to what is heard, as long or longer."""

Options = Callable[[int], dict[str, str]]
"""Options for FFmpeg at a bitrate."""


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise UserError(f"needs the package av ({error}): pip install 'av<19'") from error
    return av


def ffmpeg_version() -> dict[str, str]:
    """Of the FFmpeg in ``av``."""
    return {"ffmpeg": str(_av().ffmpeg_version_info)}


def libsndfile_version() -> dict[str, str]:
    """Of the one in ``soundfile``, or the system's."""
    return {"libsndfile": str(soundfile.__libsndfile_version__)}


def ffmpeg(
    encoder: str,
    decoder: str = "",
    pcm_format: str = "s16",
    lost: bytes = b"",
    encoding: Options = lambda bitrate_bps: {},
    decoding: Options = lambda bitrate_bps: {},
) -> Code:
    """A codec of FFmpeg's; ``lost`` is the packet in the place of one that does not arrive."""

    def code(pcm: Pcm, rate_hz: int, bitrate_bps: int, params: Params) -> Wave:
        av = _av()
        context = _context(encoder, "w", rate_hz, encoding(bitrate_bps))
        context.format, context.bit_rate = pcm_format, bitrate_bps
        context.time_base = Fraction(1, rate_hz)
        samples = pcm if pcm_format == "s16" else from_pcm(pcm)
        frame = av.AudioFrame.from_ndarray(samples[None], format=pcm_format, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, context.time_base
        packets = [*context.encode(frame), *context.encode(None)]
        here = arrives(len(packets), params)
        arrived = [p if ok else av.Packet(lost) for p, ok in zip(packets, here, strict=True)]
        reader = _context(decoder or encoder, "r", rate_hz, decoding(bitrate_bps))
        reader.extradata = context.extradata
        return _heard(reader, arrived)

    return code


def _context(name: str, mode: str, rate_hz: int, options: dict[str, str]) -> Any:
    av = _av()
    if name not in av.codecs_available:
        raise UserError(
            f"needs an FFmpeg with {name}, as in the wheels of av before 19: pip install 'av<19'"
        )
    context = av.CodecContext.create(name, mode)
    context.sample_rate, context.layout, context.options = rate_hz, "mono", options
    context.thread_count = 1
    return context


def _heard(decoder: Any, packets: Sequence[Any]) -> Wave:
    frames = [frame.to_ndarray()[0] for p in (*packets, None) for frame in decoder.decode(p)]
    wave = np.concatenate(frames)
    return from_pcm(wave) if wave.dtype == np.int16 else wave


def sndfile(container: str, subtype: str, quality: Callable[[int], float] | None = None) -> Code:
    """A codec of libsndfile's; ``quality`` is 0 to 1 at a bitrate, where that has no bitrates."""

    def code(pcm: Pcm, rate_hz: int, bitrate_bps: int, params: Params) -> Wave:
        file = io.BytesIO()
        level = 1 - quality(bitrate_bps) if quality else None
        soundfile.write(file, pcm, rate_hz, subtype, None, container, compression_level=level)
        file.seek(0)
        return soundfile.read(file, dtype="float32")[0]  # type: ignore[no-any-return]

    return code


def native_code(code: Callable[[Pcm, int, Params], Pcm]) -> Code:
    """A codec of ``native``."""
    return lambda pcm, rate_hz, bitrate_bps, params: from_pcm(code(pcm, bitrate_bps, params))


def amr_wb(pcm: Pcm, rate_hz: int, bitrate_bps: int, params: Params) -> Wave:
    """AMR-WB: encoded by VisualOn's library, decoded by the one in FFmpeg."""
    packets = native.amr_wb_packets(pcm, bitrate_bps)
    here = arrives(len(packets), params)
    arrived = [_av().Packet(p if ok else AMR_LOST) for p, ok in zip(packets, here, strict=True)]
    return _heard(_context("libopencore_amrwb", "r", rate_hz, {}), arrived)


def _bits(name: str) -> Options:
    """The option that says how many bits a sample of an ADPCM has, at its 8000 pairs or samples."""
    return lambda bitrate_bps: {name: str(bitrate_bps // NARROW)}


def _vorbis_quality(bitrate_bps: int) -> float:
    """Of libvorbis at its nominal bitrate, as its header says it: linear up to a half."""
    if bitrate_bps < VORBIS_WIDE_BPS:
        return (bitrate_bps - 14_000) / 28_000
    return (bitrate_bps - VORBIS_WIDE_BPS) / 80_000


@dataclass(frozen=True)
class Codec:
    """``delay`` is how late its output is, in samples of its own rate: 16 kHz for bitrates from
    ``wide_from_bps`` on, 8 kHz below."""

    code: Code
    licence: str
    wide_from_bps: float = inf
    delay: int = 0
    packages: tuple[str, ...] = ("av",)
    libraries: Callable[[], dict[str, str]] = ffmpeg_version

    def run(self, wave: Wave, params: Params) -> Wave:
        """Code a wave at 16 kHz; the delay is taken out."""
        bitrate_bps = int(params["bitrate_bps"])
        rate_hz = SAMPLE_RATE if bitrate_bps >= self.wide_from_bps else NARROW
        given = _resampled(wave, SAMPLE_RATE, rate_hz)
        pcm = to_pcm(np.pad(given, (0, self.delay + TAIL)))
        heard = self.code(pcm, rate_hz, bitrate_bps, params)[self.delay :][: len(given)]
        return _resampled(heard, rate_hz, SAMPLE_RATE)[: len(wave)]


def _resampled(wave: Wave, from_hz: int, to_hz: int) -> Wave:
    return wave if from_hz == to_hz else resample(wave[None], from_hz, to_hz)[0]


FFMPEG, SNDFILE = "LGPL-3.0-or-later", "LGPL-2.1-or-later"
OPENCORE = f"{FFMPEG} AND Apache-2.0"

CODECS = {
    "g711_alaw": Codec(ffmpeg("pcm_alaw"), FFMPEG),
    "g711_ulaw": Codec(ffmpeg("pcm_mulaw"), FFMPEG),
    # Lower rates leave out bits of 64 kbit/s on the way, as the standard has it; 11 + 11 samples
    # are the delay of its two filter banks.
    "g722": Codec(ffmpeg("g722", decoding=_bits("bits_per_codeword")), FFMPEG, 0, delay=22),
    # 7.5 ms of look ahead.
    "g723_1": Codec(ffmpeg("g723_1", lost=G723_1_LOST), FFMPEG, delay=60),
    "g726": Codec(
        ffmpeg("g726", encoding=_bits("code_size"), decoding=_bits("bits_per_coded_sample")), FFMPEG
    ),
    "gsm": Codec(
        sndfile("WAV", "GSM610"),
        f"{SNDFILE} AND TU-Berlin-2.0",
        packages=("soundfile",),
        libraries=libsndfile_version,
    ),
    # 5 ms of look ahead; AMR-WB's resampling to 12.8 kHz and back adds 15 samples.
    "amr_nb": Codec(ffmpeg("libopencore_amrnb", lost=AMR_LOST), OPENCORE, delay=40),
    "amr_wb": Codec(
        amr_wb,
        OPENCORE,
        0,
        delay=95,
        libraries=lambda: ffmpeg_version() | {"libvo-amrwbenc": native.amr_wb_sha256()},
    ),
    # What encoder and decoder say of themselves (SPEEX_GET_LOOKAHEAD): 40 + 40, 143 + 80.
    "speex_nb": Codec(
        native_code(partial(native.speex, mode=0, samples=160)),
        "BSD-3-Clause",
        delay=80,
        packages=(),
        libraries=native.speex_version,
    ),
    "speex_wb": Codec(
        native_code(partial(native.speex, mode=1, samples=320)),
        "BSD-3-Clause",
        0,
        delay=223,
        packages=(),
        libraries=native.speex_version,
    ),
    # A frame of 10 ms is analysed around the middle of the last 40 ms, and overlaps the next one.
    "codec2": Codec(
        native_code(native.codec2),
        "LGPL-2.1-only",
        delay=160,
        packages=(),
        libraries=native.codec2_version,
    ),
    "mp3": Codec(
        ffmpeg("libmp3lame", "mp3float", "fltp"), f"{FFMPEG} AND LGPL-2.0-or-later", 16_000
    ),
    "aac": Codec(ffmpeg("aac", pcm_format="fltp"), FFMPEG, 12_000, delay=1_024),
    "vorbis": Codec(
        sndfile("OGG", "VORBIS", _vorbis_quality),
        f"{SNDFILE} AND BSD-3-Clause",
        VORBIS_WIDE_BPS,
        packages=("soundfile",),
        libraries=libsndfile_version,
    ),
}


def draw(spec: Spec, uniform: Uniform, prefix: str) -> Columns:
    """Draw a bitrate of the codec's, and the loss where the recipe has any."""
    lossless = spec.loss == Constant(value=0)
    columns = {} if lossless else draw_pattern(spec, uniform, prefix)
    bitrate = spec.bitrate_bps or Choice(values=CODEC_BITRATES[spec.kind])
    return columns | {"bitrate_bps": sample(bitrate, uniform(f"{prefix}.bitrate_bps"))}


PROCESSORS = {
    kind: Processor(
        each(one.run), draw, packages=one.packages, licence=one.licence, libraries=one.libraries
    )
    for kind, one in CODECS.items()
}
