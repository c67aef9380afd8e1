"""Waveform to the published network's compressed complex spectrum, or to log-mels."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE

Floats = NDArray[np.float32]
Waves = Floats | Tensor

WINDOW_SAMPLES = 320
"""20 ms at 16 kHz (section IV-B)."""

HOP_SAMPLES = 160
"""10 ms at 16 kHz (section IV-B)."""

FREQUENCIES = WINDOW_SAMPLES // 2 + 1
"""161 bins of 50 Hz."""

COMPRESSION = 0.3
"""Exponent of the magnitude; the phase is kept (section IV-B)."""

PEAK_FLOOR = 1e-8
"""Added to the peak, so that silence stays silence."""

MAGNITUDE_FLOOR = 1e-12


def checked_waves(waves_BT: Waves) -> Tensor:
    """A batch of clips of 7.68 s as float32; ``ValueError`` for a wrong shape or value."""
    waves = torch.as_tensor(waves_BT, dtype=torch.float32)
    if waves.ndim != 2 or waves.shape[1] != CROP_SAMPLES:
        raise ValueError(f"waves of shape {tuple(waves.shape)}: need (B, {CROP_SAMPLES})")
    bad = torch.nonzero(~torch.isfinite(waves).all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(f"waves {bad} of the batch hold values that are not finite")
    return waves


def peak_normalise(waves_BT: Tensor) -> Tensor:
    """Divide each wave of a (B, T) batch by its largest absolute value (+1e-8); float32."""
    waves_BT = waves_BT.float()
    peaks_B1 = waves_BT.abs().amax(dim=1, keepdim=True)
    return waves_BT / (peaks_B1 + PEAK_FLOOR)


def frames(samples: int) -> int:
    """Frames that ``compressed_spectrum`` makes of a wave of that many samples."""
    return samples // HOP_SAMPLES


def compressed_spectrum(waves_BT: Tensor) -> Tensor:
    """Short-time spectrum with magnitude^0.3 and the phase kept.

    ``waves_BT`` is a (B, T) batch at 16 kHz; the answer is float32 (B, 2, 161, F): real and
    imaginary part, frequency, frame. It is always computed in float32, under autocast too: the
    compression lifts the quietest bins by many decades, and with them any rounding.

    The published code (``distillmos.sqa._complex_compressed``) divides by the magnitude and
    multiplies with its power in two steps over pairs of numbers; one real gain a bin, a power of
    the squared magnitude, is the same to 3e-6 (float32's half unit of a logarithm of up to 80).
    """
    with torch.autocast(waves_BT.device.type, enabled=False):
        edge = (WINDOW_SAMPLES - HOP_SAMPLES) // 2
        padded_BT = functional.pad(waves_BT.float(), (edge, edge), mode="reflect")
        spectrum_BFT = torch.stft(
            padded_BT,
            n_fft=WINDOW_SAMPLES,
            hop_length=HOP_SAMPLES,
            win_length=WINDOW_SAMPLES,
            center=False,
            return_complex=True,
            window=torch.hann_window(WINDOW_SAMPLES, device=waves_BT.device),
        ).contiguous()  # so that the answer is channels-last, as the convolutions want it
        # Written out: PyTorch's abs and pow of so many values take twice as long.
        real_BFT, imaginary_BFT = torch.view_as_real(spectrum_BFT).unbind(-1)
        power_BFT = torch.addcmul(real_BFT * real_BFT, imaginary_BFT, imaginary_BFT)
        power_BFT = power_BFT.clamp_min_(MAGNITUDE_FLOOR**2)
        gain_BFT = power_BFT.log2_().mul_((COMPRESSION - 1) / 2).exp2_()
        return torch.view_as_real(spectrum_BFT * gain_BFT).permute(0, 3, 1, 2)


MEL_FFT, MEL_WINDOW = 512, 400
"""Samples of a frame of log-mels, and of the Hann window in its middle (25 ms, as Whisper has)."""

MEL_FLOOR = 1e-6
"""Added to the power in a mel band: above what rounding to 16 bits makes, below a quiet room."""


@cache
def _mel_bank(mels: int) -> Tensor:
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(
        MEL_FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, mels, SAMPLE_RATE, mel_scale="slaney"
    )


def log_mels(waves_BT: Tensor, mels: int = 80) -> Tensor:
    """Natural logarithms of mel powers, float32 (B, T // 160, mels), of waves at 16 kHz.

    Frame k ends with sample 160 (k + 1): it knows of nothing behind it. Nothing is normalised.
    """
    with torch.autocast(waves_BT.device.type, enabled=False):
        spectrum_BKF = torch.stft(
            functional.pad(waves_BT.float(), (MEL_FFT - HOP_SAMPLES, 0)),
            n_fft=MEL_FFT,
            hop_length=HOP_SAMPLES,
            win_length=MEL_WINDOW,
            window=torch.hann_window(MEL_WINDOW, device=waves_BT.device),
            center=False,
            return_complex=True,
        )
        power_BFK = torch.view_as_real(spectrum_BKF).square().sum(-1).transpose(1, 2)
        return (power_BFK @ _mel_bank(mels).to(waves_BT.device) + MEL_FLOOR).log()
