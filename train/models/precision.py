"""The precision that a network runs in, and whether a device computes it fast."""

from __future__ import annotations

import torch

from data_specs.io.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRECISIONS = ("auto", *DTYPES)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by the device itself, not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype meant by "fp32", "bf16", "fp16" or "auto" (bf16 where it is fast) on that device.

    ``ValueError`` for another name, and for fp16 on a CPU, which computes it slowly.
    """
    if precision == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}: known are {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 is for CUDA; on a CPU take bf16 or fp32")
    return DTYPES[precision]
