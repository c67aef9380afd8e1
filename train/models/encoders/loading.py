"""Encoders by a name, a folder or an address of the hub; written and read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_specs.io.errors import UserError
from data_specs.strict import load
from train.files import write_model
from train.models import weights
from train.models.encoders.conformer import Conformer, ConformerConfig
from train.models.encoders.interface import SpeechEncoder
from train.models.encoders.mel import MelEncoder
from train.models.encoders.student_encoder import StudentEncoder
from train.models.encoders.transformers_encoders import (
    WaveEncoder,
    WhisperEncoder,
    from_checkpoint,
)
from train.models.loading import find_student, model_in
from train.models.tensors import read_about, read_weights

KINDS: dict[str, type[SpeechEncoder]] = {
    one.kind: one for one in (MelEncoder, StudentEncoder, WaveEncoder, WhisperEncoder, Conformer)
}
"""What ``encoder.json`` may name."""

NAME = "encoder"
"""``encoder.json`` and ``encoder.safetensors`` of a folder."""

HUB_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")


def save_encoder(folder: Path, encoder: SpeechEncoder) -> None:
    """Write an encoder, so that ``load_encoder`` of the folder reads it."""
    about = {"kind": encoder.kind, "about": encoder.about(), **encoder.sizes()}
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / f"{NAME}.safetensors", encoder.state_dict(), about)


def encoder_of(where: Path, about: Mapping[str, Any], state: Mapping[str, Tensor]) -> SpeechEncoder:
    """The encoder that a description and a state dict make. ``UserError`` if they do not fit."""
    if about.get("kind") not in KINDS:
        raise UserError(f"{where}: {about.get('kind')!r} is no kind of encoder: {', '.join(KINDS)}")
    try:
        return KINDS[about["kind"]].build(about["about"], state).eval()
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: does not fit its description: {error}") from error


def load_encoder(source: str | Path) -> SpeechEncoder:
    """An encoder in eval mode: ``log-mel``, ``v7``, a folder, or ``org/name`` of the hub.

    ``conformer``, or a YAML file of its sizes, has the fresh weights of seed 0.

    A folder holds what ``save_encoder`` or a finetuning wrote, a checkpoint in the layout of
    ``transformers``, or a student's run; a name of ``data_specs/weights.yaml`` is its folder in the
    cache. ``UserError`` saying what is wrong, or what to do.
    """
    if str(source) == MelEncoder.kind:
        return MelEncoder().eval()
    if str(source) == "v7":
        return StudentEncoder(find_student("v7")[0]).eval()
    folder = Path(source)
    if str(source) == Conformer.kind or folder.suffix in (".yaml", ".yml"):
        return _fresh_conformer(folder)
    if not folder.exists() and "/" not in str(source):
        folder = weights.cached(str(source))
    if not folder.exists() and str(source).count("/") == 1:
        folder = _from_hub(str(source))
    if (folder / f"{NAME}.json").is_file():
        path = folder / f"{NAME}.safetensors"
        about = read_about(path.with_suffix(".json"))
        return encoder_of(path, about, read_weights(path, about))
    if (folder / "config.json").is_file() and not (folder / "best.pt").is_file():
        return from_checkpoint(folder)
    try:
        return StudentEncoder(find_student(model_in(folder))[0]).eval()
    except UserError as error:
        raise UserError(
            f"{source}: no encoder: give log-mel, v7, a folder with config.json and safetensors, a "
            f"finetuned model, a student's run, or org/name of the hub ({error})"
        ) from error


def _fresh_conformer(sizes: Path) -> SpeechEncoder:
    config = load(ConformerConfig, sizes) if sizes.suffix else ConformerConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Conformer(config).eval()


def _from_hub(name: str) -> Path:
    """The hub's own client keeps the files; only configuration and safetensors are fetched."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's kinds are its own, and quote addresses
        raise UserError(
            f"{name}: no such folder, and the hub does not give it ({type(error).__name__}): check "
            "the name and the network, or give the folder of a checkpoint"
        ) from None
