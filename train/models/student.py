"""The student: convolutions over the compressed spectrum, then the Transformer head.

Section IV-B of the paper and the published code (``distillmos.sqa``): ``v7`` here is the published
network, weight for weight (``load_v7``). The other nine variants are ours: the paper gives
only the range of their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError, model_serializer, model_validator
from torch import Tensor, nn

from data_specs.io.errors import UserError
from data_specs.io.waves import Padding, Resampler
from data_specs.sample import CROP_SAMPLES
from data_specs.strict import Strict
from train.models.features import FREQUENCIES, compressed_spectrum, frames, peak_normalise
from train.models.head import MOST_LAYERS, Positive, Slim, TransformerHead, head_state
from train.models.low_rank import pair
from train.models.tensors import (
    in_package,
    read_weights,
    require_finite,
    require_memory,
    require_shapes,
    shapes_of,
)

KERNEL = 3
LEAK = 0.1
"""Negative slope of the LeakyReLU (published code)."""

WIDE = 128
"""Channels above which a CPU (AVX2) finds the gradients of weights faster with channels first: v7
learns 1.8 times as fast, v5 1.5; v1 and v2 would learn .7 times as fast as they do
(``python -m tests.bench layouts``)."""

Layerwise = Annotated[tuple[Positive, ...], Field(max_length=MOST_LAYERS)]
"""A dimension of every layer of the head."""

STRUCTURED_FIELDS = ("head_dim", "norm_width", "pool")
"""Fields that only a student has which parts were removed from."""

UNSET = {**dict.fromkeys((*STRUCTURED_FIELDS, "ranks")), "padding": "zero", "resampler": "soft"}
"""Fields that came later, and what files without them mean."""


class StudentConfig(Strict):
    """Dimensions of one student.

    ``channels`` and ``strides`` have one entry a convolution layer; a stride is (along
    frequency, along time). ``feedforward`` is twice ``dim`` where it is not given. A student that
    parts were removed from (``train.pruning.units``) may have other ``heads`` and
    ``feedforward`` in every layer, heads of ``head_dim`` whatever ``dim`` is, layer norms that
    count ``norm_width`` coordinates, and ``pool`` hidden units in the pooling. With ``ranks`` each
    convolution is two of that many channels between them (``train.models.low_rank``). ``padding``
    is what it was trained to hear behind a short clip: zeros, or the clip again; ``resampler`` how
    what it was trained on came to 16 kHz.
    """

    channels: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=MOST_LAYERS)]
    strides: tuple[tuple[Positive, Positive], ...]
    dim: Annotated[int, Field(ge=2, le=1 << 16, multiple_of=2)]
    heads: Positive | Layerwise
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    feedforward: Positive | Layerwise | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    head_dim: Positive | None = None
    norm_width: Positive | None = None
    pool: Positive | None = None
    ranks: Layerwise | None = None
    padding: Padding = "zero"
    resampler: Resampler = "soft"

    @model_validator(mode="after")
    def _fits_together(self) -> StudentConfig:
        if len(self.channels) != len(self.strides):
            raise UserError(f"{len(self.channels)} channels but {len(self.strides)} strides")
        if self.ranks is not None and len(self.ranks) != len(self.channels):
            raise UserError(f"{len(self.ranks)} ranks but {len(self.channels)} convolutions")
        self._check_layers()
        if min(size for size, _ in self.grids()) < 1:
            raise UserError("too many layers: no frequency bin is left; stride less")
        return self

    def _check_layers(self) -> None:
        for name in ("heads", "feedforward"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != self.layers:
                raise UserError(f"{name} of {len(given)} layers, but there are {self.layers}")
        if self.norm_width is not None and self.norm_width < self.dim:
            raise UserError(f"norm_width {self.norm_width} is less than dim {self.dim}")
        if self.head_dim is not None:
            return
        if isinstance(self.heads, tuple):
            raise UserError("heads differ by layer: give head_dim too")
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not a multiple of heads {self.heads}")

    @model_serializer(mode="wrap")
    def _without_unset_fields(self, handler: Any) -> dict[str, Any]:
        """Without fields that came later, where they are not set: old files stay the same."""
        values: dict[str, Any] = handler(self)
        return {k: v for k, v in values.items() if k not in UNSET or v != UNSET[k]}

    @property
    def slim(self) -> Slim:
        """The head's dimensions layer by layer."""
        heads, feedforward = self.heads, self.feedforward or 2 * self.dim
        return Slim(
            heads if isinstance(heads, tuple) else (heads,) * self.layers,
            self.head_dim or self.dim // (heads if isinstance(heads, int) else 1),
            feedforward if isinstance(feedforward, tuple) else (feedforward,) * self.layers,
            self.norm_width or self.dim,
            self.pool or 2 * self.dim,
        )

    @property
    def is_slim(self) -> bool:
        """Whether PyTorch's own layers cannot describe it: parts were removed from it."""
        per_layer = isinstance(self.heads, tuple) or isinstance(self.feedforward, tuple)
        return per_layer or any(getattr(self, name) is not None for name in STRUCTURED_FIELDS)

    def grids(self) -> list[tuple[int, int]]:
        """(frequency bins, frames) after each convolution, for a clip of 7.68 s."""
        bins, steps = FREQUENCIES, frames(CROP_SAMPLES)
        sizes = []
        for stride_bins, stride_steps in self.strides:
            bins = (bins - KERNEL) // stride_bins + 1  # no padding along frequency
            steps = (steps + 2 - KERNEL) // stride_steps + 1  # one frame each side along time
            sizes.append((bins, steps))
        return sizes

    @property
    def tokens(self) -> int:
        """Length of the head's sequence."""
        return self.grids()[-1][1]

    @property
    def features(self) -> int:
        """Values a token: channels times the bins that are left."""
        return self.channels[-1] * self.grids()[-1][0]


