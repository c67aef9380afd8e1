"""Rated clips that validate: whole conditions, so that none is trained on."""

from __future__ import annotations

from collections.abc import Sequence

from data_specs.io.errors import UserError
from data_specs.rated import RatedClip
from data_specs.strict import digest
from train.data.order import generator

HOLD_OUT = 0.1
"""Share of a dataset's conditions (systems, clips) that validate where no file says which."""

STREAM_HOLD_OUT = 1
"""The random generator's stream of this decision (``train.teacher`` has the others)."""


def hold_out(clips: Sequence[RatedClip], seed: int, share: float = HOLD_OUT) -> list[bool]:
    """Which clips validate: in every dataset a share of its conditions, at least one.

    By condition where all clips of the dataset have one, else by system, else by clip: a head that
    was trained on a condition must not be validated on it. Which ones depends on the seed and the
    dataset's name alone. ``ValueError`` for a dataset with less than two of them.
    """
    held = [False] * len(clips)
    for name in sorted({clip.dataset for clip in clips}):
        rows = [row for row, clip in enumerate(clips) if clip.dataset == name]
        kind, keys = groups_of([clips[row] for row in rows])
        groups = sorted(set(keys))
        if len(groups) < 2:
            raise UserError(f"dataset {name!r} has one {kind} only: say which clips validate")
        order = generator(seed, STREAM_HOLD_OUT, int(digest(name)[:8], 16))
        chosen = order.permutation(len(groups))[: max(1, round(share * len(groups)))]
        picked = {groups[number] for number in chosen}
        for row, key in zip(rows, keys, strict=True):
            held[row] = key in picked
    return held


def held_apart(
    clips: Sequence[RatedClip], seed: int, share: float = HOLD_OUT
) -> tuple[list[RatedClip], list[RatedClip]]:
    """The clips to train on and those that validate, as ``hold_out`` says."""
    apart = hold_out(clips, seed, share)
    kept = [clip for clip, out in zip(clips, apart, strict=True) if not out]
    return kept, [clip for clip, out in zip(clips, apart, strict=True) if out]


def groups_of(clips: Sequence[RatedClip]) -> tuple[str, list[str]]:
    """What a dataset is held out by, and every clip's value of it."""
    for kind in ("condition", "system"):
        keys = [getattr(clip, kind) for clip in clips]
        if all(key is not None for key in keys):
            return kind, keys
    return "clip", [str(clip.path) for clip in clips]
