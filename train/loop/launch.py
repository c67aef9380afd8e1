"""What a training is started with: its device and its processes. Checked before data is read."""

from __future__ import annotations

import os
from collections.abc import Mapping

from data_specs.io.errors import UserError

INTERACTIVE = ("bash", "interactive")
"""Names of Slurm jobs whose variables mean nothing, as Lightning has it."""


def is_first_process() -> bool:
    """Whether this is the only process, or the first of several."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def require_device(name: str) -> None:
    """``UserError`` for a device that PyTorch does not have here."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"--device {name}: no device of PyTorch: give cpu, cuda or cuda:1"
        ) from error
    if device.type == "cpu":
        return
    there = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "mps" and torch.backends.mps.is_available():
        there = 1
    if (device.index or 0) >= there:
        raise UserError(
            f"--device {name}: PyTorch sees {there} {device.type} devices here: give --device cpu, "
            "or look at the driver, CUDA_VISIBLE_DEVICES and the build of PyTorch"
        )


def require_launch(
    devices: int | None, nodes: int, environment: Mapping[str, str] = os.environ
) -> None:
    """``UserError`` where several processes were started, or announced, and nothing joins them.

    Each would train the whole run, or wait for others for ever. ``devices`` is None for a verb that
    runs in one process.
    """
    if devices is not None and "TORCHELASTIC_RUN_ID" in environment:
        return
    asked = (devices or 1) * nodes
    world, rank = _number(environment, "WORLD_SIZE"), environment.get("RANK", "0")
    joined = devices is not None and "LOCAL_RANK" in environment and world == asked
    if (world > 1 or rank != "0") and not joined:
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={world} say that this is one of several processes, but "
            f"nothing joins them{_how(devices)}; for one process: unset RANK WORLD_SIZE LOCAL_RANK"
        )
    tasks, by_srun = _number(environment, "SLURM_NTASKS"), "SLURM_STEP_ID" in environment
    if environment.get("SLURM_JOB_NAME") in INTERACTIVE or (devices is None and not by_srun):
        return
    if max(tasks, asked) > 1 and "SLURM_NTASKS" in environment and (tasks != asked or not by_srun):
        started = f"srun started {tasks}" if by_srun else "srun started none"
        raise UserError(
            f"SLURM_NTASKS={tasks}, {started} and this command is for {asked}{_how(devices)}; for "
            "one process: unset SLURM_NTASKS, or ask Slurm for --ntasks=1 --cpus-per-task=N"
        )


def _how(devices: int | None) -> str:
    if devices is None:
        return ", and this verb runs in one process"
    return (
        ": start it with torchrun --nproc-per-node N -m train ..., or with srun and --devices and "
        "--nodes that make the same number"
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "1")
    if not text.isdecimal() or not int(text):
        raise UserError(f"{name}={text}: not a number of processes: unset {name}")
    return int(text)
