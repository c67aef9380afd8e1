"""Scores from an exported ONNX file, without PyTorch's network: ``load("bundle/model.int8.onnx")``.

What the file says of itself (``Facts``) stands in its metadata, where any other program finds it
too: rate, window, hop, the model's name and the hash of the weights it was made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.io.onnx_session import cpu_session
from data_specs.io.waves import Padding, Resampler
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.audio import Wave
from train.models.tensors import require_memory
from train.scoring.base import Scorer
from train.scoring.windows import MAX_HOP_SAMPLES

INPUT, OUTPUT = "waves", "mos"

OPERATIONS = frozenset(
    (
        *("Abs", "Add", "Clip", "Concat", "Conv", "DequantizeLinear", "Div", "Exp", "Gather"),
        *("Gemm", "Identity", "LayerNormalization", "LeakyRelu", "Log", "MatMul", "Mod", "Mul"),
        *("Pad", "Pow", "QuantizeLinear", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceSum"),
        *("Relu", "Reshape", "Sigmoid"),
        *("Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
    )
)
"""Of ONNX: what exported students consist of. None of them loops, or reads another file."""

MOST_LENGTH = 1 << 20
"""No shape or padding of an exported student has a larger number."""


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
    padding: Padding = "zero"
    resampler: Resampler = "soft"


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


def require_plain(path: Path) -> None:
    """``UserError`` unless a file holds a network such as the exporter writes, of finite numbers.

    Looked at before anything runs: operations, constants, the sizes of all maps of one window.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    require_memory(path, path.stat().st_size)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path}: not an ONNX file: {error}") from error
    graph = model.graph
    for node in graph.node:
        if node.op_type not in OPERATIONS or node.domain or len(model.functions):
            raise UserError(
                f"{path}: operation {node.domain}{node.op_type!r} is not one of an exported student"
            )
    for tensor in graph.initializer:
        _require_plain_tensor(path, tensor)
    if len(graph.sparse_initializer):
        raise UserError(f"{path}: sparse constants are not what an exported student has")
    del graph.value_info[:]  # what the file says of its maps' sizes is not believed
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:  # its kinds are not importable by name from one place
        raise UserError(f"{path}: not an ONNX file whose shapes fit: {error}") from error
    for value in (*inferred.value_info, *inferred.output):
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim if size.dim_value]
        require_memory(path, 4 * math.prod(sizes))


def _require_plain_tensor(path: Path, tensor: Any) -> None:
    import onnx

    where = f"{path}: tensor {tensor.name!r}"
    if tensor.data_location or tensor.external_data:
        raise UserError(f"{where} is in another file; an exported student is one file")
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > path.stat().st_size:
        raise UserError(f"{where} claims the shape {list(tensor.dims)}: more than the file holds")
    try:
        array = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where} is damaged: {error}") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{where} holds values that are not finite numbers")
    if array.dtype == np.int64 and (np.abs(array) > MOST_LENGTH).any():
        raise UserError(f"{where} asks for more than {MOST_LENGTH} values")


def open_session(path: Path, threads: int) -> Any:
    """An onnxruntime session on the CPU; ``ValueError`` naming the file, or what to install."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: scoring ONNX needs a package: pip install {error.name}") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it: python -m train export")
    require_plain(path)
    try:
        return cpu_session(path, threads)
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
        self.session = open_session(path, threads or torch.get_num_threads())
        import onnxruntime  # it is there: a session is open

        self.facts = facts = facts_of(self.session.get_modelmeta().custom_metadata_map, path)
        name = f"{facts.model} (onnx {facts.precision})"
        runtime = f"onnxruntime {onnxruntime.__version__} cpu"
        super().__init__(name, sha256_of(path), runtime, facts.precision)
        self.padding, self.resampler = facts.padding, facts.resampler

    def score_windows(self, waves: Sequence[Wave]) -> list[float]:
        """See ``Scorer.score_windows``."""
        return [self._score(wave) for wave in waves]

    def _score(self, wave_T: Wave) -> float:
        try:
            (mos_B,) = self.session.run([OUTPUT], {INPUT: np.ascontiguousarray(wave_T[None])})
            return float(mos_B[0])
        except Exception as error:  # any kind: the network is a user's
            raise UserError(f"{self.name}: the network cannot be run: {error}") from error
