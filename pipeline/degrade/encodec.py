"""EnCodec, the causal 24 kHz model for mono audio (Defossez et al. 2022, arXiv:2210.13438).

The network is that of ``transformers``: the same as the ``encodec`` package's, and as fast (7.68 s
take one thread 1.02 s here and 1.04 s there, fp32). Its weights come as safetensors, not as a
pickle, it needs neither torchaudio nor deprecated functions, and its licence is Apache-2.0, where
the package's wheel is CC BY-NC 4.0. The 24 kHz model normalises nothing and adds no delay: frame n
is decoded over the 320 samples that it was encoded from.

The nearest code word is a step function: where the last bits of an embedding move, a code may flip,
and all residuals after it. So everything runs in fp32 (in bf16, with random weights, a quarter of
the codes are others and the output differs by -11 dB, for a gain in speed of 1.4), and on a CPU one
wave at a time: in a batch of 8 each clip takes 1.6 times as long there, and the LSTM's last bits
are not those of a single wave. On a GPU waves run in batches, and a clip depends on its neighbours
in its last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_specs.sample import SAMPLE_RATE
from pipeline import weights
from pipeline.audio import resample
from pipeline.degrade import runtime
from pipeline.degrade.interface import Params, Processor, Waves

RATE_HZ = 24_000
WEIGHTS = "encodec-24khz"
"""https://huggingface.co/facebook/encodec_24khz"""

GPU_BATCH = 16


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Encode and decode each wave at its own bandwidth, at 24 kHz, and come back to 16 kHz."""
    bandwidths_kbps = [p["bandwidth_kbps"] for p in params]
    coded_BT = code(resample(waves_BT, SAMPLE_RATE, RATE_HZ), bandwidths_kbps)
    return resample(coded_BT, RATE_HZ, SAMPLE_RATE)[:, : waves_BT.shape[1]]


def code(waves_BT: Waves, bandwidths_kbps: Sequence[float]) -> Waves:
    """Encode and decode waves at 24 kHz; the length stays."""
    network = _network(*weight_paths(), runtime.current().device)
    size = 1 if runtime.current().device == "cpu" else GPU_BATCH
    parts = [
        _code(network, waves_BT[start : start + size], bandwidths_kbps[start : start + size])
        for start in range(0, len(waves_BT), size)
    ]
    return np.concatenate(parts)


def _code(network: Any, waves_BT: Waves, bandwidths_kbps: Sequence[float]) -> Waves:
    """One run of encoder and decoder; between them each wave's own number of codebooks."""
    import torch

    with runtime.inference("fp32") as device:
        embeddings_BDN = network.encoder(torch.from_numpy(waves_BT).to(device).unsqueeze(1))
        quantised_BDN = torch.cat(
            [
                _quantise(network.quantizer, embedding_DN[None], bandwidth)
                for embedding_DN, bandwidth in zip(embeddings_BDN, bandwidths_kbps, strict=True)
            ]
        )
        decoded_BT = network.decoder(quantised_BDN)[:, 0, : waves_BT.shape[1]]
        return decoded_BT.cpu().numpy()


def _quantise(quantizer: Any, embedding_1DN: Any, bandwidth_kbps: float) -> Any:
    """To the codes and back: 75 frames/s of 10 bits are 0.75 kbit/s for each codebook."""
    return quantizer.decode(quantizer.encode(embedding_1DN, bandwidth_kbps))


def weight_paths() -> tuple[Path, Path]:
    """Configuration and weights of the network.

    Raises ``FileNotFoundError`` saying what to run; nothing is downloaded.
    """
    folder = weights.find(WEIGHTS)
    return folder / "config.json", folder / "model.safetensors"


@cache
def _network(config_path: Path, checkpoint: Path, device: str) -> Any:
    import torch

    try:
        from transformers import EncodecConfig, EncodecModel
    except ImportError as error:
        raise ImportError("EnCodec needs transformers: pip install transformers") from error
    config = EncodecConfig.from_pretrained(config_path, local_files_only=True)
    if (config.sampling_rate, config.audio_channels, config.normalize) != (RATE_HZ, 1, False):
        raise OSError(f"{config_path} is of another network than the one at 24 kHz")
    # Building the network draws weights that are then replaced: not from the caller's generator.
    with torch.random.fork_rng(devices=[]):
        network = EncodecModel(config)
    _load_weights(network, checkpoint)
    _remove_weight_norm(network)
    return network.eval().to(device)


def _load_weights(network: Any, path: Path) -> None:
    """Load a checkpoint. Raises ``OSError`` where it is damaged or another network's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        missing, _ = network.load_state_dict(load_file(path), strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{path} is damaged, or of another network: {error}") from error
    if missing:
        raise OSError(f"{path} is of another network: it has no {', '.join(sorted(missing))}")


def _remove_weight_norm(network: Any) -> None:
    from torch.nn.utils import parametrize

    for module in network.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


PROCESSOR = Processor(
    process,
    packages=("transformers", "torch", "soxr"),
    licence="Apache-2.0 AND CC-BY-NC-4.0",  # transformers; the weights, see data_specs/weights.yaml
    weights=lambda: list(weight_paths()),
)
