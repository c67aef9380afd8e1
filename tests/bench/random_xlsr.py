"""XLS-R checkpoints of the real shapes with seeded random weights, in the official files' format.

For benches and tests, where the real ones cannot be had: speed, memory and equality do not depend
on what was learnt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from train.models.xlsr import INDEX_ENDING

SIZES = {"300m": (1024, 24, 4096), "1b": (1280, 48, 5120), "2b": (1920, 48, 7680)}
"""Hidden size, layers, feed-forward size (XLS-R paper, table 2); 16 heads each."""

LAYERS = {"300m": 5, "1b": 10, "2b": 10}
"""Where each size is cut (teachers.yaml)."""

SHARD_BYTES = 1 << 30


def config_of(size: str, layers: int | None = None, **changes: Any) -> Any:
    """The ``Wav2Vec2Config`` of an XLS-R size, cut to ``layers``."""
    from transformers import Wav2Vec2Config

    hidden, all_layers, wide = SIZES[size]
    values: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers or all_layers,
        "intermediate_size": wide,
        "num_attention_heads": 16,
        "feat_extract_norm": "layer",
        "conv_bias": True,
        "do_stable_layer_norm": True,
        "layerdrop": 0.0,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    }
    return Wav2Vec2Config(**(values | changes))


def write_checkpoint(
    folder: Path,
    config: Any,
    seed: int = 0,
    ending: str = "safetensors",
    prefix: str = "wav2vec2.",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write ``config.json`` and the weights, sharded where they are larger than ``shard_bytes``.

    One shard is in memory at a time. ``prefix`` is what the names begin with: facebook's files were
    saved with a pre-training head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"model_type": "wav2vec2"}))
    shards = list(_shards(config, shard_bytes))
    stem = "model" if ending == "safetensors" else "pytorch_model"
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        part = "" if len(shards) == 1 else f"-{number + 1:05d}-of-{len(shards):05d}"
        file = f"{stem}{part}.{ending}"
        tensors = {prefix + name: _random(name, shape, seed) for name, shape in names.items()}
        _save(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{ending}{INDEX_ENDING}").write_text(json.dumps(index))
    return folder


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def _shards(config: Any, shard_bytes: int) -> Iterator[dict[str, torch.Size]]:
    """Names and shapes of a whole model's tensors, shard by shard."""
    from transformers import Wav2Vec2Model

    with torch.device("meta"):
        shapes = {n: t.shape for n, t in Wav2Vec2Model(config).state_dict().items()}
    shard: dict[str, torch.Size] = {}
    size = 0
    for name, shape in shapes.items():
        if shard and size + 4 * shape.numel() > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[_official(name)] = shape
        size += 4 * shape.numel()
    yield shard


def _official(name: str) -> str:
    """Weight norm's tensors as they were called when the files were saved."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


def _random(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Norms near the identity, matrices that keep the variance."""
    number = sum(ord(letter) * 31**place % 1_000_003 for place, letter in enumerate(name))
    generator = torch.Generator().manual_seed(seed + number)
    noise = torch.randn(shape, generator=generator)
    if len(shape) < 2 or name.endswith("weight_g"):
        around = 1.0 if "norm.weight" in name or name.endswith("weight_g") else 0.0
        return around + 0.1 * noise
    return noise / math.sqrt(math.prod(shape[1:]))
