"""DNSMOS as a teacher: overall quality on the scale of ITU-T P.835 or of P.808."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.io.onnx_session import cpu_session
from data_specs.sample import SAMPLE_RATE
from data_specs.teacher import DnsMos
from train.models.calibration import Calibration
from train.models.features import Floats, Waves, checked_waves
from train.models.tensors import in_package

FILES = {"p835": "sig_bak_ovr.onnx", "p808": "model_v8.onnx"}


class DnsMosTeacher:
    """DNSMOS as the ``speechmos`` package runs it; CPU, no logit.

    The clip is repeated to at least 9.01 s and scored in windows of 9.01 s, 1 s apart; the
    windows' mean is the score. The package always computes both scales; here it is one.
    """

    calibration: Calibration | None = None
    WINDOW_SECONDS = 9.01
    POLYNOMIAL = (-0.06766283, 1.11546468, 0.04602535)
    """P.835's raw output to overall MOS (``speechmos.dnsmos``, not personalised)."""

    def __init__(
        self, spec: DnsMos, name: str, device: str = "cpu", precision: str = "auto"
    ) -> None:
        require_cpu(name, device, precision)
        path = weights_path(spec, name)
        self.name, self.weights_sha256 = name, sha256_of(path)
        self._session = cpu_session(path, torch.get_num_threads())
        self._rate = self._p808 if spec.scale == "p808" else self._p835

    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        waves = checked_waves(waves_BT).numpy(force=True)
        return np.array([self._score_one(wave_T) for wave_T in waves], np.float32), None

    def _score_one(self, wave_T: Floats) -> float:
        window = int(self.WINDOW_SECONDS * SAMPLE_RATE)
        while len(wave_T) < window:
            wave_T = np.concatenate([wave_T, wave_T])
        hops = int(len(wave_T) // SAMPLE_RATE - self.WINDOW_SECONDS) + 1
        starts = (hop * SAMPLE_RATE for hop in range(hops))
        scores = [self._rate(wave_T[start : start + window]) for start in starts]
        return float(np.clip(np.mean(scores), 1, 5))

    def _p835(self, wave_T: Floats) -> float:
        raw = self._session.run(None, {"input_1": wave_T[None]})[0][0][2]
        return float(np.polyval(self.POLYNOMIAL, raw))

    def _p808(self, wave_T: Floats) -> float:
        """From 120 mel bands every 10 ms, in dB below the loudest (``speechmos.dnsmos``)."""
        import librosa

        mels_MN = librosa.feature.melspectrogram(
            y=wave_T[: -SAMPLE_RATE // 100], sr=SAMPLE_RATE, n_fft=321, hop_length=160, n_mels=120
        )
        levels_MN = (librosa.power_to_db(mels_MN, ref=np.max) + 40) / 40
        inputs = {"input_1": levels_MN.T[None].astype(np.float32)}
        return float(self._session.run(None, inputs)[0][0][0])


def require_cpu(name: str, device: str, precision: str) -> None:
    """Raise ``ValueError`` for what DNSMOS does not run on, or in."""
    if precision not in ("auto", "fp32"):
        raise UserError(f"teacher {name!r} runs in fp32 only, not {precision!r}")
    if torch.device(device).type != "cpu":
        raise UserError(f"teacher {name!r} runs on the CPU only, not on {device!r}")


def weights_path(spec: DnsMos, name: str) -> Path:
    """The network's file in the installed package. ``ValueError`` saying what to install."""
    user, file = f"teacher {name!r}", FILES[spec.scale]
    for package in ("onnxruntime", *(["librosa"] if spec.scale == "p808" else [])):
        in_package(package, "__init__.py", user)
    return in_package("speechmos", f"dnsmos_models/{file}", user)
