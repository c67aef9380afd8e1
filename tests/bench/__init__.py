"""Benchmarks and drills; not in the wheel."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch

from data_specs.io.errors import UserError


def run_parts(
    args: argparse.Namespace, parts: Mapping[str, Callable[[argparse.Namespace], None]]
) -> int:
    """Run the parts of a bench that ``args.what`` names; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    for what in args.what:
        if what not in parts:
            raise UserError(f"unknown bench {what!r}: known are {', '.join(parts)}")
        parts[what](args)
    return 0


def device_name(device: str | torch.device) -> str:
    """What the device is called, for a report."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
