"""DNSMOS P.835 as a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.sample import SAMPLE_RATE
from train.models.calibration import Calibration
from train.models.features import Floats, Waves, checked_waves
from train.models.tensors import in_package


class DnsMosTeacher:
    """DNSMOS P.835 (overall quality) as the ``speechmos`` package runs it; CPU, no logit.

    The clip is repeated to at least 9.01 s and scored in windows of 9.01 s, 1 s apart; the
    windows' mean is the score. ``speechmos`` itself also computes the P.808 model, which is
    left out here: the overall score is the same for half of the work.
    """

    name = "dnsmos"
    calibration: Calibration | None = None
    WINDOW_SECONDS = 9.01
    POLYNOMIAL = (-0.06766283, 1.11546468, 0.04602535)
    """Raw network output to overall MOS (``speechmos.dnsmos``, not personalised)."""

    def __init__(self, device: str = "cpu", precision: str = "auto") -> None:
        require_cpu(device, precision)
        path = weights_path()
        self.weights_sha256 = sha256_of(path)
        self._session = _onnx_session(path)

    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        """See ``Teacher.score``."""
        waves = checked_waves(waves_BT).numpy(force=True)
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


def require_cpu(device: str, precision: str) -> None:
    """Raise ``ValueError`` for what DNSMOS does not run on, or in."""
    if precision not in ("auto", "fp32"):
        raise UserError(f"teacher 'dnsmos' runs in fp32 only, not {precision!r}")
    if torch.device(device).type != "cpu":
        raise UserError(f"teacher 'dnsmos' runs on the CPU only, not on {device!r}")


def weights_path() -> Path:
    """The network's file in the installed package. ``ValueError`` saying what to install."""
    user = "teacher 'dnsmos'"
    in_package("onnxruntime", "__init__.py", user)
    return in_package("speechmos", "dnsmos_models/sig_bak_ovr.onnx", user)


def _onnx_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
