"""Models from files, to go on with: v7, a run's folder, a model file, a pruned model, a teacher."""

from __future__ import annotations

from pathlib import Path

from data_specs.io.addresses import redacted
from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.teacher import MEAN, teacher_table
from train.files import load_checkpoint
from train.models import pruned
from train.models.head_teacher import HEAD_JSON
from train.models.student import Student, load_v7, read_student, student_of, v7_weights_path
from train.models.tensors import read_about

PUBLISHED = "v7"

RELEASED = Path(__file__).parents[1] / "released"
"""Students that were trained here: a bundle's folder each, called by its name."""


def path_of(model: Path | str) -> Path:
    """The folder of a released student by its name; any other path as it is."""
    name = str(model)
    return RELEASED / name if name in released() else Path(model)


def released() -> list[str]:
    """The names of the released students."""
    return sorted(path.parent.name for path in RELEASED.glob("*/" + pruned.DENSE_FILE))


def is_teacher(model: Path | str) -> bool:
    """Whether a model is a teacher: by its name, or the folder of a head or a pruned encoder."""
    if str(model) in teacher_table().teachers or str(model).startswith(MEAN):
        return True
    folder = Path(model)
    if (folder / HEAD_JSON).is_file():
        return True
    return pruned.is_pruned(folder) and pruned.read_about(folder).get("kind") == "teacher"


def model_in(path: Path) -> Path:
    """A model's file: this one, or that of a run's or a model's folder that holds the weights."""
    names = (pruned.SPARSE_FILE, pruned.DENSE_FILE, "best.pt")
    for file in (path, *(path / name for name in names)):
        if file.is_file():
            return file
    if path.is_dir():
        raise UserError(f"{path}: holds no model.safetensors or best.pt: train it first")
    known = ", ".join([PUBLISHED, *released()])
    raise UserError(f"{path}: no such model; give {known}, a run folder, a model file or a teacher")


def read_model(path: Path) -> tuple[Student, int | None]:
    """The student in a model file; of a pruned one also how many parameters are left."""
    if path.name == pruned.SPARSE_FILE:
        state, about = pruned.load_pruned(path.parent)
        student = student_of(path, about.get("config"), state)
        return student, pruned.parameters_left(path.parent, student)
    if path.suffix == ".safetensors":
        return read_student(path, read_about(path.with_suffix(".json"))), None
    content = load_checkpoint(path)
    weights = content.get("weights")
    if not isinstance(weights, dict):
        raise UserError(f"{path}: holds no model; give the run's best.pt or its folder")
    return student_of(path, content.get("student_config"), weights), None


def find_student(model: Path | str) -> tuple[Student, str]:
    """The student of a name, a run's folder or a model file here, and the SHA-256 of its weights.

    ``UserError`` for what is no student, is missing or is damaged.
    """
    if str(model) == PUBLISHED:
        return load_v7(), sha256_of(v7_weights_path())
    if "://" in str(model) or is_teacher(model):
        shown = redacted(str(model))
        raise UserError(f"{shown}: is not a student: give v7, or a run or model of one, here")
    path = model_in(path_of(model))
    return read_model(path)[0], sha256_of(path)
