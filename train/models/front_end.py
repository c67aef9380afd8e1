"""What a teacher's head reads of a wave: MFCC, an encoder's hidden states, features of v7."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from data_specs.strict import digest, unknown
from data_specs.teacher import EncoderStates, Mfcc, StudentFeatures, teacher_table
from data_specs.teacher import FrontEnd as FrontEndSpec
from data_specs.weight import HuggingFace
from train.models import weights
from train.models.encoders.interface import SpeechEncoder, weights_sha256
from train.models.encoders.transformers_encoders import from_checkpoint
from train.models.features import compressed_spectrum, peak_normalise
from train.models.head import TEACHER_TOKENS
from train.models.precision import resolve_precision
from train.models.student import load_v7, v7_weights_path
from train.models.xlsr import CHECKPOINTS, INDEX_ENDING, Encoder, encoder_sha256, load_encoder

MFCC_SHA256 = digest({"mfcc": "torchaudio", "sample_rate": SAMPLE_RATE})


class FrontEnd(Protocol):
    """Waves to frames; loaded, frozen."""

    name: str
    channels: int
    tokens: int
    weights_sha256: str
    device: torch.device

    def frames(self, waves_BT: Tensor) -> Tensor:
        """Features (B, 384, C), float32, of (B, T) waves at 16 kHz of any one length.

        Cropped to the middle 384 frames, or zeros at the end, as published. (B, 384, C, 2) where
        the front end has two layers.
        """
        ...


def centre_crop(frames_BLC: Tensor, tokens: int = TEACHER_TOKENS) -> Tensor:
    """The middle ``tokens`` frames, or all of them and zeros at the end (published code)."""
    length = frames_BLC.shape[1]
    if length < tokens:
        return functional.pad(frames_BLC, (0, 0, 0, tokens - length))
    start = (length - tokens) // 2
    return frames_BLC[:, start : start + tokens]


class MfccFrontEnd:
    """40 coefficients every 12.5 ms, torchaudio's defaults: the published MFCC baseline.

    384 frames are 4.8 s: of a clip of 7.68 s they are the middle. Decibels are floored at 80 below
    a clip's own loudest bin (torchaudio takes the batch's, without a dimension between them).
    """

    name = "mfcc"
    parameter_count = 0
    channels = 40
    tokens = TEACHER_TOKENS

    def __init__(self, device: str = "cpu") -> None:
        from torchaudio.transforms import MFCC

        self.device = torch.device(device)
        self.weights_sha256 = MFCC_SHA256
        with warnings.catch_warnings():  # of 128 mel bands some hold no bin: so it was published
            warnings.filterwarnings("ignore", "At least one mel filterbank")
            self._mfcc = MFCC(sample_rate=SAMPLE_RATE).to(self.device)

    @torch.inference_mode()
    def frames(self, waves_BT: Tensor) -> Tensor:
        mfcc_B1CL: Tensor = self._mfcc(waves_BT.to(self.device).float()[:, None])
        return centre_crop(mfcc_B1CL[:, 0].transpose(1, 2))


class _Network(ABC):
    """What a network gives every 20 ms.

    On a CPU clips go through one at a time, so that a clip's features do not depend on its
    neighbours; on CUDA all of a batch at once.
    """

    tokens = TEACHER_TOKENS
    device: torch.device

    @torch.inference_mode()
    def frames(self, waves_BT: Tensor) -> Tensor:
        waves_BT = waves_BT.to(self.device)
        chunk = 1 if self.device.type == "cpu" else max(1, len(waves_BT))
        return torch.cat([self._frames(part) for part in torch.split(waves_BT, chunk)])

    @abstractmethod
    def _frames(self, waves_BT: Tensor) -> Tensor:
        """Of waves on the device."""


class XlsrFrontEnd(_Network):
    """Hidden states of one or two layers of XLS-R."""

    def __init__(self, name: str, encoder: Encoder, sha256: str, device: str = "cpu") -> None:
        """``sha256`` is that of the weights; the layers are added to it."""
        self.name = name
        self.device = torch.device(device)
        self.encoder = encoder.to(self.device)
        projection = encoder.feature_projection.projection
        self.dtype, self.channels = projection.weight.dtype, int(projection.out_features)
        self.weights_sha256 = digest([sha256, list(encoder.layers)])
        self.parameter_count = sum(p.numel() for p in encoder.parameters())

    def _frames(self, waves_BT: Tensor) -> Tensor:
        return states_of(self.encoder, waves_BT)


def states_of(encoder: Encoder, waves_BT: Tensor) -> Tensor:
    """What a head reads of an encoder, float32: (B, 384, C), of two layers (B, 384, C, 2)."""
    hidden = [centre_crop(found.float()) for found in encoder(waves_BT)]
    return hidden[0] if len(hidden) == 1 else torch.stack(hidden, dim=-1)


class StudentFrontEnd(_Network):
    """What the convolutions of the published student (v7) give its head: 1024 values every 20 ms.

    It reads 7.68 s at any level, as the student does: the middle of a longer clip, and a shorter
    one with zeros after it. A caveat: the authors of the paper trained v7 with people's ratings,
    so its features know of such data, perhaps of the very clips that a head is then evaluated on.
    """

    def __init__(self, name: str, device: str = "cpu", precision: str = "auto") -> None:
        self.name = name
        self.device = torch.device(device)
        self.dtype = resolve_precision(precision, self.device)
        self.weights_sha256 = _student_sha256()
        self._network = load_v7().to(self.device, self.dtype)
        self._network.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.channels = self._network.config.features
        self.parameter_count = sum(p.numel() for p in self._network.parameters())

    def _frames(self, waves_BT: Tensor) -> Tensor:
        waves_BT = centre_crop(waves_BT[..., None], CROP_SAMPLES)[..., 0]
        spectrum_B2FT = compressed_spectrum(peak_normalise(waves_BT)).to(self.dtype)
        return self._network.tokens(spectrum_B2FT).float()


class EncoderFrontEnd(_Network):
    """A layer's states of any encoder of ``train.models.encoders``.

    It hears the middle 7.68 s, so that no more is computed than is read.
    """

    def __init__(self, name: str, encoder: SpeechEncoder, layer: int, device: str = "cpu") -> None:
        if layer >= len(encoder.dims):
            raise UserError(
                f"front end {name!r}: layer {layer}, but it has {len(encoder.dims) - 1}"
            )
        self.name, self.layer = name, layer
        self.device = torch.device(device)
        self.weights_sha256 = digest([weights_sha256(encoder), layer])
        self._encoder = encoder.to(self.device).requires_grad_(False)
        self.channels = encoder.dims[layer]
        self.parameter_count = sum(p.numel() for p in encoder.parameters())

    def _frames(self, waves_BT: Tensor) -> Tensor:
        if waves_BT.shape[1] > CROP_SAMPLES:
            waves_BT = centre_crop(waves_BT[..., None], CROP_SAMPLES)[..., 0]
        lengths_B = torch.full((len(waves_BT),), waves_BT.shape[1], device=self.device)
        return centre_crop(self._encoder(waves_BT, lengths_B).layers[self.layer].float())


def encoder_folder(names: Sequence[str]) -> Path:
    """Where the first of these encoders is: the weights' cache, else the hub's own cache.

    In the weights' cache any file that ``transformers`` would read will do: one file or sharded,
    safetensors or ``.bin``. ``ValueError`` saying what to run where none is there.
    """
    for name in names:
        for folder in (weights.cached(name), _in_hub_cache(name)):
            if folder is not None and _has_checkpoint(folder):
                return folder
    cache = weights.cache_folder()
    raise UserError(
        f"no encoder in {cache} (looked for {', '.join(names)}): run make weights "
        f"NAMES={names[0]}, or copy config.json and the checkpoint to {cache / names[-1]}"
    )


def _has_checkpoint(folder: Path) -> bool:
    files = [name + ending for name in CHECKPOINTS for ending in ("", INDEX_ENDING)]
    return (folder / "config.json").is_file() and any((folder / f).is_file() for f in files)


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    entry = weights.entry_of(name)
    if not isinstance(entry, HuggingFace):
        return None
    found: Any = try_to_load_from_cache(entry.repository, "config.json", revision=entry.revision)
    return Path(found).parent if isinstance(found, str) else None


def load_xlsr(
    name: str, folder: Path, layers: Sequence[int], device: str = "cpu", precision: str = "auto"
) -> XlsrFrontEnd:
    """The encoder in a folder as ``load_encoder`` reads it."""
    dtype = resolve_precision(precision, torch.device(device))
    return XlsrFrontEnd(name, *load_encoder(folder, layers, dtype), device)


def load_front_end(name: str, device: str = "cpu", precision: str = "auto") -> FrontEnd:
    """A front end of ``data_specs/teachers.yaml``.

    ``ValueError`` for an unknown name, or for weights that are missing, saying what to run.
    """
    spec = _spec(name)
    if isinstance(spec, Mfcc):
        return MfccFrontEnd(device)
    if isinstance(spec, StudentFeatures):
        return StudentFrontEnd(name, device, precision)
    folder = encoder_folder(spec.weights)
    if isinstance(spec, EncoderStates):
        return EncoderFrontEnd(name, from_checkpoint(folder), spec.layer, device)
    return load_xlsr(name, folder, spec.layers, device, precision)


# --- what a front end is, without building it -----------------------------------------------------


def front_end_sha256(name: str) -> str:
    """The ``weights_sha256`` of a front end, from its files alone. Errors as ``load_front_end``."""
    spec = _spec(name)
    if isinstance(spec, Mfcc):
        return MFCC_SHA256
    if isinstance(spec, StudentFeatures):
        return _student_sha256()
    folder = encoder_folder(spec.weights)
    if isinstance(spec, EncoderStates):
        return digest([weights_sha256(from_checkpoint(folder)), spec.layer])
    sha256 = encoder_sha256(folder, spec.layers)
    return digest([sha256, list(spec.layers)])


def _student_sha256() -> str:
    return digest({"student-features": sha256_of(v7_weights_path())})


def _spec(name: str) -> FrontEndSpec:
    table = teacher_table().front_ends
    if name not in table:
        raise UserError(unknown("front end", name, table))
    return table[name]
