"""From plan to PCM: plain functions on groups of samples, no Ray, no teacher, nothing drawn."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_specs.io.addresses import PathOrUrl
from data_specs.io.cache import remote_clip
from data_specs.io.errors import UserError
from data_specs.io.names import below, inside
from data_specs.sample import CROP_SAMPLES
from pipeline.audio import AudioFile, DropSample, Wave, read_part, read_whole, to_pcm
from pipeline.render import processors
from pipeline.render.mix import add_noise, fit_length, guard_peak, loop, require_sound, reverberate
from pipeline.render.mix import set_level as set_level_dbfs
from pipeline.render.plan import FilePlan, NoisePlan, RoomPlan, SamplePlan, Step
from pipeline.render.processors.interface import Run

Roots = dict[str, list[PathOrUrl]]
"""Corpus name to its folders: paths on this machine, or addresses."""

RENDER_VERSION = 3
"""Raised whenever the same plan would give other audio; part of the dataset's hash."""

RESPONSE_SECONDS = CROP_SAMPLES / 16_000
"""A longer impulse response is not audible within a crop."""


@dataclass(frozen=True)
class Rendered:
    """A sample's audio, or why there is none."""

    plan: SamplePlan
    pcm: NDArray[np.int16] | None
    reason: str = ""
    detail: str = ""


Slot = Wave | DropSample


def render_group(
    plans: Sequence[SamplePlan], roots: Roots, run: Run = processors.run
) -> list[Rendered]:
    """Make the audio of a group. Samples that cannot be made come back with their reason.

    A recording that is shorter than a crop keeps its own length until all is done to it, so that
    levels, SNRs and shares are of the audible part; the zeros that student and teacher put behind a
    short clip come last.
    """
    slots: list[Slot] = [_attempt(partial(_read_speech, plan, roots)) for plan in plans]
    _run_steps(slots, [plan.steps[: plan.speech_steps] for plan in plans], run)
    for i, plan in enumerate(plans):
        wave = slots[i]
        if isinstance(wave, np.ndarray):
            slots[i] = _attempt(partial(mixed, wave, plan.room, plan.noise, plan.level_dbfs, roots))
    _run_steps(slots, [plan.steps[plan.speech_steps :] for plan in plans], run)
    return [_finish(plan, slot) for plan, slot in zip(plans, slots, strict=True)]


def _attempt(make: Callable[[], Wave]) -> Slot:
    try:
        return make()
    except DropSample as drop:
        return drop


def _read_speech(plan: SamplePlan, roots: Roots) -> Wave:
    path = find(roots, plan.speech)
    wave = read_part(path, plan.speech.start_sample, CROP_SAMPLES, plan.speed)
    require_sound(wave, str(path))
    return wave


def find(roots: Roots, file: FilePlan) -> AudioFile:
    """Where a file of the plan lies.

    Raises ``OSError`` naming what to give, ``UserError`` for a path that leads out of its folder.
    """
    folders = roots.get(file.corpus, [])
    if not 0 <= file.root < len(folders):
        raise OSError(
            f"folder {file.root + 1} of corpus {file.corpus!r} was not given: "
            f"--corpus {file.corpus}=DIR"
        )
    folder = folders[file.root]
    inside(file.path)
    return remote_clip(folder, file.path) if isinstance(folder, str) else folder / file.path


def require_below(plans: Sequence[SamplePlan], roots: Roots) -> None:
    """Raise ``UserError`` for a record's file that a link takes out of its corpus."""
    for plan in plans:
        for file in filter(None, (plan.speech, plan.room, plan.noise)):
            folders = roots.get(file.corpus, [])
            if file.root < len(folders) and isinstance(folder := folders[file.root], Path):
                inside(file.path)
                try:
                    below(folder, file.path)
                except UserError as error:
                    raise UserError(
                        f"{error}; where dataset and corpora are your own, give --allow-outside"
                    ) from None


def mixed(
    speech: Wave, room: RoomPlan | None, noise: NoisePlan | None, level_dbfs: float, roots: Roots
) -> Wave:
    """Speech (T,) in a room, with noise, at a level. Raises ``DropSample`` for a listed reason."""
    if room:
        path = find(roots, room)
        modified_ns = os.stat(path).st_mtime_ns if isinstance(path, Path) else 0
        speech = reverberate(speech, _response(path, modified_ns), str(path))
    if noise:
        wave = _read_noise(noise, roots, len(speech))
        speech = add_noise(speech, wave, noise.snr_db, noise.path)
    return set_level_dbfs(speech, level_dbfs)


@lru_cache(maxsize=64)
def _response(path: AudioFile, modified_ns: int) -> Wave:
    """Impulse responses come again and again: keep some (64 x 7.68 s is 31 MB)."""
    return read_whole(path, RESPONSE_SECONDS)


def _read_noise(plan: NoisePlan, roots: Roots, count: int) -> Wave:
    path = find(roots, plan)
    wave = read_part(path, plan.start_sample, count)
    if len(wave) < count:  # the file ends: go on from its beginning
        wave = loop(wave, read_part(path, 0, CROP_SAMPLES), count)
    return wave


def _run_steps(
    slots: list[Slot], steps: Sequence[Sequence[Step]], run: Run = processors.run
) -> None:
    """Run the steps of all samples, one stage after the other.

    Each kind is a batch of its own, and each length: short clips are not padded to be batched.
    """
    for stage in _stage_order(steps):
        batches: dict[tuple[str, int], list[tuple[int, Step]]] = defaultdict(list)
        for i, sample_steps in enumerate(steps):
            for step in sample_steps:
                if step.stage == stage and isinstance(slot := slots[i], np.ndarray):
                    batches[step.kind, len(slot)].append((i, step))
        for (kind, _), members in sorted(batches.items(), key=lambda batch: batch[0]):
            _run_batch(kind, members, slots, run)


def _stage_order(steps: Sequence[Sequence[Step]]) -> list[str]:
    """One order of the stages that keeps every sample's own (each has part of the recipe's)."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for sample_steps in steps:
        names = [step.stage for step in sample_steps]
        for name in names:
            sorter.add(name)
        for before, after in pairwise(names):
            sorter.add(after, before)
    return list(sorter.static_order())


def _run_batch(kind: str, members: list[tuple[int, Step]], slots: list[Slot], run: Run) -> None:
    """Run a batch; where it fails, one at a time, so that only the culprit is dropped."""
    waves_BT = np.stack([np.asarray(slots[i]) for i, _ in members])
    params = [step.params for _, step in members]
    try:
        results: Sequence[Slot] = list(run(kind, waves_BT, params))
    except DropSample as drop:
        if len(members) > 1:
            for member in members:
                _run_batch(kind, [member], slots, run)
            return
        results = [drop]
    for (i, _), result in zip(members, results, strict=True):
        slots[i] = result


def _finish(plan: SamplePlan, slot: Slot) -> Rendered:
    if isinstance(slot, DropSample):
        return Rendered(plan, None, slot.reason, slot.detail)
    try:
        require_sound(slot, "the finished sample")
    except DropSample as drop:
        return Rendered(plan, None, drop.reason, drop.detail)
    return Rendered(plan, to_pcm(fit_length(guard_peak(slot), CROP_SAMPLES)))
