"""EnCodec, the causal 24 kHz model for mono audio (Defossez et al. 2022, arXiv:2210.13438).

The network is that of ``transformers``: the same as the ``encodec`` package's. Its weights come as
safetensors, not as a pickle, it needs neither torchaudio nor deprecated functions, and its licence
is Apache-2.0, where the package's wheel is CC BY-NC 4.0. The 24 kHz model normalises nothing and
adds no delay: frame n is decoded over the 320 samples that it was encoded from.

The nearest code word is a step function: where the last bits of an embedding move, a code may flip,
and all residuals after it. So the encoder and the quantiser run in fp32 whatever the recipe says
(in bf16, with random weights, a quarter of the codes are others and the output differs by -11 dB),
and on a CPU one wave at a time: in a batch the LSTM's last bits are not those of a single wave. The
decoder runs in the recipe's precision: bf16 moves its output by -40 dB with random weights. On a
GPU waves run in batches, and a clip depends on its neighbours in its last bits.

The layers run as ``timewise`` has them: 7.68 s take one core 0.78 s all in fp32 and 0.64 s with the
decoder in bf16, where the ``encodec`` package takes 1.1 s. A third of that is the LSTMs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_specs.io.errors import UserError
from data_specs.io.hardware import keep_freed_memory
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import resample
from pipeline.render.processors import runtime
from pipeline.render.processors.interface import Params, Processor, Waves
from pipeline.render.processors.timewise import Layer, conv, dtype_of, lstm, transposed
from train.models import weights

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
    now = runtime.current()
    network = _network(*weight_paths(), now.device, now.precision)
    size = 1 if now.device == "cpu" else GPU_BATCH
    parts = [
        network.run(waves_BT[start : start + size], bandwidths_kbps[start : start + size])
        for start in range(0, len(waves_BT), size)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Network:
    """Encoder and decoder as chains of layers, and the package's quantiser between them."""

    encoder: list[Layer]
    quantizer: Any
    decoder: list[Layer]
    decoder_dtype: Any

    def run(self, waves_BT: Waves, bandwidths_kbps: Sequence[float]) -> Waves:
        """One run of encoder and decoder; between them each wave's own number of codebooks."""
        import torch

        with runtime.inference("fp32") as device:  # the layers have their own precision
            embeddings_BND = _chain(self.encoder, torch.from_numpy(waves_BT).to(device)[:, :, None])
            quantised_BDN = torch.cat(
                [
                    _quantise(self.quantizer, embedding_ND.T[None], bandwidth)
                    for embedding_ND, bandwidth in zip(embeddings_BND, bandwidths_kbps, strict=True)
                ]
            )
            quantised_BND = quantised_BDN.transpose(1, 2).to(self.decoder_dtype)
            decoded_BTC = _chain(self.decoder, quantised_BND.contiguous())
            return decoded_BTC[:, : waves_BT.shape[1], 0].float().cpu().numpy()


def _chain(layers: Sequence[Layer], x_BTC: Any) -> Any:
    for layer in layers:
        x_BTC = layer(x_BTC)
    return x_BTC


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
def _network(config_path: Path, checkpoint: Path, device: str, precision: str) -> Network:
    import torch

    try:
        from transformers import EncodecConfig, EncodecModel
    except ImportError as error:
        raise UserError("EnCodec needs transformers: pip install transformers") from error
    config = EncodecConfig.from_pretrained(config_path, local_files_only=True)
    if (config.sampling_rate, config.audio_channels, config.normalize) != (RATE_HZ, 1, False):
        raise OSError(f"{config_path} is of another network than the one at 24 kHz")
    # Building the network draws weights that are then replaced: not from the caller's generator.
    with torch.random.fork_rng(devices=[]):
        whole = EncodecModel(config)
    _load_weights(whole, checkpoint)
    _remove_weight_norm(whole)
    whole.eval().to(device)
    keep_freed_memory()
    dtype = dtype_of(precision)
    encoder = [_layer(layer, torch.float32) for layer in whole.encoder.layers]
    decoder = [_layer(layer, dtype) for layer in whole.decoder.layers]
    return Network(encoder, whole.quantizer, decoder, dtype)


def _layer(layer: Any, dtype: Any) -> Layer:
    """A layer of transformers' network, by the name of its class."""
    from torch.nn import functional

    kind = type(layer).__name__
    if kind == "ELU":
        return partial(functional.elu, inplace=True)
    if kind == "EncodecConv1d":
        return _causal(layer.conv, dtype)
    if kind == "EncodecConvTranspose1d":
        run, stride = transposed(layer.conv, dtype), layer.conv.stride[0]
        return lambda x_BTC: run(x_BTC)[:, :-stride]  # the rest would need what comes next
    if kind == "EncodecLSTM":
        memory = lstm(layer.lstm, dtype)
        return lambda x_BTC: memory(x_BTC) + x_BTC
    if kind != "EncodecResnetBlock":
        raise TypeError(f"EnCodec has an unknown layer: {kind}")
    inner, shortcut = [_layer(part, dtype) for part in layer.block], _layer(layer.shortcut, dtype)
    # The first one rectifies what the shortcut still needs.
    return lambda x_BTC: _chain(inner[1:], functional.elu(x_BTC)).add_(shortcut(x_BTC))


def _causal(layer: Any, dtype: Any) -> Layer:
    """All padding on the left, but for what completes the last stride."""
    run, stride = conv(layer, dtype), layer.stride[0]
    left = (layer.kernel_size[0] - 1) * layer.dilation[0] + 1 - stride
    if not left:
        return run
    return lambda x_BTC: run(_reflect(x_BTC, left, -x_BTC.shape[1] % stride))


def _reflect(x_BTC: Any, left: int, right: int) -> Any:
    """Mirrored ends, as the package has them: what is too short is first filled up with zeros."""
    import torch
    from torch.nn import functional

    length = x_BTC.shape[1]
    x_BTC = functional.pad(x_BTC, (0, 0, 0, max(max(left, right) + 1 - length, 0)))
    before, after = x_BTC[:, 1 : left + 1].flip(1), x_BTC[:, -1 - right : -1].flip(1)
    return torch.cat([before, x_BTC, after], dim=1)[:, : left + length + right]


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
