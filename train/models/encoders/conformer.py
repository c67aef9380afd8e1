"""A conformer over log-mels, of the layers of ``transformers.ParakeetEncoder``.

Relative positions, any size by config, units that were cut left out. Streaming (``chunk`` states):
a state attends to its own chunk and all before it, and the depthwise convolutions look back only.
The convolutions below the layers stay within a chunk by themselves, because its length is a
multiple of their stride. What a chunk gives so depends on no sample behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.errors import UserError
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from data_specs.strict import Strict
from train.models.encoders.interface import SpeechEncoder, States, valid_frames
from train.models.features import HOP_SAMPLES, MEL_FFT, log_mels
from train.models.low_rank import shape_as

MEL_MEAN, MEL_SPREAD = -6.0, 4.0
"""Of log-mels of speech, about (LibriSpeech -5.6 and 3.8): constants, because a stream has no
mean."""


class ConformerConfig(Strict):
    """Sizes of a conformer. 12 layers of 144 have 6 million parameters."""

    width: int = Field(default=144, ge=2, multiple_of=2, description="values a state")
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=4, ge=1, description="attention heads a layer")
    hidden: int = Field(default=576, ge=1, description="units of each feed-forward part")
    kernel: int = Field(default=9, ge=1, description="states that a depthwise convolution hears")
    mels: int = Field(default=80, ge=4)
    factor: int = Field(default=4, ge=2, le=16, description="frames of 10 ms a state, a power of 2")
    channels: int = Field(default=64, ge=1, description="of the convolutions below the layers")
    dropout: float = Field(default=0.1, ge=0, lt=1)
    chunk: int = Field(default=0, ge=0, description="states a chunk when streaming; 0: none")
    kept: dict[str, int] = Field(default={}, description="units left of groups that were cut")

    @model_validator(mode="after")
    def _divisible(self) -> ConformerConfig:
        if self.width % self.heads or self.factor & (self.factor - 1) or not self.kernel % 2:
            raise UserError(
                f"width {self.width} must be a multiple of heads {self.heads}, factor "
                f"{self.factor} a power of two, kernel {self.kernel} odd"
            )
        return self

    def units(self, layer: int) -> dict[str, int]:
        """How many units the groups of a layer have."""
        whole = {"heads": self.heads, "channels": self.width}
        whole |= {"feedforward1": self.hidden, "feedforward2": self.hidden}
        return {name: self.kept.get(f"layers.{layer}.{name}", n) for name, n in whole.items()}


class Conformer(SpeechEncoder):
    """Waves at 16 kHz to states of ``factor`` x 10 ms."""

    kind = "conformer"
    counted_s = CROP_SAMPLES / SAMPLE_RATE

    def __init__(self, config: ConformerConfig) -> None:
        from transformers.models.parakeet import modeling_parakeet as parakeet

        super().__init__()
        self.config = config
        self.dims = (config.width,) * (config.layers + 1)
        self.frame_s = config.factor * HOP_SAMPLES / SAMPLE_RATE
        theirs = _parakeet(config)
        self.subsampling = parakeet.ParakeetEncoderSubsamplingConv2D(theirs)
        self.positions = parakeet.ParakeetEncoderRelPositionalEncoding(theirs)
        self.layers = nn.ModuleList(_layer(config, number) for number in range(config.layers))

    @classmethod
    def build(cls, about: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> Self:
        """See ``SpeechEncoder``; what is split in ``state`` is split."""
        encoder = cls(ConformerConfig.model_validate(about))
        if state is not None:
            shape_as(encoder, state)
            encoder.load_state_dict(state)
        return encoder

    def about(self) -> dict[str, Any]:
        return self.config.model_dump()

    def streaming(self, chunk_ms: int) -> Self:
        state_ms = round(1000 * self.frame_s)
        if chunk_ms % state_ms:
            raise UserError(f"--chunk-ms {chunk_ms}: no whole number of states of {state_ms} ms")
        return self.build(self.about() | {"chunk": chunk_ms // state_ms}, self.state_dict())

    def forward(
        self, waves_BT: Tensor, lengths_B: Tensor, mels_BMK: Tensor | None = None
    ) -> States:
        """See ``SpeechEncoder``; ``mels_BMK`` are heard instead of the waves' own features."""
        mels_BMK = self.features(waves_BT) if mels_BMK is None else mels_BMK
        frames_B = lengths_B // HOP_SAMPLES
        heard_BM = valid_frames(frames_B, mels_BMK.shape[1])
        hidden_BFD = self.subsampling(mels_BMK * heard_BM[..., None], heard_BM)
        hidden_BFD = functional.dropout(hidden_BFD, self.config.dropout, self.training)
        lengths_B = -(-frames_B // self.config.factor)
        about: Any = {"attention_mask": self._mask(lengths_B, hidden_BFD.shape[1])}
        about["position_embeddings"] = self.positions(hidden_BFD)
        found = [hidden_BFD]
        for layer in self.layers:
            found.append(layer(found[-1], **about))
        return States(tuple(found), lengths_B)

    def features(self, waves_BT: Tensor) -> Tensor:
        """Log-mels (B, M, mels) of frames of 10 ms, about normal."""
        return (log_mels(waves_BT, self.config.mels) - MEL_MEAN) / MEL_SPREAD

    def _mask(self, lengths_B: Tensor, frames: int) -> Tensor:
        """Which state (third) hears which (last): bool (B, 1, F, F)."""
        heard_BF = valid_frames(lengths_B, frames)
        mask_BFF = heard_BF[:, :, None] & heard_BF[:, None, :]
        if self.config.chunk:
            chunk_F = torch.arange(frames, device=lengths_B.device) // self.config.chunk
            mask_BFF = mask_BFF & (chunk_F[:, None] >= chunk_F)
        return mask_BFF[:, None]


class _LookingBack(nn.Conv1d):
    """A convolution along time that hears nothing behind a state, with the same tensors."""

    def forward(self, maps_BCF: Tensor) -> Tensor:
        return super().forward(functional.pad(maps_BCF, (self.kernel_size[0] - 1, 0)))


def _parakeet(config: ConformerConfig, **changes: Any) -> Any:
    from transformers import ParakeetEncoderConfig

    drop = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), config.dropout)
    values: dict[str, Any] = {
        "hidden_size": config.width,
        "head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "conv_kernel_size": config.kernel,
        "subsampling_factor": config.factor,
        "subsampling_conv_channels": config.channels,
        "num_mel_bins": config.mels,
        "attn_implementation": "sdpa",
    }
    return ParakeetEncoderConfig(**(values | drop | changes))