_PUBLISHED = ((1, 1), (2, 1), (2, 1), (2, 1), (2, 1), (2, 2))
"""Section IV-B."""

# The small ones halve the time axis early: v2 costs a fiftieth of v7 a clip, so that two
# CPU cores train it in minutes. notes: 96 or 192 tokens of 80 or 40 ms.
_TOKENS_96 = ((2, 2), (2, 2), (2, 1), (2, 1), (2, 2))
_TOKENS_192 = ((2, 2), (2, 1), (2, 1), (2, 1), (2, 2))


_SIZES = {
    "v1": ((8, 16, 24, 32, 32), _TOKENS_96, 32, 4, 2),
    "v2": ((16, 32, 48, 64, 64), _TOKENS_96, 64, 4, 3),
    "v3": ((24, 48, 64, 96, 96), _TOKENS_96, 96, 4, 4),
    "v4": ((32, 48, 96, 128, 128), _TOKENS_192, 128, 4, 5),
    "v5": ((32, 64, 128, 160, 160), _TOKENS_192, 160, 8, 6),
    "v6": ((48, 64, 128, 192, 192), _TOKENS_192, 192, 8, 7),
    "v7": ((64, 64, 128, 256, 256, 256), _PUBLISHED, 200, 8, 7),
    "v8": ((64, 64, 128, 256, 384, 384), _PUBLISHED, 288, 8, 8),
    "v9": ((64, 64, 128, 256, 512, 512), _PUBLISHED, 384, 8, 10),
    "v10": ((64, 64, 128, 256, 512, 512), _PUBLISHED, 512, 8, 12),
}
VARIANTS = {
    name: StudentConfig(channels=channels, strides=strides, dim=dim, heads=heads, layers=layers)
    for name, (channels, strides, dim, heads, layers) in _SIZES.items()
}
"""The ten sizes, smallest first; ``python -m train variants`` prints their cost."""


