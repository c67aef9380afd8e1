"""wav2vec 2.0, HuBERT, WavLM, XLS-R and Whisper's encoder, as ``transformers`` has them.

Read from a folder of its layout (a checkpoint of the hub): ``config.json`` and safetensors, or
``.bin`` read as plain tensors; no code of a repository is run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize

from data_specs.io.errors import UserError
from data_specs.io.parse import json_object
from train.models.encoders.interface import SpeechEncoder, States, valid_frames
from train.models.encoders.mel import HOP, LogMel, silence_after
from train.models.low_rank import narrow, shape_as
from train.models.tensors import require_finite, require_memory
from train.models.xlsr import NORMAL_FLOOR, read_tensors

WAVE_KINDS = ("wav2vec2", "hubert", "wavlm")
"""``model_type`` of those that hear waves; XLS-R is a wav2vec2."""

NORM_NAMES = {
    **{"weight_g": "gain", "original0": "gain"},
    **{"weight_v": "direction", "original1": "direction"},
}
"""Weight norm's two tensors, as they were and are called."""

TRAINING_ONLY = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
    "add_adapter": False,
}
"""Switched off: every layer gives a state, and nothing is masked."""


class _Checkpointed(SpeechEncoder):
    """What both families share: a config of ``transformers``, and weights by its names."""

    config: Any

    def about(self) -> dict[str, Any]:
        return {"config": self.config.to_dict()}

    @classmethod
    def build(cls, about: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> Self:
        """See ``SpeechEncoder``; linear layers are as wide as their weights in ``state``."""
        if state is None:
            encoder = cls(**about)
        else:
            with torch.device("meta"):
                encoder = cls(**about)
                shape_as(encoder, state)
                narrow(encoder, state)
            encoder.load_state_dict(state, assign=True)
            encoder.restore_buffers()
        return encoder

    def fresh(self) -> Self:
        """See ``SpeechEncoder``; ``about`` knows nothing of what was cut."""
        encoder, own = super().fresh(), self.state_dict()
        shape_as(encoder, own)
        narrow(encoder, own)
        return encoder

    def restore_buffers(self) -> None:
        """Make what no state dict holds."""

    @classmethod
    @abstractmethod
    def bare(cls, name: str) -> str:
        """A tensor's name in a checkpoint as it is here."""


class WaveEncoder(_Checkpointed):
    """A model of the wav2vec 2.0 family, a frame each 20 ms; layer norms above the last left out.

    ``normalise`` brings each clip to mean 0 and variance 1 first, as its feature extractor says.
    Those with a group norm over time (wav2vec2-base, hubert-base) hear the padding of a batch, as
    published; the others do not.
    """

    kind = "transformers-waves"

    def __init__(self, config: Mapping[str, Any], normalise: bool = True) -> None:
        from transformers import AutoConfig, AutoModel

        super().__init__()
        values = dict(config)
        self.config = AutoConfig.for_model(values.pop("model_type"), **values | TRAINING_ONLY)
        self.normalise = normalise
        self.model = AutoModel.from_config(self.config, trust_remote_code=False)
        # One tensor instead of weight norm's two, so that gates, bits and pruning see weights.
        positions = self.model.encoder.pos_conv_embed
        with torch.enable_grad():  # else what it makes is no parameter
            parametrize.remove_parametrizations(positions.conv, "weight")
        self.dims = (self.config.hidden_size,) * (self.config.num_hidden_layers + 1)

    def about(self) -> dict[str, Any]:
        return super().about() | {"normalise": self.normalise}

    def forward(self, waves_BT: Tensor, lengths_B: Tensor) -> States:
        valid_BT = valid_frames(lengths_B, waves_BT.shape[1])
        waves_BT = waves_BT.float()
        if self.normalise:
            waves_BT = _normal(waves_BT, valid_BT, lengths_B)
        found = self.model(waves_BT, attention_mask=valid_BT, output_hidden_states=True)
        frames_B = self.model._get_feat_extract_output_lengths(lengths_B)
        return States(tuple(found.hidden_states), frames_B.clamp_min(1))

    @classmethod
    def bare(cls, name: str) -> str:
        """Without the prefix of a pre-training or recognising model."""
        prefix, _, rest = name.partition(".")
        return "model." + (rest if prefix in WAVE_KINDS else name)


def _normal(waves_BT: Tensor, valid_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Each clip with mean 0 and variance 1 over its own samples, zeros behind it."""
    count_B1 = lengths_B[:, None]
    mean_B1 = (waves_BT * valid_BT).sum(1, keepdim=True) / count_B1
    centred_BT = (waves_BT - mean_B1) * valid_BT
    variance_B1 = centred_BT.square().sum(1, keepdim=True) / count_B1
    return centred_BT / torch.sqrt(variance_B1 + NORMAL_FLOOR)


class WhisperEncoder(_Checkpointed):
    """Whisper's encoder on clips of any length up to its window, a frame each 20 ms.

    Whisper itself always hears 30 s; here frames behind a clip are masked, so that a short clip
    costs what it is long. The last state is after the final layer norm, as the decoder hears it.
    """

    kind = "transformers-whisper"

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Published

        super().__init__()
        values = {name: value for name, value in config.items() if name != "model_type"}
        self.config = WhisperConfig(**values | TRAINING_ONLY)
        self.mel = LogMel(self.config.num_mel_bins)
        self.encoder = Published(self.config)
        self.dims = (self.config.d_model,) * (self.config.encoder_layers + 1)
        self.longest_s = self.config.max_source_positions * self.frame_s

    def restore_buffers(self) -> None:
        """The mel filters, and heads as many as the projections have left."""
        self.mel = LogMel(self.config.num_mel_bins)

    def forward(self, waves_BT: Tensor, lengths_B: Tensor) -> States:
        step = 2 * HOP
        frames_B, frames = -(-lengths_B // step), -(-waves_BT.shape[1] // step)
        # Behind a clip is silence, behind Whisper's window nothing, as published.
        mel_BMF = self.mel(silence_after(waves_BT, step))[
            ..., : 2 * self.config.max_source_positions
        ]
        hidden_BDF = functional.gelu(self.encoder.conv1(mel_BMF))
        hidden_BFD = functional.gelu(self.encoder.conv2(hidden_BDF)).transpose(1, 2)[:, :frames]
        hidden_BFD = hidden_BFD + self.encoder.embed_positions.weight[:frames]
        mask_B11F = valid_frames(frames_B, frames).to(hidden_BFD.device)[:, None, None]
        found = [hidden_BFD]
        for layer in self.encoder.layers:
            found.append(layer(found[-1], mask_B11F))
        found[-1] = self.encoder.layer_norm(found[-1])
        return States(tuple(found), frames_B)

    @classmethod
    def bare(cls, name: str) -> str:
        """Of ``model.encoder.layers ...`` the part from ``encoder`` on."""
        return name.removeprefix("model.")


def from_checkpoint(folder: Path) -> WaveEncoder | WhisperEncoder:
    """The encoder in a folder of ``transformers``' layout.

    ``UserError`` naming the file and what is wrong with it.
    """
    path = folder / "config.json"
    config = json_object(path.read_bytes(), path)
    kind = config.get("model_type")
    if kind not in (*WAVE_KINDS, "whisper"):
        known = ", ".join((*WAVE_KINDS, "whisper"))
        raise UserError(f"{path}: model_type {kind!r} is no encoder of speech known here: {known}")
    about: dict[str, Any] = {"config": config}
    if kind != "whisper":
        about["normalise"] = _normalises(folder)
    family = WhisperEncoder if kind == "whisper" else WaveEncoder
    try:
        with torch.device("meta"):
            made = family(**about)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise UserError(f"{path}: no configuration of a {kind}: {error}") from error
    wanted = {name: tensor.shape for name, tensor in made.state_dict().items()}
    require_memory(path, 4 * sum(shape.numel() for shape in wanted.values()))
    return family.build(about, _read(folder, family, wanted)).eval()


def _normalises(folder: Path) -> bool:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return True
    return bool(json_object(path.read_bytes(), path).get("do_normalize", True))


def _read(
    folder: Path, family: type[_Checkpointed], wanted: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The wanted tensors, float32, the two of weight norm as their product."""
    found: dict[str, Tensor] = {}
    norm: dict[str, Tensor] = {}
    for name, tensor in read_tensors(folder, None):
        require_finite(folder, {name: tensor})
        name = family.bare(name)
        if name in wanted:
            found[name] = tensor.to(torch.float32, copy=True)
        elif "pos_conv_embed" in name:
            norm[NORM_NAMES.get(name.rpartition(".")[2], name)] = tensor.float().clone()
    if norm.keys() >= {"gain", "direction"}:
        gain = norm["gain"] / norm["direction"].norm(dim=(0, 1), keepdim=True)
        found["model.encoder.pos_conv_embed.conv.weight"] = norm["direction"] * gain
    for name, shape in wanted.items():
        if name not in found or found[name].shape != shape:
            have = tuple(found[name].shape) if name in found else "nothing"
            raise UserError(
                f"{folder}: tensor {name!r}: {have} there, config.json says {tuple(shape)}"
            )
    return found
