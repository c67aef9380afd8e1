"""A student's convolutions in int8 on a CPU: u8 maps times s8 weights, summed, in float again.

The sums come out as float32 (oneDNN does that for nothing), so that each map is rounded once,
behind its LeakyReLU, and within limits that are looked up as it runs; an int8 ONNX file rounds
twice, within fixed limits, and is further from float for it. The weights, of channels that
``python -m train export --int8`` evened out on real clips, are in a bundle's ``int8.safetensors``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.errors import UserError
from train.models.student import KERNEL, LEAK, Student

INT8_FILE = "int8.safetensors"
MADE_OF = "weights_sha256"
FLOAT_PARTS = ("weight", "bias")
PARTS = (*FLOAT_PARTS, "scales")
"""Of layer n, stored as ``n.weight`` ...; the first, in float, has the float parts only."""

EXPORT = "python -m train export --int8 --calibrate SHARDS --model MODEL --out BUNDLE"

PIECE_FRAMES = 96
"""Frames of a clip's spectrum that share limits."""

LEVELS = 255


class Int8Layer(nn.Module):
    """One convolution of a piece that brings its neighbours' frames; see ``Int8Convolutions``."""

    def __init__(self, parts: dict[str, Tensor], stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride, self.scales, self.bias = stride, parts["scales"], parts["bias"]
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int64)
        self.weight = torch.ops.onednn.qconv_prepack(
            parts["weight"], self.scales, 1.0, 0, stride, (0, 0), (1, 1), 1
        )

    def forward(self, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pieces (1, C, F, T) of a clip to pieces (1, O, F', T'), float32, one when asked for."""
        return (functional.leaky_relu_(self._sums(three), LEAK) for three in _with_edges(pieces))

    def _sums(self, three: Sequence[Tensor]) -> Tensor:
        step, zero = step_of(_limits(three))
        rounded = _rounded(three, step, zero)
        sums_1OFT: Tensor = torch.ops.onednn.qconv_pointwise(
            *(rounded, step, zero, self.weight, self.scales, self.zeros, self.bias),
            *(self.stride, (0, 0), (1, 1), 1, 1.0, 0, torch.float32, "none", [], ""),
        )
        return sums_1OFT


def _with_edges(pieces: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every piece between the frames next to it; zeros at the ends, as padding is."""
    piece = next(pieces)
    left = nothing = torch.zeros_like(piece[..., :1])
    for following in pieces:
        yield left, piece, following[..., :1]
        left, piece = piece[..., -1:], following
    yield left, piece, nothing


def _limits(parts: Sequence[Tensor]) -> tuple[float, float]:
    """The lowest and the highest value, and zero, of maps that lie with channels last."""
    found = [torch.aminmax(part.permute(0, 2, 3, 1)) for part in parts]  # as it lies: no copy
    low, high = min(float(one.min) for one in found), max(float(one.max) for one in found)
    return min(low, 0.0), max(high, 0.0)


def _rounded(parts: Sequence[Tensor], step: float, zero: int) -> Tensor:
    """Parts put together as u8, channels last."""
    shape = (*parts[0].shape[:3], sum(part.shape[3] for part in parts))
    rounded = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    places = rounded.split([part.shape[3] for part in parts], 3)
    for place, part in zip(places, parts, strict=True):
        place.copy_(_bytes(torch.quantize_per_tensor(part, step, zero, torch.quint8)))
    return rounded


def _bytes(rounded: Tensor) -> Tensor:
    """``int_repr()``, which would copy."""
    where = (rounded.untyped_storage(), 0, rounded.shape, rounded.stride())
    return torch.empty(0, dtype=torch.uint8).set_(*where)  # type: ignore[call-overload, no-any-return]


class Int8Convolutions(nn.Module):
    """All of a student's convolutions, the first in float: spectrum (B, 2, F, T) to maps, float32.

    Clips go through one by one and in pieces of some frames, each rounded within the range of its
    own values: a loud moment then takes no steps from a quiet one. (v7, 150 clips, 99th percentile
    of the difference to float32: .029 with pieces of 96 frames, .036 with 192; shorter pieces are
    slower.) ``ValueError`` on a CPU without VNNI: its byte products saturate.
    """

    def __init__(self, layers: Sequence[dict[str, Tensor]], student: Student) -> None:
        super().__init__()
        _require_vnni()
        first, strides = layers[0], student.config.strides
        channels = tuple(len(parts["bias"]) for parts in layers)
        if channels != tuple(student.config.channels):
            raise UserError(f"channels {channels}: the student has {student.config.channels}")
        along = math.prod(stride for _, stride in strides)
        self.piece = along * max(1, PIECE_FRAMES // along)
        inputs = first["weight"].shape[1]
        self.first = nn.Conv2d(inputs, channels[0], KERNEL, strides[0])
        self.first.load_state_dict(first)
        self.first.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        others = zip(layers[1:], strides[1:], strict=True)
        self.layers = nn.ModuleList(Int8Layer(*pair) for pair in others)

    def forward(self, x_BCFT: Tensor) -> Tensor:
        """The maps behind the last LeakyReLU."""
        return torch.cat([self._one(x_1CFT) for x_1CFT in x_BCFT.split(1)])

    def _one(self, x_1CFT: Tensor) -> Tensor:
        padded_1CFT = functional.pad(x_1CFT, (1, 1))
        starts = range(0, x_1CFT.shape[-1], self.piece)
        heard = (padded_1CFT[..., start : start + self.piece + 2] for start in starts)
        pieces = (functional.leaky_relu_(self.first(piece), LEAK) for piece in heard)
        for layer in self.layers:
            pieces = layer(pieces)
        return torch.cat(list(pieces), -1)


def step_of(limits: tuple[float, float]) -> tuple[float, int]:
    """(step, the level that means zero) of u8 between limits that hold zero."""
    low, high = limits
    step = max((high - low) / LEVELS, 1e-12)
    return step, round(-low / step)


def _require_vnni() -> None:
    if not torch.cpu._is_vnni_supported():
        raise UserError(
            "precision int8: this CPU has no VNNI, without which PyTorch's int8 products saturate: "
            "take the bundle's model.int8.onnx, or fp32"
        )


def read_int8(folder: Path, student: Student, weights_sha256: str) -> Int8Convolutions:
    """The int8 convolutions of a bundle; ``ValueError`` naming what is missing or does not fit."""
    path = folder / INT8_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: int8 is calibrated on real clips: {EXPORT}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            made_of = (file.metadata() or {}).get(MADE_OF)
        tensors = safetensors.torch.load_file(path)
        layers = [_layer(tensors, n) for n in range(len(student.config.channels))]
    except (safetensors.SafetensorError, KeyError) as error:
        raise UserError(f"{path}: damaged or of another kind ({error}): {EXPORT}") from error
    if made_of != weights_sha256:
        raise UserError(f"{path}: made of other weights ({made_of}) than those beside it: {EXPORT}")
    try:
        return Int8Convolutions(layers, student)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: does not fit the student beside it ({error})") from error


def _layer(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    parts = PARTS if number else FLOAT_PARTS
    return {part: tensors[f"{number}.{part}"] for part in parts}
