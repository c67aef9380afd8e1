"""Models from elsewhere: flipped bits, numbers that are not finite, shapes no machine holds."""

from __future__ import annotations

import json
import math
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from data_specs.io.errors import UserError
from tests.export_helpers import TINY, tiny
from tests.train_helpers import tone
from train.__main__ import main
from train.export import export
from train.files import load_checkpoint, save_checkpoint, write_weights
from train.models import tensors
from train.models.head import HeadConfig, build_head
from train.models.head_teacher import load_trained
from train.models.pruned import save_pruned
from train.models.student import Student
from train.models.tensors import write_about
from train.scoring import bundle
from train.scoring.score import load

WAVE = tone(3, 8000)


def sha256_about(folder: Path, weights: str, about: dict[str, Any]) -> None:
    found = tensors.sha256_of(folder / weights)
    write_about(folder / f"{weights.split('.')[0]}.json", about | {"weights_sha256": found})


def write_run(folder: Path, change: Callable[[Student], None] = lambda student: None) -> Path:
    folder.mkdir()
    student = tiny()
    change(student)
    write_weights(folder / "model.safetensors", student.state_dict())
    sha256_about(folder, "model.safetensors", {"config": TINY.model_dump(mode="json")})
    return folder


def write_pruned(
    folder: Path, change: Callable[[Student], None] = lambda student: None, **about: Any
) -> Path:
    student = tiny()
    mask = torch.rand(student.head.projection.weight.shape) < 0.2
    student.head.projection.weight.data *= mask
    change(student)

    config = {"config": TINY.model_dump(mode="json")}
    save_pruned(folder, student.state_dict(), {"head.projection.weight": mask}, config | about)
    return folder


def write_head(folder: Path, change: Callable[[Any], None] = lambda head: None) -> Path:
    folder.mkdir()
    config = HeadConfig(features=40, layers=1)
    head = build_head(config)
    change(head)
    write_weights(folder / "head.safetensors", head.state_dict())
    from train.models.front_end import load_front_end

    about = {"front_end": "mfcc", "front_end_sha256": load_front_end("mfcc").weights_sha256}
    sha256_about(
        folder, "head.safetensors", about | {"head": config.model_dump(), "calibration": None}
    )
    return folder


def write_checkpoint(folder: Path, change: Callable[[Student], None]) -> Path:
    folder.mkdir()
    student = tiny()
    change(student)
    config = TINY.model_dump(mode="json")
    content = {"weights": student.state_dict(), "student_config": config}
    save_checkpoint(folder / "best.pt", content)
    return folder


MAKERS: dict[str, Callable[..., Path]] = {
    "run": write_run,
    "pruned": write_pruned,
    "head": write_head,
    "checkpoint": write_checkpoint,
}


def write_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(export, "write_networks", lambda *_: [])
    run = write_run(folder.with_name(folder.name + "-run"))
    assert main(["export", "--model", str(run), "--out", str(folder)]) == 0
    return folder


def flips(path: Path, count: int, seed: int = 0) -> Iterator[int]:
    """Flip one bit of a file at a time; the file is whole again afterwards."""
    whole = path.read_bytes()
    rng = random.Random(seed)
    for place in rng.sample(range(8 * len(whole)), min(count, 8 * len(whole))):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        yield place
    path.write_bytes(whole)


def score_of(model: Path) -> float:
    return load(model).score(WAVE, 16_000)


