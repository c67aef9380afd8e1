"""Log-mel spectra as Whisper has them, and the encoder that is nothing more: the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.models.encoders.interface import SpeechEncoder, States

WINDOW, HOP = 400, 160
"""25 and 10 ms at 16 kHz (openai/whisper, ``audio.py``)."""

RANGE = 8.0
"""Of a clip's loudest band, in powers of ten: what is below is raised to it."""


class LogMel(nn.Module):
    """(B, T) waves -> (B, M, T / 160) log-mels, about -1 to 1, as Whisper's feature extractor.

    A clip's frames do not depend on what it is padded with: there its own silence goes on.
    """

    filters_MK: Tensor

    def __init__(self, bands: int = 80) -> None:
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        options: dict[str, Any] = {"norm": "slaney", "mel_scale": "slaney"}
        filters_KM = mel_filter_bank(WINDOW // 2 + 1, bands, 0.0, 8000.0, 16_000, **options)
        filters_MK = torch.from_numpy(filters_KM.T).float().contiguous()
        self.register_buffer("filters_MK", filters_MK, persistent=False)

    def forward(self, waves_BT: Tensor) -> Tensor:
        with torch.autocast(waves_BT.device.type, enabled=False):
            padded_BT = functional.pad(waves_BT.float(), (WINDOW // 2, WINDOW // 2), "reflect")
            window = torch.hann_window(WINDOW, device=waves_BT.device)
            options: dict[str, Any] = {"window": window, "center": False, "return_complex": True}
            spectrum_BKF = torch.stft(padded_BT, WINDOW, HOP, **options)[..., :-1]
            power_BKF = torch.view_as_real(spectrum_BKF).square().sum(-1)
            mel_BMF = (self.filters_MK @ power_BKF).clamp_min(1e-10).log10()
            loudest_B11 = mel_BMF.amax(dim=(1, 2), keepdim=True)
            floored: Tensor = (torch.maximum(mel_BMF, loudest_B11 - RANGE) + 4) / 4
            return floored


def silence_after(waves_BT: Tensor, step: int) -> Tensor:
    """The waves with zeros after them: to a multiple of ``step`` samples, and a window more."""
    samples = waves_BT.shape[1]
    return functional.pad(waves_BT, (0, -samples % step + -(-WINDOW // step) * step))


class MelEncoder(SpeechEncoder):
    """Log-mels every 10 ms and no layer above them."""

    kind = "log-mel"
    frame_s = 0.01

    def __init__(self, bands: int = 80) -> None:
        super().__init__()
        self.mel, self.dims = LogMel(bands), (bands,)

    @classmethod
    def build(cls, about: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> Self:
        """See ``SpeechEncoder``; there are no weights."""
        return cls(int(about["bands"]))

    def about(self) -> dict[str, Any]:
        return {"bands": self.dims[0]}

    def forward(self, waves_BT: Tensor, lengths_B: Tensor) -> States:
        frames = -(-waves_BT.shape[1] // HOP)
        mel_BMF = self.mel(silence_after(waves_BT, HOP))[..., :frames]
        return States((mel_BMF.transpose(1, 2),), -(-lengths_B // HOP))