def variant(name: str) -> StudentConfig:
    """The variant of that name; ``ValueError`` naming the known ones."""
    if name not in VARIANTS:
        raise UserError(f"unknown student {name!r}: known are {', '.join(VARIANTS)}")
    return VARIANTS[name]


class Student(nn.Module):
    """A speech quality student: 7.68 s of 16 kHz speech to a mean opinion score of 1 to 5."""

    layout = torch.channels_last
    """Of the convolutions' input, which comes out of its transform with channels last."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        previous = 2  # real and imaginary part
        ranks = config.ranks or (None,) * len(config.channels)
        for channels, stride, rank in zip(config.channels, config.strides, ranks, strict=True):
            layer = nn.Conv2d(previous, channels, KERNEL, stride=stride, padding=(0, 1))
            layers.append(layer if rank is None else pair(layer, rank))
            layers.append(nn.LeakyReLU(LEAK, inplace=True))
            previous = channels
        self.convolutions = nn.Sequential(*layers)
        slim = config.slim
        self.head = TransformerHead(
            config.features,
            config.tokens,
            config.dim,
            slim.heads[0],
            config.layers,
            slim.feedforward[0],
            config.dropout,
            slim if config.is_slim else None,
        )

    def logits(self, waves_BT: Tensor) -> Tensor:
        """Logits (B,), float32, of a (B, 122880) batch at 16 kHz of any level.

        ``ValueError`` for another shape: cut or pad the clip first
        (``train.scoring.windows``).
        """
        if waves_BT.ndim != 2 or waves_BT.shape[1] != CROP_SAMPLES:
            raise ValueError(f"waves of shape {tuple(waves_BT.shape)}: need (B, {CROP_SAMPLES})")
        spectrum_B2FT = compressed_spectrum(peak_normalise(waves_BT))
        logits_B: Tensor = self.head(self.tokens(spectrum_B2FT)).float()
        return logits_B

    def lay_out(self, layout: torch.memory_format) -> None:
        """Take the layout of the convolutions' weights, and with it that of their maps."""
        self.layout = layout
        self.convolutions.to(memory_format=layout)  # type: ignore[call-overload]

    def tokens(self, spectrum_B2FT: Tensor) -> Tensor:
        """The head's input (B, L, C) of a compressed spectrum (B, 2, 161, F)."""
        maps_BCFT = self.convolutions(spectrum_B2FT.contiguous(memory_format=self.layout))
        return torch.flatten(maps_BCFT, 1, -2).permute(0, 2, 1)

    def forward(self, waves_BT: Tensor) -> Tensor:
        """Mean opinion scores (B,), float32, 1 to 5, of a (B, 122880) batch at 16 kHz."""
        return mos_of(self.logits(waves_BT))


def training_layout(config: StudentConfig, device: torch.device) -> torch.memory_format:
    """The layout in which a student's convolutions learn fastest."""
    wide = device.type == "cpu" and max(config.channels) > WIDE
    return torch.contiguous_format if wide else torch.channels_last


def mos_of(logits_B: Tensor) -> Tensor:
    """``1 + 4 * sigmoid(logit)`` (published code)."""
    return 1 + 4 * torch.sigmoid(logits_B)