@pytest.mark.parametrize("kind", ["run", "bundle", "pruned", "head"])
def test_a_flipped_bit_never_changes_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is refused; or it is where nothing of the model is, and the score is the same."""
    folder = tmp_path / "model"
    write_bundle(folder, monkeypatch) if kind == "bundle" else MAKERS[kind](folder)
    right, refused, total = score_of(folder), 0, 0
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        for place in flips(path, 25):
            total += 1
            try:
                found = score_of(folder)
            except UserError as error:
                assert str(folder) in str(error), (path.name, place)
                refused += 1
            else:
                assert found == right, (path.name, place)
    assert refused > 0.9 * total >= 45


def test_a_flipped_bit_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    content = {"weights": tiny().state_dict(), "step": 7, "loss": [0.5, 0.25]}
    save_checkpoint(path, content)
    whole = load_checkpoint(path)
    accepted = 0
    for place in flips(path, 150):
        try:
            found = load_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error)
            continue
        accepted += 1  # between the members, where nothing is
        assert found["step"] == whole["step"] and found["loss"] == whole["loss"], place
        for name, tensor in whole["weights"].items():
            assert torch.equal(found["weights"][name], tensor), (place, name)
    assert accepted < 75


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", MAKERS)
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, kind: str, value: float
) -> None:
    def spoil(network: Any) -> None:
        head = getattr(network, "head", network)
        head.pool.output.bias.data.fill_(value)

    folder = MAKERS[kind](tmp_path / "model", spoil)
    with pytest.raises(UserError, match=r"pool\.output\.bias.*not finite"):
        load(folder)


@pytest.mark.slow
def test_onnx_files_that_are_no_exported_student(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from train.export.onnx_file import write_onnx
    from train.scoring.onnx_scorer import Facts, OnnxScorer

    path, facts = tmp_path / "model.onnx", {"model": "t", "weights_sha256": "0", "version": "1"}
    write_onnx(path, tiny(), Facts(**facts, precision="fp32"))
    assert 1 <= OnnxScorer(path).score(WAVE, 16_000) <= 5
    whole = path.read_bytes()

    def weights_of(model: Any) -> Any:
        return next(t for t in model.graph.initializer if t.name == "convolutions.0.weight")

    def put(tensor: Any, array: Any) -> None:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), tensor.name))

    def infinite(model: Any) -> None:
        put(weights_of(model), np.full((4, 2, 3, 3), np.inf, np.float32))

    def elsewhere(model: Any) -> None:
        weights_of(model).data_location = onnx.TensorProto.EXTERNAL
        entry = weights_of(model).external_data.add()
        entry.key, entry.value = "location", "../../../../etc/passwd"

    def large(model: Any) -> None:
        weights_of(model).dims[:] = [10**6, 10**6]

    def looped(model: Any) -> None:
        model.graph.node.add().op_type = "Loop"

    def padded(model: Any) -> None:
        pads = next(t for t in model.graph.initializer if t.data_type == 7 and list(t.dims) == [6])
        put(pads, np.array([100_000, 100_000, 80, 0, 0, 1_000_000]))

    for change, said in (
        (infinite, "not finite"),
        (elsewhere, "another file"),
        (large, "more than the file holds"),
        (looped, "'Loop' is not one"),
        (padded, "GB of memory"),
    ):
        model = onnx.load_from_string(whole)
        change(model)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match=said):
            OnnxScorer(path)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 10_000_000},
        {"layers": 60, "dim": 65_536},
        {"channels": [65_536] * 3},
        {"channels": [4] * 100_000, "strides": [[1, 1]] * 100_000},
        {"dim": 10**12},
        {"heads": [2] * 10**6},
        {"feedforward": 10**9},
        {"layers": "many"},
    ],
)
def test_a_description_that_no_machine_holds(tmp_path: Path, change: dict[str, Any]) -> None:
    """Refused by what it says, before anything of it is made."""
    run = write_run(tmp_path / "run")
    config = TINY.model_dump(mode="json") | change
    (run / "model.json").write_text(json.dumps({"config": config}))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(run)
    save_checkpoint(tmp_path / "best.pt", {"weights": {}, "student_config": config})
    with pytest.raises(UserError, match=r"best\.pt"):
        load(tmp_path / "best.pt")


def test_a_large_student_with_weights_for_a_small_one_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    config = TINY.model_dump(mode="json") | {"dim": 2048}
    (run / "model.json").write_text(json.dumps({"config": config}))
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: pytest.fail("was read"))
    with pytest.raises(UserError, match="has shape"):
        load(run)


def test_a_model_larger_than_memory_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    with (run / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 41)  # takes no room on the disk
    with pytest.raises(UserError, match="GB of memory"):
        load(run)


def test_a_pruned_tensor_that_claims_too_much(tmp_path: Path) -> None:
    folder = write_pruned(tmp_path / "model")
    path = folder / "model.sparse.safetensors"
    content = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["pruned"])
    header["head.projection.weight"]["shape"] = [10**7, 10**7]
    safetensors.torch.save_file(content, path, {"pruned": json.dumps(header)})
    with pytest.raises(UserError, match="GB of memory"):
        load(folder)


def test_a_checkpoint_that_is_packed_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"weights": {"a": torch.zeros(1 << 20)}})
    with zipfile.ZipFile(path) as archive:
        members = [(one.filename, archive.read(one)) for one in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="packed"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"weights": [1]}, {"weights": {"a": 1}}, {}])
def test_a_checkpoint_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt"):
        load(tmp_path / "best.pt")


def test_a_pruned_model_has_the_size_of_what_is_left(tmp_path: Path) -> None:
    """As ``model.json`` says, else counted: not that of the dense tensors it is run with."""
    dense = sum(parameter.numel() for parameter in Student(TINY).parameters())
    assert load(write_run(tmp_path / "run")).parameters == dense
    counted = load(write_pruned(tmp_path / "counted"))
    weight = counted.network.head.projection.weight
    assert counted.parameters == dense - int((weight == 0).sum()) < dense
    assert load(write_pruned(tmp_path / "stated", parameters=123)).parameters == 123
    assert load(write_head(tmp_path / "head")).parameters == sum(
        p.numel() for p in build_head(HeadConfig(features=40, layers=1)).parameters()
    )


def test_models_without_hashes_still_load(tmp_path: Path) -> None:
    """Folders of older versions."""
    run = write_run(tmp_path / "run")
    about = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps({"config": about["config"]}))
    assert score_of(run) == score_of(write_run(tmp_path / "other"))


def test_a_bundles_file_is_held_to_its_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bundle(tmp_path / "bundle", monkeypatch)
    other = write_run(tmp_path / "other", lambda s: s.head.pool.output.bias.data.fill_(0.5))
    for name in bundle.TO_LOAD:
        shutil.copy(other / name, folder / name)  # whole, but not this bundle's
    for model in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match="checksums"):
            load(model)


def test_a_head_too_large_to_be_made(tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head")
    about = json.loads((folder / "head.json").read_text())
    about["head"]["layers"] = 10_000_000
    write_about(folder / "head.json", about)
    with pytest.raises(UserError, match=r"head\.json"):
        load_trained("head", folder)
