"""A student's network as scoring runs it: nothing is computed twice, in any precision.

The same network as ``train.models.student.Student``, with

- the two batch norms before the projection, and the one after the encoder, folded into it;
- the zeros behind a short clip computed once for all clips: what the convolutions make of silence
  is the same everywhere, so only the part that hears the clip is computed (same up to rounding);
- convolutions over a stretch of audio shared by the windows in it (``shared``; not exact: the
  windows share one level, start on a grid, and hear at their edges what is there, not zeros).

On a CPU clips go through the convolutions one by one: a clip's activations stay in the cache, and
memory is flat.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_specs.sample import CROP_SAMPLES
from train.audio import Wave
from train.models.features import (
    FREQUENCIES,
    HOP_SAMPLES,
    PEAK_FLOOR,
    WINDOW_SAMPLES,
    compressed_spectrum,
    frames,
    peak_normalise,
)
from train.models.head import TransformerHead
from train.models.student import Student, mos_of

CROP_FRAMES = frames(CROP_SAMPLES)

FRAME_BUCKET = 64
"""Short clips are computed to a multiple of this many frames, so that few shapes occur."""

CHUNK_FRAMES = CROP_FRAMES
"""Frames that shared convolutions take at a time."""

HEAD_CLIPS = 8
"""Clips whose tokens the head takes together (one Zen 4 core, bf16: 28 ms a clip; alone 33)."""

THREADS_A_CLIP = 4
"""CPU threads that one clip keeps busy; with more of them several clips go together."""


class Engine:
    """Scores of clips by one student's weights as they were when this was made."""

    def __init__(
        self,
        student: Student,
        dtype: torch.dtype,
        device: torch.device,
        convolutions: nn.Module | None = None,
    ) -> None:
        """``convolutions``: what takes the place of the student's own, in float32 or below."""
        self.device, self.dtype = device, dtype
        strides = [stride for _, stride in student.config.strides]
        self.stride = math.prod(strides)
        self.reach = sum(math.prod(strides[:layer]) for layer in range(len(strides)))
        """Frames that a token hears to each side of its own."""
        self.length = student.config.tokens
        self.input_dtype = dtype if convolutions is None else torch.float32
        self.convolutions = convolutions or copy.deepcopy(student.convolutions).to(device, dtype)
        self.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = _Head(student.head, dtype, device)
        self.silence_1LD: Tensor | None = None

    @property
    def grid_samples(self) -> int:
        """Windows that share convolutions start on multiples of this: one token."""
        return self.stride * HOP_SAMPLES

    @torch.inference_mode()
    def scores(self, waves: Sequence[Wave]) -> list[float]:
        """Scores of clips of up to 122880 samples at 16 kHz; zeros are heard behind short ones."""
        tokens: dict[int, Tensor] = {}
        for frame_count, places in self._alike(waves):
            batch_BT = _stacked([waves[place] for place in places], frame_count * HOP_SAMPLES)
            tokens |= zip(places, self._heard(batch_BT, frame_count).split(1), strict=True)
        return self._mos([tokens[place] for place in range(len(waves))])

    @torch.inference_mode()
    def shared(self, wave_T: Wave, offsets: Sequence[int], peak: float) -> list[float]:
        """Scores of the windows that start at ``offsets`` (on the grid) of a stretch (T,)."""
        waves_1T = torch.from_numpy(wave_T)[None].to(self.device) / (peak + PEAK_FLOOR)
        tokens_1LD = self._tokens_in_chunks(compressed_spectrum(waves_1T))
        firsts = [offset // self.grid_samples for offset in offsets]
        return self._mos([tokens_1LD[:, first : first + self.length] for first in firsts])

    def _mos(self, tokens: Sequence[Tensor]) -> list[float]:
        """Scores of windows' projected tokens, (1, L, D) each."""
        scores: list[float] = []
        for start in range(0, len(tokens), HEAD_CLIPS):
            batch_BLD = torch.cat(list(tokens[start : start + HEAD_CLIPS]))
            scores += mos_of(self.head(batch_BLD)).tolist()
        return scores

    def _together(self) -> int:
        if self.device.type != "cpu":
            return 64
        return max(1, torch.get_num_threads() // THREADS_A_CLIP)

    def _alike(self, waves: Sequence[Wave]) -> Iterator[tuple[int, list[int]]]:
        """Places of waves that can go together, and the frames to compute for them."""
        by_frames: dict[int, list[int]] = {}
        for place, wave_T in enumerate(waves):
            by_frames.setdefault(self.frames_heard(len(wave_T)), []).append(place)
        for frame_count, places in by_frames.items():
            for start in range(0, len(places), self._together()):
                yield frame_count, places[start : start + self._together()]

    def frames_heard(self, samples: int) -> int:
        """Frames to compute for a clip of that many samples; those after them hear zeros only.

        ``ValueError`` for more than a window.
        """
        if samples > CROP_SAMPLES:
            raise ValueError(f"a window of {samples} samples: at most {CROP_SAMPLES}")
        heard = math.ceil((samples + (WINDOW_SAMPLES - HOP_SAMPLES) / 2) / HOP_SAMPLES)
        first_silent = math.ceil((heard + self.reach) / self.stride)
        needed = first_silent * self.stride + self.reach
        return min(CROP_FRAMES, math.ceil(needed / FRAME_BUCKET) * FRAME_BUCKET)

    def _heard(self, waves_BT: Tensor, frame_count: int) -> Tensor:
        """Projected tokens (B, L, D) of clips that need that many frames."""
        normal_BT = peak_normalise(waves_BT.to(self.device))
        tokens_BLD = self._tokens(compressed_spectrum(normal_BT))
        if frame_count < CROP_FRAMES:
            whole = (frame_count - self.reach) // self.stride  # the rest heard the early end
            rest_1LD = self._silence()[:, whole:].expand(len(waves_BT), -1, -1)
            tokens_BLD = torch.cat([tokens_BLD[:, :whole], rest_1LD], dim=1)
        return tokens_BLD

    def _silence(self) -> Tensor:
        if self.silence_1LD is None:
            nothing = torch.zeros(1, 2, FREQUENCIES, CROP_FRAMES, device=self.device)
            self.silence_1LD = self._tokens(nothing)
        return self.silence_1LD

    def _tokens(self, spectrum_B2FT: Tensor) -> Tensor:
        """Projected tokens (B, L, D) of a spectrum of any length."""
        packed = spectrum_B2FT.to(self.input_dtype).contiguous(memory_format=torch.channels_last)
        maps_BCFT = self.convolutions(packed).to(self.dtype)
        return self.head.project(torch.flatten(maps_BCFT, 1, -2).permute(0, 2, 1))

    def _tokens_in_chunks(self, spectrum_12FT: Tensor) -> Tensor:
        """The same, for a long spectrum: piece by piece, each with what is around it."""
        around = math.ceil(self.reach / self.stride) * self.stride
        chunk = max(1, CHUNK_FRAMES // self.stride) * self.stride
        total, pieces = spectrum_12FT.shape[-1], []
        for first in range(0, total, chunk):
            start, end = max(0, first - around), min(total, first + chunk + around)
            tokens_1LD = self._tokens(spectrum_12FT[..., start:end])
            skipped = (first - start) // self.stride
            pieces.append(tokens_1LD[:, skipped : skipped + chunk // self.stride])
        return torch.cat(pieces, dim=1)


def _stacked(waves: Sequence[Wave], samples: int) -> Tensor:
    batch_BT = np.zeros((len(waves), samples), np.float32)
    for row_T, wave_T in zip(batch_BT, waves, strict=True):
        row_T[: len(wave_T)] = wave_T
    return torch.from_numpy(batch_BT)


@dataclass(frozen=True)
class _Layer:
    """One post-norm encoder layer; linear layers as (weight, bias) in the engine's precision."""

    heads: int
    joint: tuple[Tensor, Tensor]
    """Queries (already divided by the root of the head's width), keys, values."""
    mixed: tuple[Tensor, Tensor]
    wide: tuple[Tensor, Tensor]
    narrow: tuple[Tensor, Tensor]
    norms: tuple[nn.Module, nn.Module]


class _Head:
    """The head of a student: features to tokens, tokens to logits."""

    def __init__(self, head: TransformerHead, dtype: torch.dtype, device: torch.device) -> None:
        head = copy.deepcopy(head).to(device)
        self.dtype, self.device = dtype, device
        self.weight_DC, bias_D = _folded(head, dtype)
        self.start_1LD = head.positions + bias_D
        self.layers = [_layer(layer, dtype) for layer in head.encoder.layers]
        last: Any = head.norm_output
        self.scale_D = last.weight / torch.sqrt(last.running_var + last.eps)
        self.shift_D = last.bias - last.running_mean * self.scale_D
        self.hidden = _linear(head.pool.hidden, dtype)
        self.weigh = _linear(head.pool.weight, dtype)
        self.output = head.pool.output

    def project(self, features_BLC: Tensor) -> Tensor:
        """Tokens (B, L, D), float32, before their positions are added."""
        return functional.linear(features_BLC, self.weight_DC).float()

    def __call__(self, tokens_BLD: Tensor) -> Tensor:
        """Logits (B,) of projected tokens; the stream between the layers is float32."""
        x_BLD = tokens_BLD + self.start_1LD
        for layer in self.layers:
            attended_BLD = functional.linear(self._attend(layer, x_BLD), *layer.mixed)
            x_BLD = layer.norms[0](x_BLD + attended_BLD.float())
            hidden_BLF = functional.relu_(functional.linear(x_BLD.to(self.dtype), *layer.wide))
            x_BLD = layer.norms[1](x_BLD + functional.linear(hidden_BLF, *layer.narrow).float())
        return self._pooled(x_BLD * self.scale_D + self.shift_D)

    def _attend(self, layer: _Layer, x_BLD: Tensor) -> Tensor:
        joint_BLE = functional.linear(x_BLD.to(self.dtype), *layer.joint)
        joint_BL3HK = joint_BLE.unflatten(-1, (3, layer.heads, -1))
        queries, keys, values = joint_BL3HK.permute(2, 0, 3, 1, 4)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            # On a CPU plain products are faster in bf16: 1.5 ms a layer and clip, fused 2.6.
            weights = (queries @ keys.transpose(-1, -2)).softmax(-1)
            mixed_BHLK = weights @ values
        else:
            mixed_BHLK = functional.scaled_dot_product_attention(queries, keys, values, scale=1.0)
        return mixed_BHLK.transpose(1, 2).flatten(2)

    def _pooled(self, x_BLD: Tensor) -> Tensor:
        hidden_BLP = functional.relu_(functional.linear(x_BLD.to(self.dtype), *self.hidden))
        scores_BL1 = functional.linear(hidden_BLP, *self.weigh).float()
        weights_B1L = scores_BL1.transpose(1, 2).softmax(-1)
        logits_B: Tensor = self.output(torch.bmm(weights_B1L, x_BLD).squeeze(1)).squeeze(-1)
        return logits_B


def _linear(layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)


def _folded(head: TransformerHead, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both batch norms and the projection as one weight (D, C) and one float32 bias (D,).

    The features' mean is subtracted through the rounded weight: what rounding does to the large
    mean cancels.
    """
    first: Any = head.norm_input
    second: Any = head.norm_projection
    gains = [norm.weight / torch.sqrt(norm.running_var + norm.eps) for norm in (first, second)]
    after_C = gains[1] * (first.bias - second.running_mean) + second.bias
    weight_DC = (head.projection.weight * (gains[0] * gains[1])).detach().to(dtype)
    bias_D = head.projection.bias + head.projection.weight @ after_C
    return weight_DC, (bias_D - weight_DC.float() @ first.running_mean).detach()


def _layer(layer: Any, dtype: torch.dtype) -> _Layer:
    attention = layer.self_attn
    heads = int(attention.num_heads)
    joint_ED, joint_E = attention.in_proj_weight.detach(), attention.in_proj_bias.detach()
    inner = len(joint_E) // 3
    scale_E = torch.ones_like(joint_E)
    scale_E[:inner] = (inner // heads) ** -0.5
    return _Layer(
        heads,
        ((joint_ED * scale_E[:, None]).to(dtype), (joint_E * scale_E).to(dtype)),
        _linear(attention.out_proj, dtype),
        _linear(layer.linear1, dtype),
        _linear(layer.linear2, dtype),
        (layer.norm1, layer.norm2),
    )
