"""The one way in which ONNX networks are run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def cpu_session(model: Path | bytes, threads: int) -> Any:
    """Open an ONNX file, or what is in one, on this CPU: the same numbers every time.

    Raises onnxruntime's own errors, and ``ImportError`` without it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # it warns of what its optimiser leaves
    given = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
