"""The teacher: scores a group of finished PCM, exactly the samples that the student will read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_specs.recipe import Teacher as TeacherSpec
from data_specs.sample import SampleRecord
from pipeline.audio import encode_flac, from_pcm
from pipeline.degrade import licences
from pipeline.render import Rendered, pcm_sha256
from pipeline.shards import Row


class Teacher(Protocol):
    """What ``train.models.teacher.load_teacher`` gives."""

    name: str
    weights_sha256: str

    def score(self, waves_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]: ...


class TeacherError(RuntimeError):
    """The teacher gave something that is no score; the attempt fails, nothing is dropped."""


def load(spec: TeacherSpec, device: str = "cpu") -> Teacher:
    """Load the recipe's teacher. Raises ``ValueError`` naming the teachers there are."""
    from train.models.teacher import load_teacher

    return load_teacher(spec.name, device=device, precision=spec.precision)


def slow_precision(spec: TeacherSpec, device: str) -> str:
    """A warning where the recipe's precision is slow on this device, else an empty string."""
    import torch

    from train.models.teacher import has_fast_bf16

    if spec.precision != "bf16" or has_fast_bf16(torch.device(device)):
        return ""
    return (
        "warning: this machine computes bf16 slowly (about 6 times the time of fp32); a copy of "
        "the recipe with teacher.precision: fp32 labels faster here, as another dataset"
    )


def label_group(teacher: Teacher, group: Sequence[Rendered]) -> list[Row]:
    """Score the samples of a group that were made, as one batch, and encode them."""
    made = [sample.pcm for sample in group if sample.pcm is not None]
    mos: list[float] = []
    logits: list[float] = []
    if made:
        mos_B, logit_B = teacher.score(np.stack([from_pcm(pcm) for pcm in made]))
        mos = [float(m) for m in mos_B]
        logits = [] if logit_B is None else [float(value) for value in logit_B]
    given: Sequence[float | None] = logits or [None] * len(mos)
    scores = iter(zip(mos, given, strict=True))
    return [_row(teacher, s, *next(scores)) if s.pcm is not None else _drop(s) for s in group]


def _row(teacher: Teacher, sample: Rendered, mos: float, logit: float | None) -> Row:
    if sample.pcm is None or not math.isfinite(mos):
        raise TeacherError(f"teacher {teacher.name!r} scored sample {sample.plan.key} as {mos}")
    record = SampleRecord(
        key=sample.plan.key,
        mos=mos,
        logit=logit,
        teacher=teacher.name,
        teacher_sha256=teacher.weights_sha256,
        pcm_sha256=pcm_sha256(sample.pcm),
        licences=licences(step.kind for step in sample.plan.steps),
        plan=sample.plan.model_dump(mode="json"),
    )
    return Row(sample.plan.key, encode_flac(sample.pcm), record.model_dump_json().encode())


def _drop(sample: Rendered) -> Row:
    return Row(sample.plan.key, None, None, sample.reason, sample.detail)
