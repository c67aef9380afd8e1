"""Scores from an exported ONNX file, without PyTorch's network: ``load("bundle/model.int8.onnx")``.

What the file says of itself (``Facts``) stands in its metadata, where any other program finds it
too: rate, window, hop, the model's name and the hash of the weights it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.audio import Wave
from train.score import MAX_HOP_SAMPLES, Scorer

INPUT, OUTPUT = "waves", "mos"


class Facts(BaseModel):
    """The metadata of an exported file; all of it is text there."""

    model_config = ConfigDict(frozen=True)

    model: str
    weights_sha256: str
    version: str
    precision: str
    sample_rate: int = SAMPLE_RATE
    window_samples: int = CROP_SAMPLES
    hop_samples: int = MAX_HOP_SAMPLES

    def as_text(self) -> dict[str, str]:
        """Name and text of every field."""
        return {name: str(value) for name, value in self.model_dump().items()}


def facts_of(metadata: Mapping[str, str], where: Path) -> Facts:
    """What a file says of itself; ``ValueError`` naming it if it is not one of ours."""
    try:
        facts = Facts.model_validate(dict(metadata))
    except ValidationError as error:
        missing = ", ".join(str(fault["loc"][0]) for fault in error.errors())
        raise UserError(
            f"{where}: its metadata lacks {missing}: not written by `python -m train export`"
        ) from None
    if (facts.sample_rate, facts.window_samples) != (SAMPLE_RATE, CROP_SAMPLES):
        raise UserError(
            f"{where}: reads {facts.window_samples} samples at {facts.sample_rate} Hz; this "
            f"package cuts {CROP_SAMPLES} at {SAMPLE_RATE}"
        )
    return facts


def open_session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU; ``ValueError`` naming the file, or what to install."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: scoring ONNX needs a package: pip install onnxruntime") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it: python -m train export")
    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its kinds are not importable by name from one place
        raise UserError(f"{path}: not an ONNX file that onnxruntime reads: {error}") from error


class OnnxScorer(Scorer):
    """An exported student as a scorer. ``weights_sha256`` is the ONNX file's own hash.

    ``facts.weights_sha256`` is that of the weights it was made of: an int8 file gives other
    scores than they do. Windows go through one at a time: a batch is not faster on a CPU, and a
    window's score then does not depend on its neighbours.
    """

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        path = Path(path)
        self.session = open_session(path, threads)
        import onnxruntime  # it is there: a session is open

        self.facts = facts_of(self.session.get_modelmeta().custom_metadata_map, path)
        self.name = f"{self.facts.model} (onnx {self.facts.precision})"
        self.weights_sha256 = sha256_of(path)
        self.runtime = f"onnxruntime {onnxruntime.__version__} cpu"

    def score_windows(self, waves: Sequence[Wave]) -> list[float]:
        """See ``Scorer.score_windows``."""
        return [self._score(wave) for wave in waves]

    def _score(self, wave_T: Wave) -> float:
        (mos_B,) = self.session.run([OUTPUT], {INPUT: np.ascontiguousarray(wave_T[None])})
        return float(mos_B[0])
