"""The teacher: scores a group of finished PCM, exactly the samples that the student will read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_specs.io.errors import UserError
from data_specs.recipe import Teacher as TeacherSpec
from data_specs.sample import SampleRecord
from pipeline.audio import encode_flac, from_pcm, pcm_sha256
from pipeline.render.processors import licences
from pipeline.render.render import Rendered

if TYPE_CHECKING:  # for it imports torch
    from train.models.head_teacher import Identity


@dataclass(frozen=True)
class Row:
    """One sample on its way into a shard: audio and record, or the reason why it was dropped."""

    key: str
    flac: bytes | None
    record: bytes | None
    reason: str = ""
    detail: str = ""


class Teacher(Protocol):
    """What ``train.models.teacher.load_teacher`` gives."""

    name: str
    weights_sha256: str

    def score(self, waves_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]: ...


class TeacherError(UserError):
    """The teacher gave something that is no score; the attempt fails, nothing is dropped."""


def load(spec: TeacherSpec, device: str = "cpu") -> Teacher:
    """Load the recipe's teacher. Raises ``ValueError`` naming the teachers there are."""
    from train.models.teacher import load_teacher

    return load_teacher(spec.name, device=device, precision=spec.precision)


def identify(spec: TeacherSpec, device: str = "cpu") -> Identity:
    """Who the recipe's teacher is, from its files alone; the device need not be here.

    Raises ``ValueError`` where ``load`` would for the teacher's name, files, precision or device.
    """
    from train.models.teacher import identify_teacher

    return identify_teacher(spec.name, device, spec.precision)


def calibration(teacher: Identity) -> dict[str, Any] | None:
    """A teacher's maps to the scales of rated sets, or None for one that has none."""
    found = teacher.calibration
    return None if found is None else found.model_dump(mode="json")


def slow_precision(spec: TeacherSpec, device: str) -> str:
    """A warning where the teacher's precision is slow on this device, else an empty string."""
    import torch

    from train.models.precision import has_fast_bf16

    if spec.precision != "bf16" or has_fast_bf16(torch.device(device)):
        return ""
    return (
        "warning: this machine computes bf16 slowly (about 6 times the time of fp32); a copy of "
        "the recipe with teacher.precision: fp32 labels faster here, as another dataset"
    )


def label_group(teacher: Teacher, group: Sequence[Rendered]) -> list[Row]:
    """Score the samples of a group that were made, as one batch, and encode them."""
    found = labels(teacher, {s.plan.key: s.pcm for s in group if s.pcm is not None})
    return [_drop(s) if s.pcm is None else _row(s, s.pcm, found[s.plan.key]) for s in group]


def labels(teacher: Teacher, clips: Mapping[str, NDArray[np.int16]]) -> dict[str, dict[str, Any]]:
    """What the teacher says of each clip, by key, as fields of ``SampleRecord``.

    All are scored as one batch: whoever scores the same samples again in the same groups gets the
    same bits. Raises ``TeacherError`` for a score that is no number.
    """
    if not clips:
        return {}
    mos_B, logit_B = teacher.score(np.stack([from_pcm(pcm) for pcm in clips.values()]))
    logits = [None] * len(mos_B) if logit_B is None else logit_B.tolist()
    who = {"teacher": teacher.name, "teacher_sha256": teacher.weights_sha256}
    found = {}
    for key, mos, logit in zip(clips, map(float, mos_B), logits, strict=True):
        if not math.isfinite(mos):
            raise TeacherError(f"teacher {teacher.name!r} scored sample {key} as {mos}")
        found[key] = {"mos": mos, "logit": logit, **who}
    return found


def _row(sample: Rendered, pcm: NDArray[np.int16], label: dict[str, Any]) -> Row:
    record = SampleRecord(
        key=sample.plan.key,
        pcm_sha256=pcm_sha256(pcm),
        licences=licences(step.kind for step in sample.plan.steps),
        plan=sample.plan.model_dump(mode="json"),
        **label,
    )
    return Row(sample.plan.key, encode_flac(pcm), record.model_dump_json().encode())


def _drop(sample: Rendered) -> Row:
    return Row(sample.plan.key, None, None, sample.reason, sample.detail)
