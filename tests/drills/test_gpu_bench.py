"""``make gpu``: its rehearsal on a CPU, and what is left of a run that is cut short."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench import gpu
from tests.bench.gpu_pack import slim
from tests.bench.gpu_steps import RESULT
from tests.conftest import ROOT

FOUND = {"what": "speed", "value": "3", "goal": "", "met": None}
TELL = f"print({RESULT + json.dumps(FOUND)!r}, flush=True)"


def step(code: str, limit_s: float = 100) -> gpu.Step:
    return gpu.Step("made up", limit_s, lambda args: ["-c", code])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run_steps(*words: str, **steps: gpu.Step) -> int:
        monkeypatch.setattr(gpu, "STEPS", steps)
        parser = argparse.ArgumentParser()
        gpu.add_arguments(parser)
        options = ["--device", "cpu", "--small", "--out", str(tmp_path), "--data", str(tmp_path)]
        return gpu.run(parser.parse_args([*options, *words]))

    return run_steps


def outcomes(folder: Path) -> dict[str, dict[str, object]]:
    return {one["step"]: one for one in json.loads((folder / "results.json").read_text())["steps"]}


def test_a_run_that_is_cut_short_keeps_what_it_has_and_goes_on(
    run: Callable[..., int], tmp_path: Path
) -> None:
    counted = step(f"open({str(tmp_path / 'count')!r}, 'a').write('x'); {TELL}")
    late = step(f"import time; {TELL}; time.sleep(99)", limit_s=5)
    assert run(first=counted, second=late, third=step("raise SystemExit('why')")) == 1
    found = outcomes(tmp_path)
    assert [one["status"] for one in found.values()] == ["done", "over its time", "failed (1)"]
    assert found["second"]["results"] == found["first"]["results"] == [FOUND]
    assert "why" in (tmp_path / "results.md").read_text()
    assert run(first=counted, second=step(TELL), third=step("")) == 0
    assert (tmp_path / "count").read_text() == "x"
    assert run("--step", "first", first=counted, second=step(TELL)) == 0
    assert (tmp_path / "count").read_text() == "xx"
    assert outcomes(tmp_path)["second"]["status"] == "done"


def test_a_signal_ends_the_step_that_runs_and_keeps_its_results(
    run: Callable[..., int], tmp_path: Path
) -> None:
    code = f"import os, signal, time; {TELL}; os.kill(os.getppid(), signal.SIGINT); time.sleep(99)"
    with pytest.raises(KeyboardInterrupt):
        run(first=step(code), second=step(TELL))
    found = outcomes(tmp_path)
    assert [one["status"] for one in found.values()] == ["cut short", "not run"]
    assert found["first"]["results"] == [FOUND]


def test_no_step_begins_when_the_time_is_up(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--patience", "0", first=step(TELL)) == 1
    assert not (tmp_path / "first.log").exists()


def test_a_wheel_without_what_is_not_read_is_a_wheel(tmp_path: Path) -> None:
    path, members = tmp_path / "a.whl", {"a/__init__.py": "x", "a/models/sqa/b_full.pt": "y"}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    slim(path)
    with zipfile.ZipFile(path) as wheel:
        assert wheel.namelist() == ["a/__init__.py"]


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(3600)
def test_the_rehearsal(shared: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "gpu", "--device", "cpu", "--small"]
    command += ["--patience", "10", "--data", str(shared), "--out", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    table = found.stdout + found.stderr
    assert found.returncode == 0, table
    steps = outcomes(tmp_path)
    assert list(steps) == list(gpu.STEPS)
    assert all(
        one["status"] == "done" and (one["results"] or one["said"]) for one in steps.values()
    )
