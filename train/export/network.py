"""A student as a graph of plain operations, for ONNX: the same numbers, nothing complex.

What differs from ``train.models.student.Student``: the short-time spectrum is a convolution with
the windowed sines and cosines, and the head is that of scoring (``train.models.folded``), with
attention as plain products: PyTorch's fused layers have no ONNX form.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.models.features import (
    COMPRESSION,
    FREQUENCIES,
    HOP_SAMPLES,
    MAGNITUDE_FLOOR,
    PEAK_FLOOR,
    WINDOW_SAMPLES,
)
from train.models.folded import FoldedHead
from train.models.student import Student, mos_of

EDGE_SAMPLES = (WINDOW_SAMPLES - HOP_SAMPLES) // 2


def one_turn() -> Tensor:
    """(320, 2) in float64: cosine and negative sine over one turn."""
    turns_T = torch.arange(WINDOW_SAMPLES, dtype=torch.float64) / WINDOW_SAMPLES
    phase_T = 2 * math.pi * turns_T
    turn_T2 = torch.stack((phase_T.cos(), -phase_T.sin()), dim=1)
    turn_T2[turn_T2.abs() < 1e-12] = 0  # cosines of quarter turns, the sine of half a turn
    return turn_T2


def fourier_kernels() -> Tensor:
    """(322, 1, 320): 161 windowed cosines, then 161 windowed negative sines, as convolutions."""
    places_FT = torch.outer(torch.arange(FREQUENCIES), torch.arange(WINDOW_SAMPLES))
    turns_2FT = one_turn()[places_FT % WINDOW_SAMPLES].permute(2, 0, 1)
    window_T = torch.hann_window(WINDOW_SAMPLES).double()  # the model's own, with its rounding
    return (turns_2FT * window_T).float().reshape(-1, 1, WINDOW_SAMPLES)


class PlainSpectrum(nn.Module):
    """``compressed_spectrum(peak_normalise(waves))`` in real numbers: (B, T) -> (B, 2, 161, F)."""

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernels", fourier_kernels())

    def forward(self, waves_BT: Tensor) -> Tensor:
        peaks_B1 = waves_BT.abs().amax(dim=1, keepdim=True)
        waves_B1T = (waves_BT / (peaks_B1 + PEAK_FLOOR)).unsqueeze(1)
        padded_B1T = functional.pad(waves_B1T, (EDGE_SAMPLES, EDGE_SAMPLES), mode="reflect")
        parts_BCF = functional.conv1d(padded_B1T, self.kernels, stride=HOP_SAMPLES)
        parts_B2FT = parts_BCF.unflatten(1, (2, FREQUENCIES))
        real_B1FT, imaginary_B1FT = parts_B2FT.split(1, dim=1)
        power_B1FT = real_B1FT * real_B1FT + imaginary_B1FT * imaginary_B1FT
        # By exp and log: onnxruntime's Pow takes several times as long.
        logarithm_B1FT = power_B1FT.clamp_min(MAGNITUDE_FLOOR**2).log()
        return parts_B2FT * (logarithm_B1FT * ((COMPRESSION - 1) / 2)).exp()


class PlainStudent(nn.Module):
    """A student for export: waves (B, 122880) to mean opinion scores (B,)."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.spectrum = PlainSpectrum()
        self.convolutions = copy.deepcopy(student.convolutions)
        self.head = FoldedHead(student.head, torch.float32, torch.device("cpu"), fused=False)

    def forward(self, waves_BT: Tensor) -> Tensor:
        tokens_BLD = self.head.project(self.convolutions(self.spectrum(waves_BT)))
        return mos_of(self.head(tokens_BLD))
