"""Teachers made of a front end and a head: the published ones, and those trained here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.io.parse import json_field
from data_specs.strict import digest
from data_specs.teacher import PublishedHead
from train.models import weights
from train.models.calibration import Calibration
from train.models.features import Floats, Waves, checked_waves
from train.models.front_end import FrontEnd, XlsrFrontEnd, front_end_sha256, load_front_end
from train.models.head import (
    MOST_LAYERS,
    FusionHead,
    HeadConfig,
    TransformerHead,
    build_head,
    config_of,
    head_state,
)
from train.models.precision import resolve_precision
from train.models.pruned import ABOUT_FILE, load_pruned, parameters_left, pruned_sha256
from train.models.student import mos_of
from train.models.tensors import read_about, read_weights, require_finite
from train.models.xlsr import Encoder, config_from, encoder_of

PUBLISHED_FOLDER = "models/sqa-v2"
"""In the ``xls-r-sqa`` wheel: the checkpoints with the lowest validation loss."""

HEAD_JSON, HEAD_WEIGHTS = "head.json", "head.safetensors"

CUDA_CLIPS = (8, 16, 32)
"""Clips that go through a GPU at once: no other numbers, so that every shape is static."""


class HeadTeacher:
    """A frozen front end, a head in float32, and the universal scale and shift of its logits.

    On a CPU clips are scored one at a time: a clip's score does not depend on its neighbours. On
    CUDA they go in batches of a few sizes, up in one transfer on a stream of its own and back in
    one; called from two threads, the next group's transfer overlaps with this one's work.
    """

    def __init__(
        self,
        name: str,
        front_end: FrontEnd,
        head: TransformerHead,
        head_sha256: str,
        calibration: Calibration | None = None,
    ) -> None:
        self.name = name
        self.front_end = front_end
        self.device = front_end.device
        self.head = head.to(self.device).eval().requires_grad_(False)
        self.calibration = calibration
        own = sum(parameter.numel() for parameter in self.head.parameters())
        self.parameter_count = getattr(front_end, "parameter_count", 0) + own
        self.weights_sha256 = _sha256(front_end.weights_sha256, head_sha256, calibration)

    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        waves_BT = checked_waves(waves_BT)
        if not len(waves_BT):
            return np.empty(0, np.float32), np.empty(0, np.float32)
        on_cuda = self.device.type == "cuda"
        one_by_one = map(self.logits, torch.split(waves_BT, 1))
        logits_B = self._on_cuda(waves_BT) if on_cuda else torch.cat(list(one_by_one))
        return mos_of(logits_B.double()).float().numpy(), logits_B.numpy()

    @torch.inference_mode()
    def logits(self, waves_BT: Tensor) -> Tensor:
        """Logits (B,), float32, of (B, T) waves of any one length, as the published code has it.

        The front end reads all of a clip; the head reads the middle 384 frames.
        """
        logits_B: Tensor = self.head(self.front_end.frames(waves_BT))
        if self.calibration is None:
            return logits_B
        universal = self.calibration.universal
        return logits_B * universal.scale + universal.shift

    def _on_cuda(self, waves_BT: Tensor) -> Tensor:
        clips = len(waves_BT)
        sizes = _cuda_sizes(clips)
        short = sum(sizes) - clips
        copies = torch.cuda.Stream(self.device)
        with torch.cuda.stream(copies):
            padded_BT = functional.pad(waves_BT, (0, 0, 0, short)).pin_memory()
            padded_BT = padded_BT.to(self.device, non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(copies)
        padded_BT.record_stream(torch.cuda.current_stream(self.device))
        parts = [self.logits(part) for part in torch.split(padded_BT, sizes)]
        return torch.cat(parts)[:clips].cpu()


def _cuda_sizes(clips: int) -> list[int]:
    """Batches for that many clips, or a few more: as large as possible, the last as small."""
    whole, rest = divmod(clips, CUDA_CLIPS[-1])
    last = [next(size for size in CUDA_CLIPS if size >= rest)] if rest else []
    return [CUDA_CLIPS[-1]] * whole + last


@dataclass(frozen=True)
class Identity:
    """What a dataset states of its teacher: a loaded one has the same."""

    name: str
    weights_sha256: str
    calibration: Calibration | None = None


def _sha256(front_end_sha256: str, head_sha256: str, calibration: Calibration | None) -> str:
    maps = calibration.model_dump(mode="json") if calibration else None
    return digest([front_end_sha256, head_sha256, maps])


def load_published(name: str, spec: PublishedHead, device: str, precision: str) -> HeadTeacher:
    """A head out of the ``xls-r-sqa`` wheel over its front end."""
    front_end = load_front_end(spec.front_end, device, precision)
    head, sha256 = published_head(spec.file, front_end.channels)
    return HeadTeacher(name, front_end, head, sha256)


def identify_published(name: str, spec: PublishedHead) -> Identity:
    """What ``load_published`` gives, from the files alone."""
    head_sha256 = sha256_of(_published_path(spec.file))
    return Identity(name, _sha256(front_end_sha256(spec.front_end), head_sha256, None))


def published_head(file: str, features: int) -> tuple[TransformerHead, str]:
    """A head by its file in the wheel, and the file's SHA-256. ``ValueError`` if it is missing."""
    path = _published_path(file)
    state = head_state(torch.load(path, map_location="cpu", weights_only=True))
    head = _head_for(HeadConfig(features=features), state)
    head.load_state_dict(state)
    return head.eval(), sha256_of(path)


