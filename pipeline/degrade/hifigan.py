"""HiFi-GAN (Kong et al. 2020, arXiv:2010.05646): a wave from its own log-mel spectrogram.

16 kHz: ``microsoft/speecht5_hifigan``, which transformers runs, on the features of transformers'
``SpeechT5FeatureExtractor``. 22.05 kHz: Coqui's ``vocoder_models/en/vctk/hifigan_v2``, network and
features of the ``coqui-tts`` package as the ``config.json`` beside the weights says, at the sample
rate that it says.

Both were trained on frames centred on their first sample: the frame centred on sample 256 n goes
with samples 256 n to 256 n + 255 (coqui-tts, vocoder/datasets/gan_dataset.py; ParallelWaveGAN,
bin/preprocess.py, whose checkpoint SpeechT5's was). So the output lies where the input does, and
only what the last frame has past the end is cut. The level is what the network makes of it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.sample import SAMPLE_RATE
from pipeline import weights
from pipeline.audio import Wave, resample
from pipeline.degrade import runtime
from pipeline.degrade.interface import Params, Processor, Waves

SPEECHT5 = "hifigan-speecht5"
COQUI = "hifigan-coqui"
NETWORKS = {16_000: SPEECHT5, 22_050: COQUI}
"""Names of the weights, by ``rate_hz``."""

CHECKPOINTS = {SPEECHT5: "pytorch_model.bin", COQUI: "model_file.pth"}

GPU_BATCH = 16

Mel = NDArray[np.float32]
"""(N, M), frames and bands."""


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Send each wave through the network of its own ``rate_hz``, those of one network together."""
    rates_B = np.array([int(p["rate_hz"]) for p in params])
    out_BT = np.empty_like(waves_BT)
    for rate_hz in np.unique(rates_B):
        rows = np.flatnonzero(rates_B == rate_hz)
        name = NETWORKS[int(rate_hz)]
        vocoder = _vocoder(name, *weight_paths(name), runtime.current().device)
        out_BT[rows] = _resynthesise(vocoder, waves_BT[rows])
    return out_BT


@dataclass(frozen=True)
class Vocoder:
    """A network and its features.

    ``mel`` gives the features (N, M) of a wave at ``rate_hz``; ``generate`` takes a tensor
    (B, N, M) of them and returns waves (B, N * hop).
    """

    rate_hz: int
    mel: Callable[[Wave], Mel]
    generate: Callable[[Any], Any]

    def run(self, waves_BT: Waves) -> Waves:
        import torch

        mels_BNM = np.stack([self.mel(wave_T) for wave_T in waves_BT])
        with runtime.inference() as device:
            out_BT = self.generate(torch.from_numpy(mels_BNM).to(device))
            return out_BT[:, : waves_BT.shape[1]].float().cpu().numpy()


def _resynthesise(vocoder: Vocoder, waves_BT: Waves) -> Waves:
    """On a CPU one wave at a time, so that a clip does not depend on its neighbours.

    Batches do not pay there: of 8, each clip of 7.68 s takes 1.2 to 4 times as long.
    """
    native_BT = resample(waves_BT, SAMPLE_RATE, vocoder.rate_hz)
    size = 1 if runtime.current().device == "cpu" else GPU_BATCH
    parts = [vocoder.run(native_BT[i : i + size]) for i in range(0, len(native_BT), size)]
    out_BT = resample(np.concatenate(parts), vocoder.rate_hz, SAMPLE_RATE)
    return out_BT[:, : waves_BT.shape[1]]


def weight_paths(name: str) -> tuple[Path, Path]:
    """Configuration and checkpoint of a network.

    Raises ``FileNotFoundError`` saying what to run; nothing is downloaded.
    """
    folder = weights.find(name)
    return folder / "config.json", folder / CHECKPOINTS[name]


@cache
def _vocoder(name: str, config_path: Path, checkpoint: Path, device: str) -> Vocoder:
    import torch

    build = {SPEECHT5: _speecht5, COQUI: _coqui}[name]
    # Building a network draws weights that are then replaced: not from the caller's generator.
    with torch.random.fork_rng(devices=[]):
        return build(config_path, checkpoint, device)


def _speecht5(config_path: Path, checkpoint: Path, device: str) -> Vocoder:
    try:
        from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan, SpeechT5HifiGanConfig
    except ImportError as error:
        raise ImportError("HiFi-GAN needs transformers: pip install transformers") from error
    config = SpeechT5HifiGanConfig.from_pretrained(config_path, local_files_only=True)
    extractor = SpeechT5FeatureExtractor()  # its defaults are what the network was trained on
    network = SpeechT5HifiGan(config)
    _load_weights(network, _read(checkpoint), checkpoint)

    def mel(wave_T: Wave) -> Mel:
        features = extractor(audio_target=wave_T, sampling_rate=extractor.sampling_rate)
        return np.asarray(features["input_values"][0], dtype=np.float32)

    return Vocoder(extractor.sampling_rate, mel, network.eval().to(device))


def _coqui(config_path: Path, checkpoint: Path, device: str) -> Vocoder:
    try:
        from TTS.config import load_config  # type: ignore[import-untyped]
        from TTS.utils.audio import AudioProcessor  # type: ignore[import-untyped]
        from TTS.vocoder.models import setup_generator  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("HiFi-GAN at 22.05 kHz needs: pip install coqui-tts") from error
    try:
        config = load_config(str(config_path))
    except ValueError as error:
        raise OSError(f"{config_path} is damaged: {error}") from error
    if config.audio.stats_path and config.audio.signal_norm:
        raise OSError(f"{config_path} wants {config.audio.stats_path}, a pickle: it is not read")
    audio = AudioProcessor(config.audio)
    network = setup_generator(config)
    _load_weights(network, _generator_weights(checkpoint), checkpoint)
    network.remove_weight_norm()
    network.eval().to(device)

    def generate(mels_BNM: Any) -> Any:
        # The package's own inference repeats some frames at both ends and leaves them in.
        margin = network.inference_padding * audio.hop_length
        out_B1T = network.inference(mels_BNM.transpose(1, 2))
        return out_B1T[:, 0, margin : out_B1T.shape[2] - margin]

    return Vocoder(audio.sample_rate, lambda wave_T: audio.melspectrogram(wave_T).T, generate)


def _generator_weights(path: Path) -> dict[str, Any]:
    """The generator's part of a Coqui checkpoint, old (it alone) or new (with discriminator)."""
    state = _read(path)
    if not isinstance(state.get("model"), dict):
        raise OSError(f"{path} is of another network: it has no 'model'")
    return {name.removeprefix("model_g."): value for name, value in state["model"].items()}


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint's content. Raises ``OSError`` where it is damaged."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(f"{path} is damaged: {error}") from error


def _load_weights(network: Any, state: dict[str, Any], path: Path) -> None:
    """Raises ``OSError`` where the weights are another network's."""
    try:
        missing, _ = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise OSError(f"{path} is of another network: {error}") from error
    if missing:
        raise OSError(f"{path} is of another network: it has no {', '.join(sorted(missing))}")


PROCESSOR = Processor(
    process,
    packages=("transformers", "coqui-tts", "librosa", "torch", "soxr"),
    # transformers; SpeechT5's weights; coqui-tts. Coqui's vocoders of VCTK are Apache-2.0 too.
    licence="Apache-2.0 AND MIT AND MPL-2.0",
    weights=lambda: [path for name in NETWORKS.values() for path in weight_paths(name)],
)
