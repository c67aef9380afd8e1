"""XLS-R cut at the layer that is wanted: waves to the hidden states of a layer.

``facebook/wav2vec2-xls-r-{300m,1b,2b}``, or the cuts of them that lcn-kul published for xls-r-sqa.
The layers are those of ``transformers``; what is left out is what nobody reads: the layers above
the last wanted one, the layer norm after them, dropout, masking. (The published cuts keep one layer
more, because that norm falls on the last one; it is neither loaded nor run.)
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from data_specs.io.parse import json_field, json_object
from data_specs.strict import digest
from train.models.low_rank import narrow
from train.models.tensors import require_finite

NORMAL_FLOOR = 1e-7
"""Added to the variance of a wave (transformers, ``Wav2Vec2FeatureExtractor``)."""

PORTION = 2
"""Tensors: a checkpoint is mapped anew for each portion, for until then its pages count as ours."""

INDEX_ENDING = ".index.json"
CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")
POSITIONS = "encoder.pos_conv_embed.conv."
GAIN, DIRECTION = POSITIONS + "weight_g", POSITIONS + "weight_v"
RENAMED = {
    f"{POSITIONS}parametrizations.weight.original0": GAIN,
    f"{POSITIONS}parametrizations.weight.original1": DIRECTION,
}
"""Weight norm's two tensors, as they were and are called."""

LAYER_PARTS = (
    *(f"attention.{name}_proj" for name in ("k", "v", "q", "out")),
    "layer_norm",
    "feed_forward.intermediate_dense",
    "feed_forward.output_dense",
    "final_layer_norm",
)
"""What a layer of XLS-R has, each with weight and bias."""


class Encoder(nn.Module):
    """Normalised waves to hidden states after some layers, counted from 1.

    (B, T) at 16 kHz -> one (B, F, C) for each of ``layers``, F frames of 20 ms (383 for 7.68 s).
    Equal to ``hidden_states[k]`` of the whole model.
    """

    def __init__(self, config: Any, layers: Sequence[int]) -> None:
        from transformers import Wav2Vec2Model

        super().__init__()
        self.config = config
        self.layers = tuple(layers)
        model = Wav2Vec2Model(_cut(config, max(layers)))
        self.feature_extractor = model.feature_extractor
        self.feature_projection = model.feature_projection
        self.encoder = model.encoder
        self.encoder.layer_norm = nn.Identity()  # type: ignore[assignment]
        positions = self.encoder.pos_conv_embed
        positions.conv = _plain(positions.conv)

    def forward(self, waves_BT: Tensor) -> tuple[Tensor, ...]:
        dtype = self.feature_projection.projection.weight.dtype
        maps_BCF = self.feature_extractor(normal(waves_BT).to(dtype))
        hidden_BFC = self.feature_projection(maps_BCF.transpose(1, 2))[0]
        hidden_BFC = hidden_BFC + self.encoder.pos_conv_embed(hidden_BFC)
        found = []
        for number, layer in enumerate(self.encoder.layers, 1):
            hidden_BFC = layer(hidden_BFC, attention_mask=None)
            if number in self.layers:
                found.append(hidden_BFC)
        return tuple(found)


def normal(waves_BT: Tensor) -> Tensor:
    """Each wave with mean 0 and variance 1, float32, as XLS-R was trained."""
    waves_BT = waves_BT.float()
    variance_B1, mean_B1 = torch.var_mean(waves_BT, dim=1, keepdim=True, correction=0)
    return (waves_BT - mean_B1) / torch.sqrt(variance_B1 + NORMAL_FLOOR)


def _cut(config: Any, layers: int) -> Any:
    config = type(config).from_dict(config.to_dict())
    config.num_hidden_layers = layers
    config.apply_spec_augment = False
    config.mask_time_prob = config.mask_feature_prob = 0.0
    config.add_adapter = False
    config._attn_implementation = "sdpa"
    return config


def _plain(conv: nn.Conv1d) -> nn.Conv1d:
    """The same convolution without weight norm, whose product is computed once, when loading."""
    return nn.Conv1d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        padding=int(conv.padding[0]),
        groups=conv.groups,
        device=conv.bias.device if conv.bias is not None else None,
    )