def _head_for(config: HeadConfig, state: Mapping[str, Tensor]) -> TransformerHead:
    """An empty head for these tensors: over one layer, or the fusion of two."""
    if "mix.weight" not in state:
        return build_head(config)
    return FusionHead(**config.model_dump(exclude={"feedforward", "dropout"}))


def _published_path(file: str) -> Path:
    try:
        return weights.find("xls-r-sqa", f"{PUBLISHED_FOLDER}/{file}") / PUBLISHED_FOLDER / file
    except FileNotFoundError as error:
        raise UserError(str(error)) from None


def load_trained(
    name: str, folder: Path, device: str = "cpu", precision: str = "auto"
) -> HeadTeacher:
    """A head that ``python -m train teacher`` wrote into ``folder``.

    Called by a path it is known by its folder's name: labels hold no machine's paths.
    ``ValueError`` naming what is missing or damaged, or a front end with other weights than those
    that the head was trained on.
    """
    about, head, calibration = _read_head(folder)
    front_end = load_front_end(about["front_end"], device, precision)
    _require_front_end(folder, about, front_end.weights_sha256)
    sha256 = sha256_of(folder / HEAD_WEIGHTS)
    return HeadTeacher(Path(name).name, front_end, head, sha256, calibration)


def identify_trained(name: str, folder: Path) -> Identity:
    """What ``load_trained`` gives, from the files alone: of networks only the head is built."""
    about, _, calibration = _read_head(folder)
    front_end = front_end_sha256(about["front_end"])
    _require_front_end(folder, about, front_end)
    sha256 = _sha256(front_end, sha256_of(folder / HEAD_WEIGHTS), calibration)
    return Identity(Path(name).name, sha256, calibration)


def _read_head(folder: Path) -> tuple[dict[str, Any], TransformerHead, Calibration | None]:
    """``head.json``, which must name the front end, and its head and calibration."""
    for name in (HEAD_JSON, HEAD_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}: not the folder of a trained head")
    about = read_about(folder / HEAD_JSON)
    state = read_weights(folder / HEAD_WEIGHTS, about)
    try:
        head = build_head(HeadConfig.model_validate(about["head"]))
        head.load_state_dict(state)
        if missing := {"front_end", "front_end_sha256"} - about.keys():
            raise KeyError(min(missing))
        json_field(about, "front_end", str, folder / HEAD_JSON)
        return about, head, _calibration(about["calibration"])
    except (KeyError, ValidationError, RuntimeError) as error:
        raise UserError(f"{folder / HEAD_JSON}: does not describe a head: {error}") from error


