"""How far exported files are from the network they were made of, and how fast they are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from train.audio import Wave
from train.evaluation.tables import markdown
from train.metrics import agreement
from train.scoring.base import Scorer
from train.scoring.onnx_scorer import OnnxScorer

TIMED = 20
"""Clips that are timed at most: a ratio of medians needs no more."""


@dataclass(frozen=True)
class Parity:
    """One exported file beside PyTorch in float32, over the same windows.

    ``speed`` is PyTorch's CPU seconds a window over the file's, one thread, taken in turns.
    """

    clips: int
    max: float
    p99: float
    mean: float
    bias: float
    pcc: float | None
    bytes: int
    cpu_seconds: float
    torch_cpu_seconds: float
    speed: float


def compare(scorer: Scorer, files: Sequence[Path], waves: Sequence[Wave]) -> dict[str, Parity]:
    """By file name: its parity with a PyTorch scorer on these windows (122880,)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exported = {path.name: OnnxScorer(path, threads=1) for path in files}
        scorers = {"torch": scorer, **exported}
        scores, seconds = _in_turns(scorers, waves)
    finally:
        torch.set_num_threads(threads)
    sizes = {path.name: path.stat().st_size for path in files}
    return {name: _parity(name, scores, seconds, sizes[name]) for name in exported}


Columns = dict[str, NDArray[np.float64]]


def _in_turns(scorers: Mapping[str, Scorer], waves: Sequence[Wave]) -> tuple[Columns, Columns]:
    """(scores, CPU seconds) a window by scorer; the first window warms up and is not timed."""
    scores: dict[str, list[float]] = {name: [] for name in scorers}
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for scorer in scorers.values():
        scorer.score_windows(waves[:1])
    for wave in waves:
        for name, scorer in scorers.items():
            began = time.process_time()
            scores[name] += scorer.score_windows([wave])
            seconds[name].append(time.process_time() - began)
    return (
        {name: np.array(values) for name, values in scores.items()},
        {name: np.array(values[:TIMED]) for name, values in seconds.items()},
    )


def _parity(name: str, scores: Columns, seconds: Columns, size: int) -> Parity:
    difference = scores[name] - scores["torch"]
    mine, torchs = float(np.median(seconds[name])), float(np.median(seconds["torch"]))
    return Parity(
        len(difference),
        float(np.abs(difference).max()),
        float(np.percentile(np.abs(difference), 99)),
        float(np.abs(difference).mean()),
        float(difference.mean()),
        agreement(scores["torch"], scores[name]).pcc,
        size,
        mine,
        torchs,
        torchs / mine,
    )


def as_markdown(found: Mapping[str, Parity]) -> str:
    """A table: differences in MOS to PyTorch in float32, and speed as a multiple of it."""
    head = "file|MB|clips|largest difference|99th percentile|mean|PCC|speed"
    rows = [
        (
            *(f"`{name}`", f"{row.bytes / 1e6:.1f}", f"{row.clips}"),
            *(f"{value:.2g}" for value in (row.max, row.p99, row.mean)),
            *("-" if row.pcc is None else f"{row.pcc:.6f}", f"{row.speed:.2f}"),
        )
        for name, row in found.items()
    ]
    return "\n".join([*markdown(head.split("|"), rows), ""])
