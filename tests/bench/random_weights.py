"""Seeded random weights: the real architectures in the real on-disk format, and no real network.

They are for measuring speed, and for previews, on a machine that has not the real weights: what
goes in is speech, what comes out through them is none. They lie as ``data_specs/weights.yaml``
names the files, so that ``SPEECH_WEIGHTS=FOLDER`` is all it takes. A signal keeps its power in
them, about, from layer to layer: in most random networks it fades into the biases, and numbers too
small for a processor's fast path would be measured.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_specs.sample import SAMPLE_RATE
from pipeline.render.processors import demucs, encodec, hifigan

COQUI_AUDIO = {
    "sample_rate": 22_050,
    "fft_size": 1024,
    "win_length": 1024,
    "hop_length": 256,
    "num_mels": 80,
    "mel_fmin": 0.0,
    "mel_fmax": 8000.0,
    "preemphasis": 0.0,
    "log_func": "np.log",
    "spec_gain": 1,
    "signal_norm": False,
    "stats_path": None,
}
COQUI_GENERATOR = {  # HiFi-GAN V2: a quarter of V1's channels
    "upsample_factors": [8, 8, 2, 2],
    "upsample_kernel_sizes": [16, 16, 4, 4],
    "upsample_initial_channel": 128,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "resblock_type": "1",
}


def write_all(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """Write the named networks (all of ``WRITERS``) into a weights cache at ``folder``.

    Gives the names of those left out, each with the package that builds it and is not installed.
    """
    missing = {}
    for name in WRITERS if names is None else names:
        package, write = WRITERS[name]
        if importlib.util.find_spec(package) is None:
            missing[name] = package
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        with seeded():
            write(folder / name)
    return missing


@contextmanager
def seeded() -> Iterator[None]:
    """In which every network is drawn from one seed, and the caller's generator is left alone."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


def demucs_network(hidden: int) -> Any:
    """As the package draws it; its own initial scale keeps signals alive."""
    from denoiser.demucs import Demucs

    return Demucs(hidden=hidden, sample_rate=SAMPLE_RATE).eval()


def encodec_model() -> Any:
    """The ``encodec`` package's own 24 kHz model, with codebooks that shrink as residuals do."""
    from encodec import EncodecModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the way it normalises weights
        model = EncodecModel.encodec_model_24khz(pretrained=False)
    _enliven(model, 1.3)
    for i, layer in enumerate(model.quantizer.vq.layers):
        layer._codebook.embed.normal_(std=0.25 * 0.95**i)
        layer._codebook.inited.fill_(1)
    return model


def _enliven(network: Any, gain: float) -> None:
    """Weights that keep the power of a signal, about, from layer to layer; no biases."""
    import torch

    for name, parameter in network.named_parameters():
        if name.endswith("bias") or "bias_" in name:
            parameter.data.zero_()
    for module in network.modules():
        scale = gain
        if isinstance(module, torch.nn.ConvTranspose1d):
            scale *= (module.stride[0] * module.out_channels / module.in_channels) ** 0.5
        if hasattr(module, "weight_g"):  # its norm, for each of the first dimension
            module.weight_g.data.fill_(scale)
        elif isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            norm = module.weight.data.flatten(1).norm(dim=1).view(-1, 1, 1)
            module.weight.data.mul_(scale / norm)


# --- as the official files lie on disk ------------------------------------------------------------


def _write_demucs(folder: Path, hidden: int) -> None:
    import torch

    torch.save(demucs_network(hidden).state_dict(), folder / demucs.FILES[hidden])


def _write_encodec(folder: Path) -> None:
    import torch

    torch.save(encodec_model().state_dict(), folder / encodec.CHECKPOINT)


def _write_speecht5(folder: Path) -> None:
    """As the hub has it: a pickled state dict."""
    import torch
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    network = SpeechT5HifiGan(SpeechT5HifiGanConfig())
    _enliven(network, 1.0)
    network.mean.normal_(-2.0, 0.3)
    network.scale.uniform_(0.5, 1.0)
    network.config.save_pretrained(folder)
    torch.save(network.state_dict(), folder / hifigan.CHECKPOINTS[hifigan.SPEECHT5])


def _write_coqui(folder: Path) -> None:
    """All of the GAN, with the names of a weight norm that the published files have."""
    import torch
    from TTS.vocoder.configs import HifiganConfig  # type: ignore[import-untyped]
    from TTS.vocoder.models import setup_model  # type: ignore[import-untyped]

    config = HifiganConfig(generator_model_params=dict(COQUI_GENERATOR))
    config.audio.update(COQUI_AUDIO)
    config.save_json(str(folder / "config.json"))
    names = {"parametrizations.weight.original0": "weight_g"}
    names |= {"parametrizations.weight.original1": "weight_v"}
    state = {}
    for name, value in setup_model(config).state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        gain = 1.5 if name.startswith("model_g.") and name.endswith("weight_g") else 1.0
        state[name] = value * gain
    whole = {"model": state, "step": 7, "config": config.to_dict()}
    torch.save(whole, folder / hifigan.CHECKPOINTS[hifigan.COQUI])


Writer = Callable[[Path], None]

WRITERS: dict[str, tuple[str, Writer]] = {
    "demucs-dns48": ("denoiser", lambda folder: _write_demucs(folder, 48)),
    "demucs-dns64": ("denoiser", lambda folder: _write_demucs(folder, 64)),
    encodec.WEIGHTS: ("encodec", _write_encodec),
    hifigan.SPEECHT5: ("transformers", _write_speecht5),
    hifigan.COQUI: ("TTS", _write_coqui),
}
"""By the name in ``data_specs/weights.yaml``: the package that builds the network, and how."""