def flops(config: Any, layers: int, samples: int) -> dict[str, float]:
    """Floating-point operations of one clip of that many samples, multiply and add counted as two.

    By part: the convolutional front end, the projection and positional convolution, the layers'
    matrices, the attention products.
    """
    steps, channels, front = samples, 1, 0.0
    for size, kernel, stride in zip(
        config.conv_dim, config.conv_kernel, config.conv_stride, strict=True
    ):
        steps = (steps - kernel) // stride + 1
        front += 2.0 * steps * channels * kernel * size
        channels = size
    width, wide = config.hidden_size, config.intermediate_size
    kernel, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
    return {
        "front end": front,
        "projection": 2.0 * steps * channels * width,
        "positions": 2.0 * steps * width * (width // groups) * kernel,
        "layers": layers * 2.0 * steps * (4 * width**2 + 2 * width * wide),
        "attention": layers * 4.0 * steps**2 * width,
    }


# --- loading --------------------------------------------------------------------------------------


def load_encoder(
    folder: Path, layers: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Encoder, str]:
    """The encoder in a folder of ``transformers``' layout, cut, and the SHA-256 of its weights.

    Safetensors or ``.bin``, in one file or sharded. Only tensors of the cut are read, one portion
    at a time, into a model of the wanted ``dtype``: memory peaks at its size and a portion. The
    hash is over names and content of what was read: the cut and the whole model have the same.
    ``ValueError`` naming the file and what is wrong with it.
    """
    config = read_config(folder)
    wanted = tensor_names(config, layers)
    with torch.device("meta"):
        encoder = Encoder(config, layers)
    encoder = encoder.to(dtype).to_empty(device="cpu")
    targets, sums, norm = encoder.state_dict(), {}, {}
    for name, tensor in read_tensors(folder, wanted):
        sums[name] = _sha256(tensor)
        require_finite(folder, {name: tensor})
        if name in targets:
            _fill(targets[name], tensor, name, folder)
        else:
            norm[name] = tensor.to(torch.float32, copy=True)
    sha256 = _digest(sums, wanted, folder)
    # Weight norm over the kernel's taps (dim=2): gain times direction.
    direction_OIK = norm[DIRECTION]
    fused_OIK = direction_OIK.mul_(norm[GAIN] / direction_OIK.norm(dim=(0, 1), keepdim=True))
    _fill(targets[POSITIONS + "weight"], fused_OIK, "weight", folder)
    return encoder.eval().requires_grad_(False), sha256


def encoder_sha256(folder: Path, layers: Sequence[int]) -> str:
    """The hash that ``load_encoder`` gives: the file's tensors are read, no network is built.

    ``ValueError`` naming the file and what is wrong with it.
    """
    wanted = tensor_names(read_config(folder), layers)
    sums = {name: _sha256(tensor) for name, tensor in read_tensors(folder, wanted)}
    return _digest(sums, wanted, folder)


def _digest(sums: dict[str, str], wanted: set[str], folder: Path) -> str:
    if missing := sorted(wanted - sums.keys()):
        raise UserError(f"{folder}: lacks {len(missing)} tensors, such as {missing[0]!r}")
    return digest(sums)


def tensor_names(config: Any, layers: Sequence[int]) -> set[str]:
    """Names in a checkpoint of the tensors of the encoder's cut, the weight norm's two older ones.

    ``ValueError`` for a layer that the model has not.
    """
    _require_layers(config, layers)
    front, linear = "feature_extractor.conv_layers.", ("weight", "bias")
    parts = [f"{front}{i}.layer_norm." for i in range(len(config.conv_dim))]
    if config.feat_extract_norm != "layer":  # of groups: in the first layer alone
        parts = parts[:1]
    parts += ["feature_projection.layer_norm.", "feature_projection.projection."]
    parts += [f"encoder.layers.{i}.{part}." for i in range(max(layers)) for part in LAYER_PARTS]
    convs = {f"{front}{i}.conv.{n}" for i in range(len(config.conv_dim)) for n in linear}
    if not config.conv_bias:
        convs = {name for name in convs if not name.endswith("bias")}
    return (
        {part + name for part in parts for name in linear}
        | convs
        | {POSITIONS + "bias", GAIN, DIRECTION}
    )


def _require_layers(config: Any, layers: Sequence[int]) -> None:
    if max(layers) > config.num_hidden_layers:
        raise UserError(f"layer {max(layers)}: the model has {config.num_hidden_layers}")


def read_config(folder: Path) -> Any:
    """``config.json`` as transformers' ``Wav2Vec2Config``. ``ValueError`` if it is no XLS-R's."""
    path = folder / "config.json"
    try:
        values = json_object(path.read_bytes(), path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} holds no model") from None
    return config_from(values, path)


def config_from(values: Any, where: Path) -> Any:
    """``Wav2Vec2Config`` of a JSON object out of ``where``. ``ValueError`` if it is no XLS-R's."""
    from transformers import Wav2Vec2Config

    if values.get("model_type") != "wav2vec2" or not values.get("do_stable_layer_norm"):
        raise UserError(f"{where}: not an XLS-R (wav2vec2 with do_stable_layer_norm)")
    return Wav2Vec2Config.from_dict(values)


def encoder_of(
    config: Any,
    layers: Sequence[int],
    state: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """An encoder of its own state dict, frozen, without a second copy where the dtype is the same.

    Layers may lack attention heads and feed-forward units: they are as wide as their weights.
    ``ValueError`` for a layer that the model has not, ``RuntimeError`` for tensors that do not fit.
    """
    _require_layers(config, layers)
    with torch.device("meta"):
        encoder = Encoder(config, layers)
        narrow(encoder.encoder.layers, state, "encoder.layers.")
    encoder.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    return encoder.eval().requires_grad_(False)


def _fill(target: Tensor, tensor: Tensor, name: str, folder: Path) -> None:
    if target.shape != tensor.shape:
        raise UserError(
            f"{folder}: tensor {name!r} has shape {tuple(tensor.shape)}, config.json says "
            f"{tuple(target.shape)}"
        )
    target.copy_(tensor)


def _sha256(tensor: Tensor) -> str:
    state = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    state.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def read_tensors(folder: Path, wanted: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint by their name in the bare model, those that are wanted (None: all).

    Each is a view of a mapped file and is only good until the next one is asked for.
    """
    for path in _files(folder):
        with _named_errors(path):
            names = [n for n in _names(path) if wanted is None or _bare(n) in wanted]
            mapped = path.suffix == ".safetensors" or _can_map(path)
            portion = PORTION if mapped else max(1, len(names))
            for first in range(0, len(names), portion):
                yield from _read(path, names[first : first + portion])


def _files(folder: Path) -> list[Path]:
    for name in CHECKPOINTS:
        index = folder / f"{name}{INDEX_ENDING}"
        if index.is_file():
            names = json_field(json_object(index.read_bytes(), index), "weight_map", dict, index)
            shards = sorted(set(map(str, names.values())))
            return [folder / Path(shard).name for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder}: holds none of {', '.join(CHECKPOINTS)}, nor their {INDEX_ENDING}")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the index beside it names it") from None
    except (safetensors.SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise UserError(f"{path}: damaged or no checkpoint: {error}") from error


def _bare(name: str) -> str:
    """A tensor's name without a pre-training head's prefix, of weight norm's names the older."""
    name = name.removeprefix("wav2vec2.")
    return RENAMED.get(name, name)


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            return list(file.keys())
    return list(torch.load(path, map_location="meta", weights_only=True, mmap=_can_map(path)))


def _can_map(path: Path) -> bool:
    """Whether a file of PyTorch is not of the format before zip, which is read whole."""
    return zipfile.is_zipfile(path)


def _read(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            for name in names:
                yield _bare(name), file.get_tensor(name)
        return
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_map(path))
    for name in names:
        yield _bare(name), content[name]
