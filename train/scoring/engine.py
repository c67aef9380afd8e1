"""A student's network as scoring runs it: nothing is computed twice, in any precision.

The same network as ``train.models.student.Student``, with

- the two batch norms before the projection, and the one after the encoder, folded into it;
- the zeros behind a short clip computed once for all clips: what the convolutions make of silence
  is the same everywhere, so only the part that the clip reaches is computed (same up to rounding);
- convolutions over a stretch of audio shared by the windows in it (``shared``; not exact: the
  windows share one level, start on a grid, and read at their edges what is there, not zeros).

On a CPU clips go through the convolutions one by one: a clip's activations stay in the cache, and
memory is flat.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

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
from train.models.folded import FoldedHead
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

    def __init__(self, student: Student, dtype: torch.dtype, device: torch.device) -> None:
        self.device, self.dtype = device, dtype
        strides = [stride for _, stride in student.config.strides]
        self.stride = math.prod(strides)
        self.reach = sum(math.prod(strides[:layer]) for layer in range(len(strides)))
        """Frames that a token reads to each side of its own."""
        self.length = student.config.tokens
        self.convolutions = copy.deepcopy(student.convolutions).to(device, dtype)
        self.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # On a CPU plain products are faster in bf16: 1.5 ms a layer and clip, fused 2.6.
        fused = device.type != "cpu" or dtype != torch.bfloat16
        self.head = FoldedHead(student.head, dtype, device, fused)
        self.silence_1LD: Tensor | None = None

    @property
    def grid_samples(self) -> int:
        """Windows that share convolutions start on multiples of this: one token."""
        return self.stride * HOP_SAMPLES

    @torch.inference_mode()
    def scores(self, waves: Sequence[Wave]) -> list[float]:
        """Scores of clips of up to 122880 samples at 16 kHz; zeros are behind short ones."""
        tokens: dict[int, Tensor] = {}
        for frame_count, indices in self._alike(waves):
            batch_BT = _stacked([waves[index] for index in indices], frame_count * HOP_SAMPLES)
            tokens |= zip(indices, self._tokens_of(batch_BT, frame_count).split(1), strict=True)
        return self._mos([tokens[index] for index in range(len(waves))])

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
        """Indices of waves that can go together, and the frames to compute for them."""
        by_frames: dict[int, list[int]] = {}
        for index, wave_T in enumerate(waves):
            by_frames.setdefault(self.frames_needed(len(wave_T)), []).append(index)
        for frame_count, indices in by_frames.items():
            for start in range(0, len(indices), self._together()):
                yield frame_count, indices[start : start + self._together()]

    def frames_needed(self, samples: int) -> int:
        """Frames to compute for a clip of that many samples; those after them read zeros only.

        ``ValueError`` for more than a window.
        """
        if samples > CROP_SAMPLES:
            raise ValueError(f"a window of {samples} samples: at most {CROP_SAMPLES}")
        sounding = math.ceil((samples + (WINDOW_SAMPLES - HOP_SAMPLES) / 2) / HOP_SAMPLES)
        first_silent = math.ceil((sounding + self.reach) / self.stride)
        needed = first_silent * self.stride + self.reach
        return min(CROP_FRAMES, math.ceil(needed / FRAME_BUCKET) * FRAME_BUCKET)

    def _tokens_of(self, waves_BT: Tensor, frame_count: int) -> Tensor:
        """Projected tokens (B, L, D) of clips that need that many frames."""
        normal_BT = peak_normalise(waves_BT.to(self.device))
        tokens_BLD = self._tokens(compressed_spectrum(normal_BT))
        if frame_count < CROP_FRAMES:
            whole = (frame_count - self.reach) // self.stride  # the rest read the early end
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
        packed = spectrum_B2FT.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.head.project(self.convolutions(packed))

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
