"""The house's walls: who imports whom, and what the documents promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("pipeline", "train", "data_specs")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def test_train_knows_nothing_of_the_pipeline_and_the_specs_of_neither() -> None:
    for room, forbidden in (("train", {"pipeline"}), ("data_specs", {"pipeline", "train"})):
        for path in files(room):
            assert not {name.split(".")[0] for name in imports(path)} & forbidden, path


def test_the_pipeline_takes_only_models_from_train() -> None:
    for path in files("pipeline"):
        taken = {name for name in imports(path) if name.split(".")[0] == "train"}
        assert all(name.startswith("train.models") for name in taken), path


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("ray", {"pipeline/run.py"}), ("soxr", {"pipeline/audio.py", "train/audio.py"})],
)
def test_a_package_has_one_door(package: str, allowed: set[str]) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in files(room)
        if package in {name.split(".")[0] for name in imports(path)}
    }
    assert found <= allowed


def test_only_the_plan_asks_for_random_numbers() -> None:
    callers = {
        path.name for path in files("pipeline") if "pipeline.rng.uniforms" in set(imports(path))
    }
    assert callers == {"plan.py"}


def test_planning_reads_no_audio() -> None:
    code = "import sys, pipeline.plan; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


HEAVY = ["ray", "pyarrow", "noisereduce", "opuslib", "pyroomacoustics", "transformers", "TTS"]


def test_train_runs_without_the_pipelines_packages() -> None:
    # The verbs of train, with every package of the pipeline extra made impossible to import.
    code = f"""
import sys
for name in {HEAVY!r} + ["pipeline", "df", "encodec", "onnxruntime"]:
    sys.modules[name] = None
import train.fit, train.evaluate, train.report, train.stream
from train.score import load
import numpy as np
print(round(load("v7").score(np.sin(np.arange(16000) * 0.1).astype("f4") * 0.1, 16000), 1) > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


def test_the_readme_names_only_targets_and_verbs_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(code_blocks(readme))))
    assert named and named <= targets
    for room in ("pipeline", "train"):
        verbs = set(re.findall(rf"python -m {room} ([a-z-]+)", readme))
        text = subprocess.run(
            [sys.executable, "-m", room, "--help"], cwd=ROOT, capture_output=True, text=True
        ).stdout
        assert verbs and all(verb in text for verb in verbs)


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)


def test_no_registry_and_no_private_path_is_named() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    hosts = [name[::-1] for name in ("gro.ipyp", "detsohnohtyp", "gro.naibed.bed")]
    for name in filter(None, tracked):
        path = ROOT / name
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not [host for host in hosts if host in text], name