def _layer(config: ConformerConfig, number: int) -> nn.Module:
    """A layer with as many heads, feed-forward units and channels as are left of them."""
    from transformers.models.parakeet import modeling_parakeet as parakeet

    units = config.units(number)
    layer: Any = parakeet.ParakeetEncoderBlock(
        _parakeet(config, num_attention_heads=units["heads"]), number
    )
    for name in ("feed_forward1", "feed_forward2"):
        count = units[name.replace("_", "")]
        part = parakeet.ParakeetEncoderFeedForward(_parakeet(config, intermediate_size=count))
        setattr(layer, name, part)
    width, left, conv = config.width, units["channels"], layer.conv
    conv.pointwise_conv1 = nn.Conv1d(width, 2 * left, 1)
    kind, padding = (_LookingBack, 0) if config.chunk else (nn.Conv1d, config.kernel // 2)
    conv.depthwise_conv = kind(left, left, config.kernel, padding=padding, groups=left)
    conv.norm = nn.BatchNorm1d(left)
    conv.pointwise_conv2 = nn.Conv1d(left, width, 1)
    return layer  # type: ignore[no-any-return]


def conformer_macs(config: ConformerConfig, samples: int) -> float:
    """Multiply-adds of one clip of that many samples, as ``sizes`` counts them."""
    frames, bins = samples // HOP_SAMPLES, config.mels
    macs, channels, factor = float(frames * (MEL_FFT // 2 + 1) * bins), config.channels, 1
    while factor < config.factor:
        frames, bins = -(-frames // 2), -(-bins // 2)
        each = 9 * channels if factor == 1 else 9 * channels + channels**2
        macs, factor = macs + frames * bins * each, 2 * factor
    macs += frames * config.width * channels * bins
    for number in range(config.layers):
        units = config.units(number)
        inner = units["heads"] * (config.width // config.heads)
        wide = units["feedforward1"] + units["feedforward2"]
        weights = config.width * (4 * inner + 2 * wide + 3 * units["channels"])
        macs += frames * (weights + config.kernel * units["channels"])
        places = 2 * frames - 1
        macs += places * config.width * inner + frames * inner * (2 * frames + places)
    return macs