def _calibration(maps: Any) -> Calibration | None:
    return None if maps is None else Calibration.model_validate(maps)


def _require_front_end(folder: Path, about: dict[str, Any], here: str) -> None:
    trained_on: str = json_field(about, "front_end_sha256", str, folder / HEAD_JSON)
    if trained_on != here:
        raise UserError(
            f"{folder}: trained on another {about['front_end']!r} ({trained_on[:12]}) than the one "
            f"here ({here[:12]}): bring those weights, or train the head again"
        )


# --- whose encoder was pruned ---------------------------------------------------------------------

ENCODER, HEAD = "encoder.", "head."
"""What the names of a pruned teacher's weights begin with."""


def describe(teacher: HeadTeacher) -> dict[str, Any]:
    """What ``model.json`` must say of a pruned XLS-R teacher for it to be loaded again.

    ``ValueError`` for a teacher with another front end.
    """
    encoder, head = _encoder_in(teacher), config_of(teacher.head)
    calibration = teacher.calibration
    return {
        "kind": "teacher",
        "teacher": teacher.name,
        "encoder": encoder.config.to_dict() | {"model_type": "wav2vec2"},
        "layers": list(encoder.layers),
        "head": head.model_dump(),
        "calibration": calibration.model_dump(mode="json") if calibration else None,
    }


def weights_of(teacher: HeadTeacher) -> dict[str, Tensor]:
    """The tensors of an XLS-R teacher by the names that a pruned one's folder has. Errors above."""
    parts = ((ENCODER, _encoder_in(teacher)), (HEAD, teacher.head))
    return {
        prefix + name: tensor
        for prefix, module in parts
        for name, tensor in module.state_dict().items()
    }


def _encoder_in(teacher: HeadTeacher) -> Encoder:
    if not isinstance(teacher.front_end, XlsrFrontEnd):
        raise UserError(f"teacher {teacher.name!r} has no XLS-R encoder that could be pruned")
    return teacher.front_end.encoder


def load_pruned_teacher(folder: Path, device: str = "cpu", precision: str = "auto") -> HeadTeacher:
    """A teacher of ``train.models.pruned``'s folder; nothing else is needed for it.

    ``ValueError`` naming what is missing or damaged.
    """
    dtype = resolve_precision(precision, torch.device(device))
    state, about = load_pruned(folder)
    require_finite(folder, state)
    sha256 = about["weights_sha256"]
    try:
        _require_few(about["layers"])
        config = config_from(about["encoder"], folder / ABOUT_FILE)
        encoder = encoder_of(config, about["layers"], _under(ENCODER, state), dtype)
        head = _head_for(HeadConfig.model_validate(about["head"]), _under(HEAD, state))
        head.load_state_dict(_under(HEAD, state))
        calibration = _calibration(about["calibration"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder / ABOUT_FILE}: does not describe a teacher: {error}") from error
    front_end = XlsrFrontEnd(folder.name, encoder, sha256, device)
    teacher = HeadTeacher(folder.name, front_end, head.eval(), sha256, calibration)
    teacher.parameter_count = parameters_left(folder, nn.ModuleList([encoder, head]))
    return teacher


def _require_few(layers: list[int]) -> None:
    """Building even an empty network of a million layers takes all memory."""
    if not 0 < len(layers) <= 2 or max(layers) > MOST_LAYERS:
        raise UserError(f"layers {layers}: one or two of at most {MOST_LAYERS}")


def identify_pruned(folder: Path) -> Identity:
    """What ``load_pruned_teacher`` gives, from the file's own hash."""
    sha256, about = pruned_sha256(folder)
    try:
        encoder, calibration = digest([sha256, about["layers"]]), _calibration(about["calibration"])
    except (KeyError, ValidationError) as error:
        raise UserError(f"{folder / ABOUT_FILE}: does not describe a teacher: {error}") from error
    return Identity(folder.name, _sha256(encoder, sha256, calibration), calibration)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
