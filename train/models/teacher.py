"""Teachers: what gives a clip its pseudo-label.

One interface for all: the pipeline's labeller knows ``Teacher`` and ``load_teacher`` only. Their
names are in ``data_specs/teachers.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.io.waves import audible_samples, filled
from data_specs.strict import digest, unknown
from data_specs.teacher import (
    MEAN,
    DnsMos,
    Mean,
    PublishedHead,
    Student,
    TrainedHead,
    parts_of,
    teacher_table,
)
from data_specs.teacher import Teacher as TeacherSpec
from train.models import pruned, weights
from train.models.calibration import Calibration
from train.models.features import Floats, Waves, checked_waves, compressed_spectrum, peak_normalise
from train.models.head_teacher import (
    HEAD_JSON,
    Identity,
    identify_pruned,
    identify_published,
    identify_trained,
    load_pruned_teacher,
    load_published,
    load_trained,
)
from train.models.loading import model_in, read_model
from train.models.precision import resolve_precision
from train.models.student import Student as StudentNetwork
from train.models.student import load_v7, mos_of, v7_weights_path


class Teacher(Protocol):
    """A loaded model that scores clips of 7.68 s.

    ``calibration`` maps between its scale and that of each rated set that it was trained on.
    """

    name: str
    weights_sha256: str
    calibration: Calibration | None

    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        """Scores of a (B, 122880) float32 batch at 16 kHz, within -1 to 1.

        Returns mean opinion scores (B,), 1 to 5, and the logits (B,) before the sigmoid, or
        None for a teacher that has none. ``ValueError`` for another shape or a value that is
        not finite.
        """
        ...


class StudentTeacher:
    """A student as a teacher.

    On a CPU the convolutions take one clip at a time: their maps then stay in the cache and in
    memory that is already mapped (bf16, one Zen 4 core: 124 ms a clip; 139 in a batch of 8), and
    a clip's score does not depend on its neighbours. Weights are converted to bf16 once, and
    laid out channels-last (160 ms a clip otherwise).
    """

    calibration: Calibration | None = None

    def __init__(
        self,
        name: str,
        network: StudentNetwork,
        weights_sha256: str,
        device: str = "cpu",
        precision: str = "auto",
        parameters: int | None = None,
    ) -> None:
        """``parameters``: how many are alive, if not all of the network's."""
        self.name = name
        self.weights_sha256 = weights_sha256
        self.device = torch.device(device)
        self.dtype = resolve_precision(precision, self.device)
        self._network = network.to(self.device, self.dtype)
        self._network.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameter_count = parameters or sum(p.numel() for p in network.parameters())
        self._chunk = 1 if self.device.type == "cpu" else 16

    @torch.inference_mode()
    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        waves_BT = checked_waves(waves_BT).to(self.device)
        if not len(waves_BT):
            return np.empty(0, np.float32), np.empty(0, np.float32)
        logits_B = torch.cat([self._logits(chunk) for chunk in torch.split(waves_BT, self._chunk)])
        # The sigmoid in float64: in float32 its last bit depends on a clip's place in the batch.
        return mos_of(logits_B.double()).float().cpu().numpy(), logits_B.cpu().numpy()

    def _logits(self, waves_BT: Tensor) -> Tensor:
        spectrum_B2FT = compressed_spectrum(peak_normalise(waves_BT)).to(self.dtype)
        logits_B: Tensor = self._network.head(self._network.tokens(spectrum_B2FT))
        return logits_B.float()


class MeanTeacher:
    """The mean score of several teachers, each on its own scale, by weight; no logit."""

    calibration: Calibration | None = None

    def __init__(self, teachers: Mapping[str, Teacher], shares: Mapping[str, float]) -> None:
        self.teachers, self.shares = teachers, shares
        mean = _mean_of(teachers, shares)
        self.name, self.weights_sha256 = mean.name, mean.weights_sha256
        counts: list[Any] = [getattr(t, "parameter_count", None) for t in teachers.values()]
        self.parameter_count = None if None in counts else sum(counts)

    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        scores = [teacher.score(waves_BT)[0] for teacher in self.teachers.values()]
        mean_B = np.average(np.asarray(scores, np.float64), axis=0, weights=[*self.shares.values()])
        return np.asarray(mean_B, np.float32), None


class FilledTeacher:
    """A teacher that hears a clip again where digital silence was put behind it."""

    def __init__(self, name: str, teacher: Teacher) -> None:
        filled = _filled(name, teacher)
        self.name, self.weights_sha256 = name, filled.weights_sha256
        self.teacher = teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def score(self, waves_BT: Waves) -> tuple[Floats, Floats | None]:
        waves = checked_waves(waves_BT).numpy(force=True)
        heard = [filled(wave_T[: audible_samples(wave_T)], "repeat") for wave_T in waves]
        return self.teacher.score(np.stack(heard) if heard else waves)


