"""HiFi-GAN (Kong et al. 2020, arXiv:2010.05646): a wave from its own log-mel spectrogram.

16 kHz: ``microsoft/speecht5_hifigan``, which transformers runs, on the features of transformers'
``SpeechT5FeatureExtractor``. 22.05 kHz: Coqui's ``vocoder_models/en/vctk/hifigan_v2``, network and
features of the ``coqui-tts`` package as the ``config.json`` beside the weights says, at the sample
rate that it says.

Both were trained on frames centred on their first sample: the frame centred on sample 256 n goes
with samples 256 n to 256 n + 255 (coqui-tts, vocoder/datasets/gan_dataset.py; ParallelWaveGAN,
bin/preprocess.py, whose checkpoint SpeechT5's was). So the output lies where the input does, and
only what the last frame has past the end is cut. The level is what the network makes of it.

HiFi-GAN's own checkpoints (jik876/hifi-gan, meldataset.py) were trained on frames centred half a
hop later. Where one lies in Coqui's format, its output is that late on Coqui's features, and moved
back. A checkpoint's SHA-256 says so (``HALF_HOP_LATE``): its configuration has no word for it, and
any that is not listed is Coqui's. The dataset records the same hash.

Both generators have one shape and run as the same ``timewise`` layers: 7.68 s take one
core 0.70 s (16 kHz) and 0.20 s (22.05 kHz) in bf16, where the packages' own calls take 1.45 and
0.45 s. At 16 kHz they are 127 GFLOP, and one core does about 200 a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.distributions import values
from data_specs.io.files import sha256_of
from data_specs.io.hardware import keep_freed_memory
from data_specs.processors import HifiGan as Spec
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave, resample
from pipeline.render.processors import runtime
from pipeline.render.processors.interface import Params, Processor, Waves
from pipeline.render.processors.networks import (
    batches,
    building,
    groups,
    load_weights,
    read_checkpoint,
)
from pipeline.render.processors.timewise import Layer, conv, transposed
from train.models import weights

SPEECHT5 = "hifigan-speecht5"
COQUI = "hifigan-coqui"
NETWORKS = {16_000: SPEECHT5, 22_050: COQUI}
"""Names of the weights, by ``rate_hz``."""

CHECKPOINTS = {SPEECHT5: "pytorch_model.bin", COQUI: "model_file.pth"}

HALF_HOP_LATE = {"f9982862c73915bb22e51796107779cb61e56e488191b3beb62493e658ad846b"}
"""SHA-256 of checkpoints that were trained on HiFi-GAN's own frames: V2 in Coqui's format."""

SLOPE = 0.1
"""Of the leaky rectifiers, the last one's (torch's default, 0.01) aside."""

Mel = NDArray[np.float32]
"""(N, M), frames and bands."""

Block = list[tuple[Layer, Layer]]
"""Pairs of a dilated convolution and a plain one, each pair added to what goes in."""


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Send each wave through the network of its own ``rate_hz``, those of one network together."""
    out_BT, now = np.empty_like(waves_BT), runtime.current()
    for rate_hz, rows in groups([p["rate_hz"] for p in params]):
        name = NETWORKS[rate_hz]
        vocoder = _vocoder(name, *weight_paths(name), now.device, now.precision)
        out_BT[rows] = _resynthesise(vocoder, waves_BT[rows])
    return out_BT


@dataclass(frozen=True)
class Vocoder:
    """A network and its features.

    ``mel`` gives the features (N, M) of a wave at ``rate_hz``; ``generate`` takes a tensor
    (B, N, M) of them and returns waves (B, N * hop), which are ``late`` by so many samples.
    """

    rate_hz: int
    mel: Callable[[Wave], Mel]
    generate: Callable[[Any], Any]
    late: int = 0

    def run(self, waves_BT: Waves) -> Waves:
        import torch

        padded_BT = np.pad(waves_BT, ((0, 0), (0, self.late)))
        mels_BNM = np.stack([self.mel(wave_T) for wave_T in padded_BT])
        with runtime.inference() as device:
            out_BT = self.generate(torch.from_numpy(mels_BNM).to(device))
            return out_BT[:, self.late : padded_BT.shape[1]].cpu().numpy()


def _residual(block: Block, x_BTC: Any) -> Any:
    from torch.nn import functional

    for dilated, plain in block:
        inner_BTC = dilated(functional.leaky_relu(x_BTC, SLOPE))
        x_BTC = plain(functional.leaky_relu_(inner_BTC, SLOPE)).add_(x_BTC)
    return x_BTC


def _generator(network: Any, upsamplers: Any, precision: str) -> Callable[[Any], Any]:
    """Mels (B, N, M) to waves (B, N * hop): upsampling layers, each with its residual blocks, whose
    mean goes on. What transformers and coqui-tts name alike, but for the upsampling layers."""
    import torch
    from torch.nn import functional

    from train.models.precision import DTYPES

    keep_freed_memory()
    dtype = DTYPES[precision]
    blocks = [
        [(conv(a, dtype), conv(b, dtype)) for a, b in zip(r.convs1, r.convs2, strict=True)]
        for r in network.resblocks
    ]
    each = len(blocks) // len(upsamplers)
    stages = [
        (transposed(layer, dtype), blocks[i * each : (i + 1) * each])
        for i, layer in enumerate(upsamplers)
    ]
    first, last = conv(network.conv_pre, dtype), conv(network.conv_post, dtype)

    def run(mels_BNM: Any) -> Any:
        x_BTC = first(mels_BNM.to(dtype))
        for upsample, own in stages:
            x_BTC = upsample(functional.leaky_relu_(x_BTC, SLOPE))
            total_BTC = _residual(own[0], x_BTC)
            for block in own[1:]:
                total_BTC += _residual(block, x_BTC)
            x_BTC = total_BTC.div_(len(own))
        return torch.tanh(last(functional.leaky_relu_(x_BTC)).float())[:, :, 0]

    return run


