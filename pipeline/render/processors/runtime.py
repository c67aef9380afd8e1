"""Where and how precisely the neural processors of this process run: set once by the worker.

The device is how the data is made and never hashed; the precision is part of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Runtime:
    """``device`` as torch names it; ``precision`` is fp32 or bf16."""

    device: str = "cpu"
    precision: str = "fp32"


_CURRENT = Runtime()


def current() -> Runtime:
    """What the neural processors of this process run on."""
    return _CURRENT


def use(runtime: Runtime) -> None:
    """Set it for this process."""
    global _CURRENT
    _CURRENT = runtime


@contextmanager
def inference() -> Iterator[Any]:
    """Inference mode; gives the torch device that tensors belong on. Layers have a precision.

    Float32 is float32: PyTorch lets cuDNN round the operands of convolutions to TF32's 11 bits, and
    any package may have allowed it for products of matrices.
    """
    import torch

    products = torch.backends.cuda.matmul
    allowed, products.allow_tf32 = products.allow_tf32, False
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield torch.device(current().device)
    finally:
        products.allow_tf32 = allowed