def _mean_of(parts: Mapping[str, Teacher | Identity], shares: Mapping[str, float]) -> Identity:
    """Named by its parts; equal shares are not part of the identity."""
    even = len(set(shares.values())) == 1
    what = [[t.name, t.weights_sha256, *([] if even else [shares[n]])] for n, t in parts.items()]
    return Identity(MEAN + "+".join(t.name for t in parts.values()), digest(what))


def _filled(name: str, teacher: Teacher | Identity) -> Identity:
    return Identity(name, digest(["repeat", teacher.weights_sha256]))


def _shares(name: str, spec: TeacherSpec | None) -> dict[str, float] | None:
    """The parts of a mean and their weights; None for any other teacher."""
    if isinstance(spec, Mean):
        return spec.of
    return dict.fromkeys(parts_of(name), 1.0) if name.startswith(MEAN) else None


def _where(part: str, device: str, precision: str) -> tuple[str, str]:
    """What a part of a mean runs on, and in: DNSMOS on the CPU, wherever the others are."""
    on_cpu = isinstance(teacher_table().teachers.get(part), DnsMos)
    return ("cpu", "fp32") if on_cpu else (device, precision)


def identify_teacher(name: str | Path, device: str = "cpu", precision: str = "auto") -> Identity:
    """What ``load_teacher`` would load, from the files alone: no encoder or student is built.

    The device need not be here. Raises ``ValueError`` as ``load_teacher`` does.
    """
    text = str(name)
    spec = teacher_table().teachers.get(text)
    found = _identified(text, spec, device, precision)
    return _filled(text, found) if spec and spec.filling == "repeat" else found


def _identified(name: str, spec: TeacherSpec | None, device: str, precision: str) -> Identity:
    if shares := _shares(name, spec):
        parts = {part: identify_teacher(part, *_where(part, device, precision)) for part in shares}
        return _mean_of(parts, shares)
    if isinstance(spec, DnsMos):
        from train.models import dnsmos

        dnsmos.require_cpu(name, device, precision)
        return Identity(name, sha256_of(dnsmos.weights_path(spec, name)))
    resolve_precision(precision, torch.device(device))
    if isinstance(spec, Student):
        return Identity(name, sha256_of(v7_weights_path()))
    if isinstance(spec, PublishedHead):
        return identify_published(name, spec)
    folder = _folder(name, spec)
    if (folder / HEAD_JSON).is_file():
        return identify_trained(name, folder)
    if pruned.read_about(folder).get("kind") == "teacher":
        return identify_pruned(folder)
    if pruned.is_pruned(folder):
        return Identity(folder.name, pruned.pruned_sha256(folder)[0])
    return Identity(folder.name, sha256_of(model_in(folder)))


def load_teacher(name: str | Path, device: str = "cpu", precision: str = "auto") -> Teacher:
    """Load a teacher by its name in ``teachers.yaml``, or ``mean:a+b``, or a head's folder.

    A head of your own, a pruned teacher and a pruned or shrunk student are called by their folder:
    a path, or a name in the weights' cache.
    ``precision`` is "fp32", "bf16", "fp16" or "auto": bf16 on CUDA and on CPUs with bf16
    instructions, else fp32. ``ValueError`` for an unknown name, a missing package or weights (it
    says what to run), or what it cannot run on.
    """
    text = str(name)
    spec = teacher_table().teachers.get(text)
    found = _loaded(text, spec, device, precision)
    return FilledTeacher(text, found) if spec and spec.filling == "repeat" else found


def _loaded(name: str, spec: TeacherSpec | None, device: str, precision: str) -> Teacher:
    if shares := _shares(name, spec):
        parts = {part: load_teacher(part, *_where(part, device, precision)) for part in shares}
        return MeanTeacher(parts, shares)
    if isinstance(spec, Student):
        sha256 = sha256_of(v7_weights_path())
        return StudentTeacher(name, load_v7(), sha256, device, precision)
    if isinstance(spec, DnsMos):
        from train.models.dnsmos import DnsMosTeacher

        return DnsMosTeacher(spec, name, device, precision)
    if isinstance(spec, PublishedHead):
        return load_published(name, spec, device, precision)
    folder = _folder(name, spec)
    if (folder / HEAD_JSON).is_file():
        return load_trained(name, folder, device, precision)
    if pruned.read_about(folder).get("kind") == "teacher":
        return load_pruned_teacher(folder, device, precision)
    path = model_in(folder)
    student, left = read_model(path)
    return StudentTeacher(folder.name, student, sha256_of(path), device, precision, left)


def _folder(name: str, spec: TeacherSpec | None) -> Path:
    """Where a trained head or a whole model is; ``ValueError`` naming the teachers there are."""
    if isinstance(spec, TrainedHead):
        try:
            return weights.find(spec.weights)
        except FileNotFoundError as error:
            raise UserError(f"teacher {name!r}: {error}") from None
    for folder in (weights.cached(name), Path(name)):
        if (folder / HEAD_JSON).is_file() or pruned.holds_model(folder):
            return folder
    known = unknown("teacher", name, teacher_table().teachers)
    raise UserError(f"{known} (or {MEAN}a+b, or the folder of a trained head or pruned model)")