def _resynthesise(vocoder: Vocoder, waves_BT: Waves) -> Waves:
    """Run waves (B, T) at 16 kHz through a network at its own rate."""
    native_BT = resample(waves_BT, SAMPLE_RATE, vocoder.rate_hz)
    parts = [vocoder.run(native_BT[part]) for part in batches(len(native_BT))]
    out_BT = resample(np.concatenate(parts), vocoder.rate_hz, SAMPLE_RATE)
    return out_BT[:, : waves_BT.shape[1]]


def weight_paths(name: str) -> tuple[Path, Path]:
    """Configuration and checkpoint; ``FileNotFoundError`` saying what to run without them."""
    folder = weights.find(name)
    return folder / "config.json", folder / CHECKPOINTS[name]


def _weights(spec: Spec) -> list[Path]:
    names = [NETWORKS[int(rate_hz)] for rate_hz in values(spec.rate_hz)]
    weights.find_all(names)
    return [path for name in names for path in weight_paths(name)]


@cache
def _vocoder(
    name: str, config_path: Path, checkpoint: Path, device: str, precision: str
) -> Vocoder:
    build, needs = {
        SPEECHT5: (_speecht5, "HiFi-GAN needs transformers: pip install transformers"),
        COQUI: (_coqui, "HiFi-GAN at 22.05 kHz needs: pip install coqui-tts"),
    }[name]
    with building(needs):
        return build(config_path, checkpoint, device, precision)


def _speecht5(config_path: Path, checkpoint: Path, device: str, precision: str) -> Vocoder:
    from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig.from_pretrained(config_path, local_files_only=True)
    extractor = SpeechT5FeatureExtractor()  # its defaults are what the network was trained on
    network: Any = SpeechT5HifiGan(config)
    load_weights(network, read_checkpoint(checkpoint), checkpoint)
    network.to(device)
    generator = _generator(network, network.upsampler, precision)
    mean_M, scale_M = network.mean, network.scale

    def mel(wave_T: Wave) -> Mel:
        features = extractor(audio_target=wave_T, sampling_rate=extractor.sampling_rate)
        return np.asarray(features["input_values"][0], dtype=np.float32)

    def generate(mels_BNM: Any) -> Any:
        return generator((mels_BNM - mean_M) / scale_M)

    return Vocoder(extractor.sampling_rate, mel, generate)


def _coqui(config_path: Path, checkpoint: Path, device: str, precision: str) -> Vocoder:
    import torch
    from TTS.config import load_config  # type: ignore[import-untyped]
    from TTS.utils.audio import AudioProcessor  # type: ignore[import-untyped]
    from TTS.vocoder.models import setup_generator  # type: ignore[import-untyped]

    try:
        config = load_config(str(config_path))
    except ValueError as error:
        raise OSError(f"{config_path} is damaged: {error}") from error
    if config.audio.stats_path and config.audio.signal_norm:
        raise OSError(f"{config_path} wants {config.audio.stats_path}, a pickle: it is not read")
    audio = AudioProcessor(config.audio)
    network = setup_generator(config)
    load_weights(network, _generator_weights(checkpoint), checkpoint)
    network.remove_weight_norm()
    network.to(device)
    generator = _generator(network, network.ups, precision)
    frames = network.inference_padding
    margin = frames * audio.hop_length

    def generate(mels_BNM: Any) -> Any:
        # The package repeats some frames at both ends, and leaves what comes of them in.
        ends = [mels_BNM[:, at : at + 1 or None].repeat(1, frames, 1) for at in (0, -1)]
        out_BT = generator(torch.cat([ends[0], mels_BNM, ends[1]], dim=1))
        return out_BT[:, margin : out_BT.shape[1] - margin]

    late = audio.hop_length // 2 if sha256_of(checkpoint) in HALF_HOP_LATE else 0
    return Vocoder(audio.sample_rate, lambda wave_T: audio.melspectrogram(wave_T).T, generate, late)


def _generator_weights(path: Path) -> dict[str, Any]:
    """The generator's part of a Coqui checkpoint, old (it alone) or new (with discriminator)."""
    state = read_checkpoint(path)
    if not isinstance(state.get("model"), dict):
        raise OSError(f"{path} is of another network: it has no 'model'")
    return {name.removeprefix("model_g."): value for name, value in state["model"].items()}


PROCESSOR = Processor(
    process,
    packages=("transformers", "coqui-tts", "librosa", "torch", "soxr"),
    # transformers; SpeechT5's weights; coqui-tts. Coqui's vocoders of VCTK are Apache-2.0 too.
    licence="Apache-2.0 AND MIT AND MPL-2.0",
    weights=_weights,
)
