"""Teachers: what gives a clip its pseudo-label.

One interface for all: the pipeline's labeller knows ``Teacher`` and ``load_teacher`` only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.models.features import compressed_spectrum, peak_normalise
from train.models.student import load_v7, mos_of, sha256_of, v7_weights_path

Floats = NDArray[np.float32]
Waves = NDArray[np.float32] | Tensor


class Teacher(Protocol):
    """A loaded model that scores clips of 7.68 s."""

    name: str
    weights_sha256: str

    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        """Scores of a (B, 122880) float32 batch at 16 kHz, within -1 to 1.

        Returns mean opinion scores (B,), 1 to 5, and the logits (B,) before the sigmoid, or
        None for a teacher that has none. ``ValueError`` for another shape or a value that is
        not finite.
        """
        ...


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by the device itself, not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype meant by "fp32", "bf16" or "auto" (bf16 where it is fast) on that device."""
    if precision == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"unknown precision {precision!r}: known are auto, bf16, fp32")
    return torch.bfloat16 if precision == "bf16" else torch.float32


class DistillMosTeacher:
    """The published v7 student as a teacher; its weights come in the ``distillmos`` wheel.

    On a CPU the convolutions take one clip at a time: their maps then stay in the cache and in
    memory that is already mapped (bf16, one Zen 4 core: 124 ms a clip; 139 in a batch of 8), and
    a clip's score does not depend on its neighbours. Weights are converted to bf16 once, and
    laid out channels-last (160 ms a clip otherwise).
    """

    name = "distillmos"

    def __init__(self, device: str = "cpu", precision: str = "auto") -> None:
        self.weights_sha256 = sha256_of(v7_weights_path())
        self.device = torch.device(device)
        self.dtype = resolve_precision(precision, self.device)
        self._network = load_v7().to(self.device, self.dtype)
        self._network.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._chunk = 1 if self.device.type == "cpu" else 16

    @torch.inference_mode()
    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        """See ``Teacher.score``."""
        waves_BT = _checked(waves_BT).to(self.device)
        if not len(waves_BT):
            return np.empty(0, np.float32), np.empty(0, np.float32)
        logits_B = torch.cat([self._logits(chunk) for chunk in torch.split(waves_BT, self._chunk)])
        # The sigmoid in float64: in float32 its last bit depends on a clip's place in the batch.
        return mos_of(logits_B.double()).float().cpu().numpy(), logits_B.cpu().numpy()

    def _logits(self, waves_BT: Tensor) -> Tensor:
        spectrum_B2FT = compressed_spectrum(peak_normalise(waves_BT)).to(self.dtype)
        logits_B: Tensor = self._network.head(self._network.tokens(spectrum_B2FT))
        return logits_B.float()


class DnsMosTeacher:
    """DNSMOS P.835 (overall quality) as the ``speechmos`` package runs it; CPU, no logit.

    The clip is repeated to at least 9.01 s and scored in windows of 9.01 s, 1 s apart; the
    windows' mean is the score. ``speechmos`` itself also computes the P.808 model, which is
    left out here: the overall score is the same for half of the work.
    """

    name = "dnsmos"
    WINDOW_SECONDS = 9.01
    POLYNOMIAL = (-0.06766283, 1.11546468, 0.04602535)
    """Raw network output to overall MOS (``speechmos.dnsmos``, not personalised)."""

    def __init__(self, device: str = "cpu", precision: str = "auto") -> None:
        if precision not in ("auto", "fp32"):
            raise ValueError(f"teacher 'dnsmos' runs in fp32 only, not {precision!r}")
        if torch.device(device).type != "cpu":
            raise ValueError(f"teacher 'dnsmos' runs on the CPU only, not on {device!r}")
        path = _dnsmos_weights_path()
        self.weights_sha256 = sha256_of(path)
        self._session = _onnx_session(path)

    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        """See ``Teacher.score``."""
        waves = _checked(waves_BT).numpy(force=True)
        return np.array([self._score_one(wave_T) for wave_T in waves], np.float32), None

    def _score_one(self, wave_T: Floats) -> float:
        window = int(self.WINDOW_SECONDS * SAMPLE_RATE)
        while len(wave_T) < window:
            wave_T = np.concatenate([wave_T, wave_T])
        hops = int(len(wave_T) // SAMPLE_RATE - self.WINDOW_SECONDS) + 1
        starts = (hop * SAMPLE_RATE for hop in range(hops))
        raw = [
            self._session.run(None, {"input_1": wave_T[None, start : start + window]})[0][0][2]
            for start in starts
        ]
        return float(np.clip(np.mean(np.polyval(self.POLYNOMIAL, raw)), 1, 5))


def _checked(waves_BT: Waves) -> Tensor:
    """The batch as a float32 tensor; ``ValueError`` for a wrong shape or non-finite values."""
    waves = torch.as_tensor(waves_BT, dtype=torch.float32)
    if waves.ndim != 2 or waves.shape[1] != CROP_SAMPLES:
        raise ValueError(f"waves of shape {tuple(waves.shape)}: need (B, {CROP_SAMPLES})")
    bad = torch.nonzero(~torch.isfinite(waves).all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(f"waves {bad} of the batch hold values that are not finite")
    return waves


def _dnsmos_weights_path() -> Path:
    spec = importlib.util.find_spec("speechmos")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("teacher 'dnsmos' needs a package that is missing: pip install speechmos")
    path = Path(spec.submodule_search_locations[0]) / "dnsmos_models" / "sig_bak_ovr.onnx"
    if not path.is_file():
        raise ValueError(f"{path} is missing: pip install --force-reinstall speechmos")
    return path


def _onnx_session(path: Path) -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError(
            "teacher 'dnsmos' needs a package that is missing: pip install onnxruntime"
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


TEACHERS: dict[str, Callable[[str, str], Teacher]] = {
    "distillmos": DistillMosTeacher,
    "dnsmos": DnsMosTeacher,
}


def load_teacher(name: str, device: str = "cpu", precision: str = "auto") -> Teacher:
    """Load a teacher by name.

    ``precision`` is "fp32", "bf16" or "auto": bf16 on CUDA and on CPUs with bf16 instructions,
    else fp32. ``ValueError`` for an unknown name, a missing package, or what it cannot run on.
    """
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}: known are {', '.join(sorted(TEACHERS))}")
    return TEACHERS[name](device, precision)
