"""A wheel of its own for a student: ``pip install`` of one file, then ``NAME score PATH...``.

It holds ``train.export.standalone`` under the name that was asked for, the ONNX file and the card,
and needs numpy, onnxruntime, soundfile and soxr alone. The same model gives the same bytes.
"""

from __future__ import annotations

import keyword
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from flit_core.wheel import make_wheel_in

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from train.export import standalone

NEEDS = ("numpy>=2", "onnxruntime>=1.20", "soundfile>=0.13", "soxr>=0.5")
TAKEN = {"data_specs", "numpy", "onnxruntime", "pipeline", "soundfile", "soxr", "tests", "train"}
EPOCH = 1_577_836_800
"""Every file's time in a wheel: the first second of 2020."""

PROJECT = """\
[build-system]
requires = ["flit_core>=3.10"]
build-backend = "flit_core.buildapi"

[project]
name = "{name}"
version = "{version}"
description = "Scores the quality of recorded speech, 1 (bad) to 5 (excellent)"
readme = "README.md"
requires-python = ">=3.10"
dependencies = [{needs}]

[project.scripts]
{name} = "{name}.__main__:main"
"""


def require_name(name: str) -> None:
    """``UserError`` unless a package may be called so: a module's name that nothing else has."""
    plain = name.isascii() and name.isidentifier() and name == name.lower()
    if not plain or name.startswith("_") or keyword.iskeyword(name):
        raise UserError(f"--wheel {name!r}: give lower-case letters, digits and _, a letter first")
    if name in TAKEN | sys.stdlib_module_names:
        raise UserError(f"--wheel {name}: there is a package of that name; give another")


def write_wheel(name: str, onnx: Path, card: Path, out: Path, version: str) -> Path:
    """Write ``NAME-VERSION+HASH-py3-none-any.whl`` into ``out``; HASH is the ONNX file's."""
    version = f"{version.partition('+')[0]}+{sha256_of(onnx)[:12]}"
    with TemporaryDirectory() as source:
        _lay_out(Path(source), name, onnx, card, version)
        return Path(make_wheel_in(Path(source) / "pyproject.toml", out).file)


def _lay_out(source: Path, name: str, onnx: Path, card: Path, version: str) -> None:
    """The source tree that becomes the wheel."""
    package = source / name
    package.mkdir()
    for file in Path(standalone.__file__).parent.glob("*.py"):
        shutil.copyfile(file, package / file.name)
    shutil.copyfile(onnx, package / "model.onnx")
    (package / "py.typed").touch()
    shutil.copyfile(card, source / "README.md")
    needs = ", ".join(f'"{need}"' for need in NEEDS)
    project = PROJECT.format(name=name, version=version, needs=needs)
    (source / "pyproject.toml").write_text(project)
    for file in package.iterdir():
        file.chmod(0o644)
        os.utime(file, (EPOCH, EPOCH))
