"""What every encoder of speech is: waves and lengths to the states of its layers and lengths."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_specs.io.errors import UserError
from data_specs.io.waves import Resampler
from data_specs.sample import SAMPLE_RATE


class States(NamedTuple):
    """States of an encoder's layers, each (B, F, D), and how many of the frames F are a clip's.

    Layer 0 is what the first Transformer layer hears. Frames behind a clip hold anything.
    """

    layers: tuple[Tensor, ...]
    lengths_B: Tensor

    def valid(self) -> Tensor:
        """(B, F) bool: True for the frames of each clip."""
        return valid_frames(self.lengths_B, self.layers[0].shape[1])


def valid_frames(lengths_B: Tensor, frames: int) -> Tensor:
    """(B, F) bool: True below each length."""
    return torch.arange(frames, device=lengths_B.device) < lengths_B[:, None]


class SpeechEncoder(nn.Module, ABC):
    """(B, T) waves at 16 kHz and lengths (B,) in samples -> ``States`` of all layers.

    ``dims`` are the widths of the states, ``frame_s`` the seconds from one frame to the next,
    ``longest_s`` the seconds it can hear, ``resampler`` how recordings come to 16 kHz,
    ``counted_s`` the seconds over which its multiply-adds are counted (attention's grow with
    them). What lies behind a clip's length is zero. ``about`` is what ``build`` needs to make it
    again: plain values, no code.
    """

    kind: ClassVar[str]
    rate: ClassVar[int] = SAMPLE_RATE
    frame_s: float = 0.02
    longest_s: float = 120.0
    counted_s: float = 2.0
    resampler: Resampler = "soft"
    dims: tuple[int, ...]

    @classmethod
    @abstractmethod
    def build(cls, about: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> Self:
        """The encoder that ``about`` describes, with these weights or fresh ones."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What ``build`` needs, as JSON."""

    @abstractmethod
    def forward(self, waves_BT: Tensor, lengths_B: Tensor) -> States:
        """See ``States``."""

    def streaming(self, chunk_ms: int) -> Self:
        """The same weights, whose states hear nothing behind their own chunk.

        ``UserError`` where an encoder hears all at once.
        """
        raise UserError(
            f"--chunk-ms: a {self.kind} encoder hears all of a clip; a conformer streams"
        )

    def fresh(self) -> Self:
        """One of the same shape with fresh weights, drawn by torch's global generator."""
        return self.build(self.about())

    def sizes(self) -> dict[str, int]:
        """Parameters, and multiply-adds a second of audio (products of matrices, convolutions)."""
        seconds = min(self.counted_s, self.longest_s)
        samples = int(seconds * self.rate)
        with _plain_attention(), FlopCounterMode(display=False) as counted, torch.no_grad():
            self(torch.zeros(1, samples), torch.tensor([samples]))
        return {
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "macs_per_second": int(counted.get_total_flops() / 2 / seconds),
        }


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused kernels and layers, which are not counted on a CPU."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def weights_sha256(encoder: SpeechEncoder) -> str:
    """Of all tensors, by name."""
    state = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()