def count(config: StudentConfig) -> tuple[int, int]:
    """(parameters, multiply-adds a clip of 7.68 s) of a student, without making its weights.

    Multiply-adds are those of the convolutions, the linear layers and the attention products.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Student(config).parameters())
    return parameters, macs_of(config)


def macs_of(config: StudentConfig) -> int:
    """Multiply-adds a clip of 7.68 s: those of ``count``."""
    sizes: tuple[Any, ...] = (config.channels, config.ranks, config.dim, config.slim)
    return int(macs_with(config, *sizes))


def macs_with(config: StudentConfig, channels: Any, ranks: Any, dim: Any, slim: Slim) -> Any:
    """``macs_of`` with other sizes, which may be tensors: what a network of gates is expected to
    cost (``train.pruning.gates``)."""
    macs, previous, grids = 0, 2, config.grids()
    for number, (bins, steps) in enumerate(grids):
        now = channels[number]
        if ranks:
            kernels = ranks[number] * (KERNEL**2 * previous + now)
        else:
            kernels = KERNEL**2 * previous * now
        macs, previous = macs + kernels * bins * steps, now
    tokens = config.tokens
    macs = macs + tokens * previous * grids[-1][0] * dim
    for heads, feedforward in zip(slim.heads, slim.feedforward, strict=True):
        inner = heads * slim.head_dim
        macs = macs + tokens * (4 * dim * inner + 2 * dim * feedforward) + 2 * tokens**2 * inner
    return macs + tokens * (slim.pool * dim + slim.pool + dim)


def saved_for_backward(config: StudentConfig) -> int:
    """Bytes of activations that training keeps for each clip of 7.68 s, in float32.

    Counted on tensors without memory; of the network, not of the spectrum before it.
    """
    return (_saved_bytes(config, 4) - _saved_bytes(config, 2)) // 2  # the weights cancel out


def _saved_bytes(config: StudentConfig, batch: int) -> int:
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage  # a tensor that is saved twice is there once
        return tensor

    with torch.device("meta"):
        student = Student(config)
        spectrum_B2FT = torch.zeros(batch, 2, FREQUENCIES, frames(CROP_SAMPLES))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            student.head(student.tokens(spectrum_B2FT))
    return sum(storage.nbytes() for storage in storages.values())


def v7_weights_path() -> Path:
    """Where the ``distillmos`` wheel keeps the published weights. Errors as ``in_package``."""
    return in_package("distillmos", "weights/distill_mos_v7.pt", "the published student (v7)")


def load_v7() -> Student:
    """The published student with its weights out of the ``distillmos`` wheel, in eval mode."""
    published = torch.load(v7_weights_path(), map_location="cpu", weights_only=True)["model"]
    student = Student(VARIANTS["v7"])
    student.load_state_dict(_student_state(published))
    return student.eval()


def student_of(where: Path, config: object, weights: Mapping[str, Tensor]) -> Student:
    """A student of a configuration as files have it, with these weights, in eval mode.

    ``UserError`` naming ``where`` they come from if they do not fit or are not finite numbers, or
    if the student is larger than this machine; nothing is made before that is known.
    """
    shape = _checked_config(where, config)
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{where}: does not fit a student: not all of its weights are tensors")
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    require_shapes(where, found, _shapes(shape))
    require_finite(where, weights)
    student = Student(shape)
    student.load_state_dict(weights)
    return student.eval()


def read_student(path: Path, about: Mapping[str, Any]) -> Student:
    """The student in a safetensors file that ``about`` describes. Errors as ``student_of``."""
    shape = _checked_config(path, about.get("config"))
    return student_of(path, shape, read_weights(path, about, _shapes(shape)))


def _checked_config(where: Path, config: object) -> StudentConfig:
    """A configuration whose network this machine can hold: weights, and the largest maps."""
    try:
        shape = StudentConfig.model_validate(config)
    except ValidationError as error:
        raise UserError(f"{where}: does not fit a student: {error}") from error
    sizes = zip(shape.channels, shape.grids(), strict=True)
    maps = max(channels * bins * steps for channels, (bins, steps) in sizes)
    require_memory(where, 4 * (count(shape)[0] + 2 * maps))
    return shape


def _shapes(config: StudentConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(Student(config))


def _student_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict under our names."""
    convolutions, head = (
        {name.removeprefix(prefix): t for name, t in published.items() if name.startswith(prefix)}
        for prefix in ("cnn.cnn.", "transformer_pool_attn.")
    )
    ours = {"convolutions": convolutions, "head": head_state(head)}
    return {f"{part}.{name}": t for part, state in ours.items() for name, t in state.items()}
