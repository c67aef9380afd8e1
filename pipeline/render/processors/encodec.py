"""EnCodec, the causal 24 kHz model for mono audio (Defossez et al. 2022, arXiv:2210.13438).

Network, quantiser and weights file are those of the ``encodec`` package. The 24 kHz model
normalises nothing and adds no delay: frame n is decoded over the 320 samples that it was encoded
from.

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

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_specs.io.hardware import keep_freed_memory
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import resample
from pipeline.render.processors import runtime
from pipeline.render.processors.interface import Params, Processor, Waves
from pipeline.render.processors.networks import batches, building, load_weights, read_checkpoint
from pipeline.render.processors.timewise import Layer, conv, lstm, transposed
from train.models import weights

RATE_HZ = 24_000
FRAMES_HZ = 75  # of 10 bits: 0.75 kbit/s for each codebook
WEIGHTS, CHECKPOINT = "encodec-24khz", "encodec_24khz-d7cc33bc.th"


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Encode and decode each wave at its own bandwidth, at 24 kHz, and come back to 16 kHz."""
    bandwidths_kbps = [p["bandwidth_kbps"] for p in params]
    coded_BT = code(resample(waves_BT, SAMPLE_RATE, RATE_HZ), bandwidths_kbps)
    return resample(coded_BT, RATE_HZ, SAMPLE_RATE)[:, : waves_BT.shape[1]]


def code(waves_BT: Waves, bandwidths_kbps: Sequence[float]) -> Waves:
    """Encode and decode waves at 24 kHz; the length stays."""
    now = runtime.current()
    network = _network(weights_path(), now.device, now.precision)
    parts = batches(len(waves_BT))
    return np.concatenate([network.run(waves_BT[part], bandwidths_kbps[part]) for part in parts])


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

        with runtime.inference() as device:
            embeddings_BND = _chain(self.encoder, torch.from_numpy(waves_BT).to(device)[:, :, None])
            codes = [
                self.quantizer.encode(embedding_ND.T[None], FRAMES_HZ, kbps)
                for embedding_ND, kbps in zip(embeddings_BND, bandwidths_kbps, strict=True)
            ]
            quantised_BDN = torch.cat([self.quantizer.decode(one) for one in codes])
            quantised_BND = quantised_BDN.transpose(1, 2).to(self.decoder_dtype)
            decoded_BTC = _chain(self.decoder, quantised_BND.contiguous())
            return decoded_BTC[:, : waves_BT.shape[1], 0].float().cpu().numpy()


def _chain(layers: Sequence[Layer], x_BTC: Any) -> Any:
    for layer in layers:
        x_BTC = layer(x_BTC)
    return x_BTC


def weights_path() -> Path:
    """The published file; ``FileNotFoundError`` saying what to run where it is not here."""
    return weights.find(WEIGHTS) / CHECKPOINT


@cache
def _network(path: Path, device: str, precision: str) -> Network:
    from train.models.precision import DTYPES

    with building("EnCodec needs its package: pip install encodec"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the way it normalises weights
        from encodec import EncodecModel

        whole = EncodecModel.encodec_model_24khz(pretrained=False)
    load_weights(whole, read_checkpoint(path), path)
    _remove_weight_norm(whole)
    whole.to(device)
    keep_freed_memory()
    encoder = [_layer(layer, DTYPES["fp32"]) for layer in whole.encoder.model]
    decoder = [_layer(layer, DTYPES[precision]) for layer in whole.decoder.model]
    return Network(encoder, whole.quantizer, decoder, DTYPES[precision])


def _remove_weight_norm(network: Any) -> None:
    from torch.nn.utils import remove_weight_norm

    for module in network.modules():
        if hasattr(module, "weight_g"):
            remove_weight_norm(module)


def _layer(layer: Any, dtype: Any) -> Layer:
    """A layer of the package's network, by the name of its class."""
    from torch.nn import functional

    kind = type(layer).__name__
    if kind == "ELU":
        return partial(functional.elu, inplace=True)
    if kind == "SConv1d":
        return _causal(layer.conv.conv, dtype)
    if kind == "SConvTranspose1d":
        run, stride = transposed(layer.convtr.convtr, dtype), layer.convtr.convtr.stride[0]
        return lambda x_BTC: run(x_BTC)[:, :-stride]  # the rest would need what comes next
    if kind == "SLSTM":
        memory = lstm(layer.lstm, dtype)
        return lambda x_BTC: memory(x_BTC) + x_BTC
    if kind != "SEANetResnetBlock":
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


PROCESSOR = Processor(
    process,
    packages=("encodec", "torch", "soxr"),
    licence="CC-BY-NC-4.0",  # of the package's wheel, and of the weights
    weights=lambda spec: [weights_path()],
)
