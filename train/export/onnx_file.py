"""A student as an ONNX file: raw windows of 7.68 s at 16 kHz in, mean opinion scores out.

The batch is free, the length is not: the head adds one position code to each of its tokens and was
trained on all of them at once, so a clip of another length is cut into windows, or filled, outside
(``train.scoring.windows``; rate, window and hop stand in the file's metadata).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_specs.io.errors import UserError
from data_specs.io.files import write_atomically
from data_specs.sample import CROP_SAMPLES
from train.export.network import PlainStudent, one_turn
from train.models.features import FREQUENCIES, WINDOW_SAMPLES
from train.models.student import Student
from train.scoring.onnx_scorer import INPUT, OUTPUT, Facts

OPSET = 18
"""What onnxruntime and onnxruntime-web have run for years, and PyTorch's exporter writes as is."""

KERNELS = "spectrum.kernels"
"""The name of ``PlainSpectrum.kernels`` in the graph."""

INSTALL = "pip install 'distill-mos-factory[export]'"


def require_packages() -> None:
    """``ValueError`` saying what to install where ONNX cannot be written."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"exporting needs a package that is missing: {error}: {INSTALL}") from None


def write_onnx(path: Path, student: Student, facts: Facts) -> None:
    """Export a student in float32."""
    plain = PlainStudent(student).eval()
    example_BT = torch.zeros(2, CROP_SAMPLES)  # a batch of one would be taken for a constant
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            plain,
            (example_BT,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    model = program.model_proto
    compute_kernels(model)
    save(path, model, facts)


def compute_kernels(model: Any) -> None:
    """Replace the spectrum's kernels, 0.4 MB, by what computes them: a runtime does it at loading.

    Kernel f at time t is one turn, read at f * t, times the window (``network.fourier_kernels``).
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    graph.initializer.remove(next(t for t in graph.initializer if t.name == KERNELS))
    constants = {
        "frequency": np.arange(FREQUENCIES)[:, None],
        "time": np.arange(WINDOW_SAMPLES),
        "period": np.array(WINDOW_SAMPLES),
        "turn": one_turn().float().numpy(),
        "window": torch.hann_window(WINDOW_SAMPLES).numpy(),
        "shape": np.array([2 * FREQUENCIES, 1, WINDOW_SAMPLES]),
    }
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(value, f"{KERNELS}.{name}"))
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Mul", [".frequency", ".time"], ".product", {}),
        ("Mod", [".product", ".period"], ".places", {}),
        ("Gather", [".turn", ".places"], ".read", {}),  # (161, 320, 2)
        ("Transpose", [".read"], ".bare", {"perm": [2, 0, 1]}),
        ("Mul", [".bare", ".window"], ".windowed", {}),
        ("Reshape", [".windowed", ".shape"], "", {}),
    ]
    for number, (kind, inputs, output, more) in enumerate(steps):
        names = [KERNELS + name for name in inputs]
        graph.node.insert(number, helper.make_node(kind, names, [KERNELS + output], **more))


def save(path: Path, model: Any, facts: Facts) -> None:
    """Write a model with what it says of itself, in one file, checked."""
    import onnx

    for part in (model, *model.graph.node):
        del part.metadata_props[:]  # the exporter notes its stack there, with this machine's paths
    for name, value in facts:
        model.metadata_props.add(key=name, value=str(value))
    model.producer_name, model.doc_string = "distill-mos-factory", __doc__ or ""
    onnx.checker.check_model(model, full_check=True)
    write_atomically(path, lambda temporary: onnx.save(model, str(temporary)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes and PyTorch's own deprecations, which are not the user's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
