"""Cores and memory: the process' own, not the machine's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from data_specs.io.errors import UserError
from data_specs.io.hardware import available_memory, cpus, use_threads

MEMINFO = "MemTotal: 64 kB\nMemFree: 1 kB\nMemAvailable: 32 kB\n"


def test_memory_that_files_hold_is_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    assert available_memory(tmp_path, meminfo) == 32 * 1024
    assert available_memory(tmp_path) > 1 << 20  # this machine's


def test_a_container_has_what_its_limit_leaves_and_what_its_files_give_back(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 300\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 1 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_memory(tmp_path) == 4300
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.stat").write_text("total_inactive_file 100\n")
    (old / "memory.limit_in_bytes").write_text("1500\n")
    (old / "memory.usage_in_bytes").write_text("2000\n")
    assert available_memory(tmp_path) == 0


def test_cores_are_those_of_the_affinity_and_of_the_quota(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert cpus(tmp_path) == len(allowed)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpus(tmp_path) == len(allowed)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cpus(tmp_path) == 1
    os.sched_setaffinity(0, allowed[:1])
    try:
        assert cpus(tmp_path / "none") == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_torch_takes_no_more_than_a_container_has(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("data_specs.io.hardware.cpus", lambda: 2)
    try:
        for took, asked, expected in ((3, None, 2), (1, None, 1), (1, 3, 3)):
            torch.set_num_threads(took)
            use_threads(asked)
            assert torch.get_num_threads() == expected
        with pytest.raises(UserError, match="--threads 0: must be at least 1"):
            use_threads(0)
    finally:
        torch.set_num_threads(before)
