"""DeepFilterNet3 at 48 kHz: network and STFT of the ``deepfilternet`` package, on the CPU.

The package's ``init_df`` and ``enhance`` are not called. They replace the process's loguru
handlers, write a log beside the weights, download unasked, end the process where a checkpoint is
missing and only warn where a weight is; and an environment variable named like one of some hundred
options (DEVICE, MODEL, SR) changes the network. What they compute is done here from their parts.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from data_specs.io.errors import UserError
from data_specs.io.hardware import keep_freed_memory
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import resample
from pipeline.render.processors.interface import Params, Processor, Waves
from pipeline.render.processors.networks import batches, building, load_weights, read_checkpoint
from train.models import weights

RATE_HZ = 48_000
FOLDER_VARIABLE = "DEEPFILTERNET3_DIR"
WEIGHTS = "deepfilternet3"
BATCH = 8
"""7.68 s in batches of 1, 4 and 8 take one core 0.22, 0.16 and 0.14 s each, if memory is kept."""

INSTALL = "pip install --no-deps deepfilternet deepfilterlib loguru appdirs"
"""Without its dependencies: the package's own upper bounds would take numpy back to 1.x."""


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Denoise each wave at 48 kHz and come back to 16 kHz."""
    return resample(enhance(resample(waves_BT, SAMPLE_RATE, RATE_HZ)), RATE_HZ, SAMPLE_RATE)


def enhance(waves_BT: Waves) -> Waves:
    """Denoise waves at 48 kHz: what the package's ``enhance`` gives with ``pad=True``."""
    keep_freed_memory()
    network = _network(weights_folder())
    parts = batches(len(waves_BT), BATCH, BATCH)
    return np.concatenate([network.run(waves_BT[part]) for part in parts])


@dataclass(frozen=True)
class Network:
    """The loaded network, its STFT (``libdf.DF``) and what its features need."""

    model: Any
    stft: Any
    norm_alpha: float

    def run(self, waves_BT: Waves) -> Waves:
        import torch

        window, hop = self.stft.fft_size(), self.stft.hop_size()
        length, delay = waves_BT.shape[1], window - hop  # of analysis and synthesis, which stream
        padded = np.pad(waves_BT, ((0, 0), (0, window)))
        with torch.inference_mode():
            spectra_B1NF2 = self.model(*self._features(padded))[0]
        spectra_BNF = torch.view_as_complex(spectra_B1NF2.squeeze(1).contiguous()).numpy()
        out: Waves = self.stft.synthesis(spectra_BNF)[:, delay : delay + length]
        return out

    def _features(self, waves_BT: Waves) -> list[Any]:
        """The network's inputs: spectra, ERB bands in dB, low bins; the last two normalised."""
        import libdf
        import torch

        spectra_BNF = self.stft.analysis(waves_BT)
        bands_BNE = libdf.erb(spectra_BNF, self.stft.erb_widths())
        low_BNF = libdf.unit_norm(spectra_BNF[..., : self.model.nb_df], self.norm_alpha)
        inputs = (spectra_BNF, libdf.erb_norm(bands_BNE, self.norm_alpha), low_BNF)
        tensors = [torch.from_numpy(array).unsqueeze(1) for array in inputs]
        return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def weights_folder() -> Path:
    """Where the weights are: ``$DEEPFILTERNET3_DIR``, else our cache, else the package's own.

    Raises ``FileNotFoundError`` saying what to set or to run; nothing is downloaded.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    try:
        folder = Path(given) if given else weights.find(WEIGHTS) / "DeepFilterNet3"
    except FileNotFoundError:
        folder = _package_folder()
    if not (folder / "config.ini").is_file() or not _checkpoints(folder):
        raise FileNotFoundError(
            f"no DeepFilterNet3 weights (config.ini, checkpoints/model_*.ckpt.best) in {folder}"
            + ("" if given else f", and not all in {weights.cache_folder() / WEIGHTS}")
            + f": run make weights NAMES={WEIGHTS}, or set {FOLDER_VARIABLE} to their folder"
        )
    return folder


def _package_folder() -> Path:
    _import_package()
    from df.utils import get_cache_dir  # type: ignore[import-untyped]

    return Path(get_cache_dir()) / "DeepFilterNet3"


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints, the package's choice last: the best ones if any, by epoch."""
    for pattern in ("model_*.ckpt.best", "model_*.ckpt"):
        if found := list((folder / "checkpoints").glob(pattern)):
            return sorted(found, key=lambda path: int(path.name.split(".")[0].split("_")[-1]))
    return []


@cache
def _network(folder: Path) -> Network:
    _import_package()
    from df.deepfilternet3 import ModelParams, init_model  # type: ignore[import-untyped]
    from df.utils import get_norm_alpha
    from libdf import DF

    with _own_config(folder / "config.ini"), building():
        p = ModelParams()
        stft = DF(p.sr, p.fft_size, p.hop_size, p.nb_erb, p.min_nb_freqs)
        model = init_model(stft)  # of DeepFilterNet3, whatever network the file names
        norm_alpha = get_norm_alpha(False)
    checkpoint = _checkpoints(folder)[-1]
    load_weights(model, read_checkpoint(checkpoint), checkpoint)  # old ones hold unused states
    return Network(model.eval(), stft, norm_alpha)


def _import_package() -> None:
    """Import ``df`` beside a torchaudio that no longer has a module it takes one type from."""
    if not (importlib.util.find_spec("df") and importlib.util.find_spec("libdf")):
        raise UserError(f"DeepFilterNet3 needs the deepfilternet package: {INSTALL}")
    from loguru import logger

    logger.disable("df")  # its messages only; handlers stay as they are
    with _stand_in("torchaudio.backend.common", AudioMetaData=object):
        import df  # type: ignore[import-untyped]  # noqa: F401


@contextmanager
def _stand_in(name: str, **contents: Any) -> Iterator[None]:
    """A module of that name for a while, where there is none."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
        try:
            yield
        finally:
            del sys.modules[name]
    else:
        yield


@contextmanager
def _own_config(path: Path) -> Iterator[None]:
    """The package's one global configuration set from a file, and put back afterwards.

    While it holds, the package sees no environment variables: they would go before the file.
    """
    module: Any = sys.modules["df.config"]
    before, system = dict(vars(module.config)), module.os
    try:
        module.config.load(str(path), config_must_exist=True, allow_reload=True)
        module.config.set("device", "cpu", str, "train")
        module.os = SimpleNamespace(environ={}, path=os.path)
        yield
    finally:
        vars(module.config).update(before)
        module.os = system


PROCESSOR = Processor(
    process,
    packages=("deepfilternet", "deepfilterlib", "torch", "soxr"),
    licence="MIT OR Apache-2.0",
    weights=lambda spec: [weights_folder() / "config.ini", _checkpoints(weights_folder())[-1]],
)
