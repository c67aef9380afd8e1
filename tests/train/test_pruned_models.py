"""Pruned models: stored without their zeros, loaded as scorers and teachers, smaller in fact."""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from tests.export_helpers import write_run
from tests.tolerance import STUDENT
from tests.train_helpers import CROP, tones, write_dataset, write_rated, write_xlsr
from train.__main__ import main
from train.models import weights as weights_module
from train.models.calibration import Affine, Calibration
from train.models.front_end import load_xlsr
from train.models.head import HeadConfig, SlimEncoder, SlimNorm, build_head, config_of
from train.models.head_teacher import HeadTeacher, describe, weights_of
from train.models.pruned import (
    SPARSE_FILE,
    decode_gaps,
    encode_gaps,
    load_pruned,
    read_sparse,
    save_pruned,
)
from train.models.student import Student, StudentConfig, count, load_v7, macs_of, variant
from train.models.teacher import load_teacher
from train.models.xlsr import Encoder, load_encoder
from train.pruning import prune_structured
from train.pruning.masks import Masks
from train.pruning.structured import (
    choose_units,
    dead_units,
    remove_units,
    removed,
    unit_importance,
)
from train.pruning.units import Slices, layout_of
from train.scoring.score import load

TINY = StudentConfig(
    channels=(8, 12, 16), strides=((4, 4), (4, 4), (2, 2)), dim=16, heads=4, layers=2
)


@pytest.fixture
def student() -> Student:
    return random_student(TINY)


def random_student(config: StudentConfig) -> Student:
    """Random weights, none of them at its usual start: biases, norms and statistics too."""
    torch.manual_seed(0)
    student = Student(config).eval()
    for name, tensor in student.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            noise = 0.3 * torch.randn(tensor.shape)
            tensor.copy_((1 + noise).abs() if "weight" in name or "var" in name else noise)
    return student


@torch.inference_mode()
def logits(student: Student, clips: int = 2) -> torch.Tensor:
    return student.eval().logits(tones(clips))


def assert_same(first: Student, second: Student) -> None:
    before, after = logits(first), logits(second)
    assert before.std() > 0  # else any two would be the same
    torch.testing.assert_close(after, before, rtol=0, atol=STUDENT)


# --- storage --------------------------------------------------------------------------------------


def random_masks(state: dict[str, torch.Tensor], alive: float) -> Masks:
    torch.manual_seed(1)
    return Masks({n: torch.rand(t.shape) < alive for n, t in state.items() if t.ndim >= 2})


def masked(state: dict[str, torch.Tensor], masks: Masks) -> dict[str, torch.Tensor]:
    return {n: t * masks[n] if n in masks else t for n, t in state.items()}


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    bits = [tensor.flatten().view(torch.uint8) for tensor in (first, second)]
    return first.dtype == second.dtype and torch.equal(*bits) and first.shape == second.shape


@pytest.mark.parametrize(
    "places", [[], [0], [254], [255], [256], [0, 1, 2], [509, 510, 1020, 70_000], [7, 262, 263]]
)
def test_gaps_come_back(places: list[int]):
    coded = encode_gaps(np.array(places, np.int64))
    assert coded.dtype == np.uint8
    assert decode_gaps(coded).tolist() == places


@pytest.mark.parametrize("alive", [1.0, 0.5, 0.07, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(tmp_path: Path, alive: float, dtype: torch.dtype):
    state = {"a": torch.randn(30, 7, 3), "b": torch.randn(11), "n": torch.tensor(3)}
    state["a"] = state["a"].to(dtype)
    state["a"][0, 0, :] = torch.tensor([0.0, -0.0, float("inf")])
    mask = torch.rand(30, 7, 3) < alive
    mask[0, 0, :] = alive > 0
    expected = {**state, "a": torch.where(mask, state["a"], torch.zeros((), dtype=dtype))}
    stored = {**expected, "a": torch.where(mask, state["a"], -torch.zeros((), dtype=dtype))}
    save_pruned(tmp_path, stored, {"a": mask}, {"method": "test"})
    found, about = load_pruned(tmp_path)
    assert found.keys() == state.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name].reshape(-1), tensor.reshape(-1)), name
    assert about["method"] == "test"
    read = read_sparse(tmp_path / SPARSE_FILE)
    masks = {name: mask for name, _, mask in read if mask is not None}
    assert torch.equal(masks["a"], mask) if alive < 1 else not masks


@pytest.mark.parametrize("alive", [0.9, 0.5, 0.07, 0.01])
def test_the_file_is_as_large_as_what_is_left(tmp_path: Path, alive: float):
    state = {"weight": torch.randn(600, 1000)}
    masks = random_masks(state, alive)
    save_pruned(tmp_path, masked(state, masks), masks, {})
    bits_a_weight = 8 * (tmp_path / SPARSE_FILE).stat().st_size / state["weight"].numel()
    positions = min(1.0, 8 * alive + 0.3)  # a bit a weight, or a byte a living one
    assert bits_a_weight == pytest.approx(32 * masks.alive() / masks.total(), abs=positions + 0.01)


def test_the_same_model_makes_the_same_bytes(tmp_path: Path, student: Student):
    state = student.state_dict()
    masks = random_masks(state, 0.3)
    for name in ("a", "b"):
        save_pruned(tmp_path / name, masked(state, masks), masks, {"x": 1})
    for file in (SPARSE_FILE, "model.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"a": torch.zeros(3, 4, dtype=torch.bool)}, r"mask of 'a'.* not bool \(4, 3\)"),
        ({"a": torch.zeros(4, 3)}, "mask of 'a'"),
        ({"b": torch.zeros(4, 3, dtype=torch.bool)}, "a mask for 'b'"),
        ({"a": torch.zeros(4, 3, dtype=torch.bool)}, "'a': a dead weight is not zero"),
    ],
)
def test_masks_that_do_not_fit(tmp_path: Path, masks: dict[str, torch.Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        save_pruned(tmp_path, {"a": torch.ones(4, 3)}, masks, {})
    assert not (tmp_path / SPARSE_FILE).exists()


def rewritten(path: Path, change: dict[str, torch.Tensor], header: dict[str, object]) -> None:
    """The sparse file with other tensors or another description of them."""
    with safetensors.safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["pruned"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    described = {name: entry | header for name, entry in described.items()}
    safetensors.torch.save_file(tensors | change, path, {"pruned": json.dumps(described)})


def test_damage_is_named(tmp_path: Path):
    weight = torch.zeros(40, 5)
    weight[::7] = 1.0
    path = tmp_path / SPARSE_FILE

    def write() -> None:
        save_pruned(tmp_path, {"conv.weight": weight}, {"conv.weight": weight > 0}, {})

    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_pruned(tmp_path)
        write()

    write()
    content = bytearray(path.read_bytes())
    content[8 + struct.unpack("<Q", content[:8])[0] + 3] ^= 1
    path.write_bytes(content)
    fails(r"model.sparse.safetensors: tensor 'conv.weight' is damaged: its checksum")
    path.write_bytes(path.read_bytes()[:-9])
    fails("model.sparse.safetensors: damaged")
    rewritten(path, {"conv.weight#values": torch.ones(2)}, {})
    fails("'conv.weight' is damaged")
    rewritten(path, {}, {"shape": [4, 5]})
    fails("'conv.weight' is damaged: .*the tensor has 20")
    rewritten(path, {}, {"coding": "pickle"})
    fails("not a pruned model")
    save_pruned(tmp_path / "other", {"conv.weight": weight}, {}, {})
    (tmp_path / "other" / SPARSE_FILE).replace(path)
    fails("not the file that model.json")
    safetensors.torch.save_file({"a": weight}, path)
    fails("not a pruned model")
    (tmp_path / "model.json").write_text("[")
    fails("model.json is damaged")
    (tmp_path / "model.json").unlink()
    fails("model.json is missing")
    path.unlink()
    fails("model.sparse.safetensors is missing")


# --- as scorers and teachers ----------------------------------------------------------------------


def pruned_student(folder: Path, student: Student, alive: float = 0.5) -> Student:
    masks = random_masks(dict(student.named_parameters()), alive)
    masks.apply_(student)
    about = {"kind": "student", "config": student.config.model_dump(mode="json")}
    save_pruned(folder, student.state_dict(), masks, about)
    return student


def test_a_pruned_student_scores_and_labels(tmp_path: Path, student: Student):
    folder = tmp_path / "pruned-50"
    pruned_student(folder, student)
    scorer, clip = load(folder), tones(1)
    with torch.inference_mode():
        expected = student(clip).item()
    assert scorer.score(clip[0], 16_000) == pytest.approx(expected, abs=STUDENT)
    assert load(folder / SPARSE_FILE).weights_sha256 == scorer.weights_sha256
    teacher = load_teacher(folder, precision="fp32")
    assert (teacher.name, teacher.weights_sha256) == ("pruned-50", scorer.weights_sha256)
    assert teacher.score(clip)[0][0] == pytest.approx(expected, abs=STUDENT)
    assert load_teacher(f"mean:{folder}+mfcc", precision="fp32").name.startswith("mean:pruned-50+")


def test_a_pruned_folder_that_is_no_student(tmp_path: Path, student: Student):
    save_pruned(tmp_path, student.state_dict(), {}, {"config": {"dim": 3}})
    for loaded in (load, load_teacher):
        with pytest.raises(ValueError, match=r"model\.sparse\.safetensors: does not fit a student"):
            loaded(tmp_path)


@pytest.fixture(scope="module")
def xlsr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xlsr(tmp_path_factory.mktemp("xlsr"), 3)


def xlsr_teacher(folder: Path, layers: tuple[int, ...] = (2,)) -> HeadTeacher:
    torch.manual_seed(0)
    front_end = load_xlsr("small", folder, layers, precision="fp32")
    calibration = Calibration(universal=Affine(scale=1.5, shift=0.2))
    head = build_head(HeadConfig(features=32, dropout=0.1)).eval()
    return HeadTeacher("small", front_end, head, "0" * 64, calibration)


def prune_encoder(teacher: HeadTeacher, alive: float) -> Masks:
    encoder = teacher.front_end.encoder
    masks = random_masks(dict(encoder.named_parameters()), alive)
    masks.apply_(encoder)
    return Masks({f"encoder.{name}": mask for name, mask in masks.items()})


def test_a_pruned_teacher_needs_nothing_but_its_folder(
    xlsr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(weights_module.FOLDER_VARIABLE, str(tmp_path))
    teacher, clips = xlsr_teacher(xlsr), tones(2)
    masks = prune_encoder(teacher, 0.3)
    save_pruned(tmp_path / "mine", weights_of(teacher), masks, describe(teacher))
    found = load_teacher("mine", precision="fp32")  # a name in the cache, or a path
    assert isinstance(found, HeadTeacher) and found.calibration == teacher.calibration
    np.testing.assert_array_equal(found.score(clips)[1], teacher.score(clips)[1])
    assert load_teacher(tmp_path / "mine", precision="bf16").score(clips)[0].shape == (2,)
    scorer = load(tmp_path / "mine")
    assert scorer.weights_sha256 == found.weights_sha256 != teacher.weights_sha256
    short = clips[0, :30_000]
    assert scorer.score(short, 16_000) == pytest.approx(
        1 + 4 * torch.sigmoid(teacher.logits(short[None])).item(), abs=STUDENT
    )


def test_a_pruned_teacher_that_is_described_wrongly(xlsr: Path, tmp_path: Path):
    teacher = xlsr_teacher(xlsr)
    for change in ({"layers": [7]}, {"head": {"features": 3}}, {"encoder": {}}, {"calibration": 3}):
        save_pruned(tmp_path, weights_of(teacher), {}, describe(teacher) | change)
        with pytest.raises(ValueError, match=r"model\.json|layer 7"):
            load_teacher(tmp_path)
    with pytest.raises(ValueError, match="no XLS-R encoder that could be pruned"):
        describe(load_teacher("mfcc"))


def test_the_dimensions_of_a_head():
    config = HeadConfig(features=5, dim=8, heads=2, layers=1, feedforward=6, dropout=0.3, tokens=9)
    assert config_of(build_head(config)) == config


# --- shapes of smaller students ------------------------------------------------------------------


SLIM = {
    "heads": (1, 3), "head_dim": 4, "feedforward": (3, 20), "dim": 12, "norm_width": 16, "pool": 7,
}  # fmt: skip


def test_a_config_per_layer_goes_through_json():
    config = StudentConfig.model_validate(TINY.model_dump() | SLIM)
    assert StudentConfig.model_validate(json.loads(config.model_dump_json())) == config
    slim = Student(config)
    assert isinstance(slim.head.encoder, SlimEncoder)
    assert slim(tones(1)).shape == (1,)
    assert slim.state_dict().keys() == Student(TINY).state_dict().keys()


def test_an_old_config_is_written_as_it_was():
    assert list(TINY.model_dump()) == [
        *("channels", "strides", "dim", "heads", "layers", "feedforward", "dropout")
    ]
    assert count(variant("v7")) == (4_133_226, macs_of(variant("v7")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": (2, 2)}, "give head_dim"),
        ({"heads": (2, 2, 2), "head_dim": 4}, "heads of 3 layers"),
        ({"feedforward": (8,)}, "feedforward of 1 layers"),
        ({"norm_width": 8}, "norm_width 8"),
        ({"heads": (0, 2), "head_dim": 4}, "heads"),
    ],
)
def test_configs_that_do_not_fit_together(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        StudentConfig.model_validate(TINY.model_dump() | change)


def test_slim_layers_are_pytorchs_where_nothing_is_missing(student: Student):
    config = StudentConfig.model_validate(TINY.model_dump() | {"norm_width": 16})
    slim = Student(config)
    slim.load_state_dict(student.state_dict())
    assert isinstance(slim.head.encoder, SlimEncoder)
    torch.testing.assert_close(logits(slim), logits(student), rtol=0, atol=STUDENT)
    assert macs_of(config) == macs_of(TINY)


def test_a_slim_norm_counts_zeros_that_are_not_there():
    x = torch.randn(2, 3, 6)
    x[..., 4:] = 0
    slim, whole = SlimNorm(4, 6), nn.LayerNorm(6)
    torch.testing.assert_close(slim(x[..., :4]), whole(x)[..., :4])


# --- dead units -----------------------------------------------------------------------------------


def kill(model: Student | Encoder, units: dict[str, list[int]], how: str) -> None:
    """Zero what reaches units ("makes"), what reads them ("reads"), or all of it ("parts")."""
    state = model.state_dict()
    groups = {group.name: group for group in layout_of(model).groups}
    for name, numbers in units.items():
        for part in getattr(groups[name], how):
            part.clear(state, torch.tensor(numbers))


UNITS = {
    "convolutions.0": [0, 3, 4],
    "convolutions.1": [1, 2, 11],
    "convolutions.2": [0, 7],
    "layers.0.heads": [1],
    "layers.1.heads": [0, 2],
    "layers.0.feedforward": [0, 5, 31],
    "layers.1.feedforward": list(range(20)),
    "pool": [3, 4],
}


@pytest.mark.parametrize("how", ["makes", "reads", "parts"])
def test_dead_units_go_and_scores_stay(student: Student, how: str):
    alive = logits(student)
    kill(student, UNITS, how)
    assert (logits(student) - alive).abs().max() > STUDENT
    found = {n: gone_U.nonzero().flatten().tolist() for n, gone_U in dead_units(student).items()}
    expected = {**UNITS, "width": []}
    if how == "makes":  # of the constant channels of an inner convolution one stays
        for name in ("convolutions.0", "convolutions.1"):
            assert len(found[name]) == 2 and set(found[name]) < set(UNITS[name])
            expected[name] = found[name]
    assert found == expected
    smaller = remove_units(student, dead_units(student))
    assert_same(student, smaller)
    assert count(smaller.config)[0] == sum(p.numel() for p in smaller.parameters())
    assert count(smaller.config)[1] < count(student.config)[1]
    assert smaller.config.head_dim == 4 and smaller.config.slim.heads == (3, 2)


def test_death_spreads_both_ways(student: Student):
    state = student.state_dict()
    state["convolutions.2.weight"][:6] = 0  # what reaches channels 0 to 5 of the second
    state["convolutions.2.bias"][:6] = 0
    state["convolutions.4.weight"][9, 6:] = 0  # the third's channel 9 hears only them
    state["convolutions.4.weight"][:, 7] = 0  # nobody hears channel 7 ...
    state["convolutions.2.weight"][torch.arange(12) != 7, 2] = 0  # ... who alone hears 2
    gone = dead_units(student)
    assert gone["convolutions.1"].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert gone["convolutions.2"].nonzero().flatten().tolist() == [9]
    assert gone["convolutions.0"].nonzero().flatten().tolist() == [2]
    assert_same(student, remove_units(student, gone))


def test_a_layer_that_is_dead_altogether_keeps_one_unit(student: Student):
    kill(student, {"layers.0.heads": [0, 1, 2, 3], "pool": list(range(32))}, "reads")
    kill(student, {"layers.1.feedforward": list(range(32))}, "makes")
    units = dead_units(student)
    smaller = remove_units(student, units)
    assert smaller.config.slim.heads == (1, 4) and smaller.config.pool == 1
    assert smaller.config.slim.feedforward == (32, 1)
    assert_same(student, smaller)


def test_a_student_without_dead_units_stays_what_it_is(student: Student):
    units = dead_units(student)
    assert not removed(units)
    smaller = remove_units(student, units)
    assert smaller.config == student.config
    assert torch.equal(logits(smaller), logits(student))


def test_coordinates_of_the_width_are_dead_with_their_position_codes(student: Student):
    numbers = [0, 3, 9]
    kill(student, {"width": numbers}, "gates")
    assert not dead_units(student)["width"].any()  # the position codes are there
    student.state_dict()["head.positions"][..., numbers] = 0
    gone = dead_units(student)["width"]
    assert int(gone.sum()) == 2 and set(gone.nonzero().flatten().tolist()) < set(numbers)
    smaller = remove_units(student, {"width": gone})
    assert (smaller.config.dim, smaller.config.norm_width) == (14, 16)
    assert_same(student, smaller)


def test_removing_twice_is_removing_once(student: Student):
    kill(student, {"layers.0.feedforward": [1, 2], "convolutions.0": [5]}, "makes")
    first = remove_units(student, dead_units(student))
    kill(first, {"layers.0.heads": [0], "convolutions.1": [2, 3]}, "makes")
    assert_same(first, remove_units(first, dead_units(first)))


def test_v7_with_dead_units():
    v7 = load_v7()
    student = random_student(v7.config)
    student.load_state_dict(v7.state_dict())
    torch.manual_seed(3)
    units = {
        group.name: torch.randperm(group.count)[: group.count // 3].tolist()
        for group in layout_of(student).groups
        if group.name != "width"
    }
    kill(student, units, "makes")
    smaller = remove_units(student, dead_units(student))
    assert count(smaller.config)[1] < 0.6 * count(v7.config)[1]
    assert_same(student, smaller)


@pytest.mark.parametrize("how", ["makes", "reads"])
def test_an_encoder_without_dead_heads_and_units(xlsr: Path, how: str):
    encoder, _ = load_encoder(xlsr, [1, 2])
    dead = {"layers.0.heads": [1, 3], "layers.1.heads": [0], "layers.1.feedforward": [5, 6, 60]}
    kill(encoder, dead, how)
    units = dead_units(encoder)
    assert {n: g.nonzero().flatten().tolist() for n, g in units.items() if g.any()} == dead
    smaller = remove_units(encoder, units)
    with torch.inference_mode():
        for before, after in zip(encoder(tones(1)), smaller(tones(1)), strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=STUDENT)
    assert smaller.encoder.layers[0].attention.q_proj.weight.shape == (16, 32)
    layouts = [layout_of(model) for model in (encoder, smaller)]
    assert layouts[1].macs(layouts[1].counts) < layouts[0].macs(layouts[0].counts)


# --- chosen units ---------------------------------------------------------------------------------


def test_importance_is_the_gates_derivative_squared(student: Student):
    clips = list(torch.split(tones(2), 1))
    importance = unit_importance(student, clips)
    for name in ("convolutions.0", "convolutions.2", "layers.1.heads", "layers.0.feedforward"):
        group = next(g for g in layout_of(student).groups if g.name == name)
        number = int(importance[name].argmax())
        expected = np.mean([slope(student, group.gates, number, clip) ** 2 for clip in clips])
        assert importance[name][number].item() == pytest.approx(expected, rel=0.02), name
    assert all(parameter.grad is None for parameter in student.parameters())
    with pytest.raises(ValueError, match="no clips"):
        unit_importance(student, [])


def slope(
    student: Student, gates: tuple[Slices, ...], number: int, clip: torch.Tensor, by: float = 1e-2
) -> float:
    """The score's derivative with respect to a factor on a unit, by differences."""
    results = []
    for factor in (1 + by, 1 - by):
        changed = random_student(student.config)
        changed.load_state_dict(student.state_dict())
        for gate in gates:
            tensor = changed.state_dict()[gate.tensor]
            places = gate.places(torch.tensor([number])).flatten()
            scaled = tensor.index_select(gate.side, places) * factor
            tensor.index_copy_(gate.side, places, scaled)
        with torch.inference_mode():
            results.append(changed(clip).double().item())
    return (results[0] - results[1]) / (2 * by)


def test_chosen_units_leave_the_share_that_was_asked_for(student: Student):
    importance = unit_importance(student, torch.split(tones(2), 1))
    units = choose_units(student, importance, 0.6)
    smaller = remove_units(student, units)
    assert 0.4 < macs_of(smaller.config) / macs_of(TINY) <= 0.6
    for name, gone_U in units.items():
        if gone_U.any() and not gone_U.all():
            assert importance[name][gone_U].max() <= importance[name][~gone_U].min()
    assert smaller(tones(1)).shape == (1,)
    with pytest.raises(ValueError, match="cannot keep only 0%"):
        choose_units(student, importance, 1e-3)


def test_a_unit_of_no_importance_goes_first(student: Student):
    kill(student, {"convolutions.1": [2, 3]}, "reads")
    importance = unit_importance(student, torch.split(tones(1), 1))
    assert importance["convolutions.1"][[2, 3]].tolist() == [0, 0]
    units = choose_units(student, importance, 0.95)
    assert units["convolutions.1"][[2, 3]].all()


# --- the command ----------------------------------------------------------------------------------


def command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    prune_structured.add_arguments(parser)
    few = ["--clips", "2", "--repeats", "1", "--device", "cpu"]
    return prune_structured.run(parser.parse_args([*map(str, words), *few]))


def test_a_pruned_student_loses_units(
    tmp_path: Path, student: Student, capsys: pytest.CaptureFixture[str]
):
    kill(student, UNITS, "parts")
    pruned_student(tmp_path / "pruned", student, 0.9)
    rated = write_rated(tmp_path / "rated", clips=3)
    arguments = ("--model", tmp_path / "pruned", "--out", tmp_path / "small")
    assert command(*arguments, "--importance-from", rated) == 0
    said = capsys.readouterr().out
    assert "8 window(s) at a time" in said
    about = json.loads((tmp_path / "small/model.json").read_text())
    assert about["units_left"]["dead"]["layers.0.heads"] == "3/4"
    smaller = load(tmp_path / "small")
    assert smaller.weights_sha256 == about["weights_sha256"]
    assert about["parameters"] < sum(p.numel() for p in student.parameters())
    assert_same(student, smaller.network)
    teacher = load_teacher(tmp_path / "small", precision="fp32")
    expected = smaller.score_windows(tones(1).numpy())[0]
    assert teacher.score(tones(1))[0][0] == pytest.approx(expected, abs=STUDENT)
    report = json.loads((tmp_path / "small/structured.json").read_text())
    assert report["MOS apart without its dead units"]["max"] < STUDENT
    assert [speed["windows"] for speed in report["speed"]] == [1, 8]


def test_half_of_a_student_is_left_and_learns_on(tmp_path: Path, student: Student):
    shards = write_dataset(tmp_path / "shards", shards=2, samples=5, validation=4)
    run, small = write_run(tmp_path / "run", student), tmp_path / "small"
    arguments = ["--model", run, "--keep-macs", 0.7, "--importance-from", shards]
    assert command(*arguments, "--importance-clips", 2, "--out", small) == 0
    about = json.loads((small / "model.json").read_text())
    assert about["macs_per_clip"] <= 0.7 * macs_of(TINY) and about["units_left"]["chosen"]
    assert 1 <= load(small).score(tones(1)[0], 16_000) <= 5
    fit = ["fit", "--start", small, "--shards", shards, "--preset", "fast", "--steps", 2]
    fit += ["--batch", 2, "--validate-every", 1, "--workers", 0, "--device", "cpu"]
    assert main([str(word) for word in (*fit, "--out", tmp_path / "tuned")]) == 0
    tuned = json.loads((tmp_path / "tuned/model.json").read_text())
    assert tuned["config"]["channels"] == about["config"]["channels"]


def test_a_pruned_teacher_loses_units(xlsr: Path, tmp_path: Path):
    teacher = xlsr_teacher(xlsr)
    masks = prune_encoder(teacher, 0.5)
    state = teacher.front_end.encoder.state_dict()
    for part in layout_of(teacher.front_end.encoder).groups[1].makes:
        part.clear(state, torch.arange(10))
        masks[f"encoder.{part.tensor}"][:10] = False
    save_pruned(tmp_path / "pruned", weights_of(teacher), masks, describe(teacher))
    assert command("--model", tmp_path / "pruned", "--out", tmp_path / "small") == 0
    found = load_teacher(tmp_path / "small", precision="fp32")
    assert found.front_end.encoder.encoder.layers[0].feed_forward.output_dense.in_features == 54
    np.testing.assert_allclose(found.score(tones(2))[0], teacher.score(tones(2))[0], atol=STUDENT)
    sizes = [(tmp_path / name / SPARSE_FILE).stat().st_size for name in ("pruned", "small")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "v7", "--keep-macs", "0.5"], "--importance-from"),
        (["--model", "v7", "--keep-macs", "2"], "keep_macs: .*less than or equal to 1"),
        (["--model", "mfcc"], "no XLS-R encoder"),
        (["--model", "mfcc", "--keep-macs", "0.5"], "only dead units"),
    ],
)
def test_wrong_usage_is_told(tmp_path: Path, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        command(*words, "--out", tmp_path / "out")


def test_noise_to_measure_with_is_always_the_same():
    first, second = (prune_structured.clips_of(None, 2) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2, CROP)
    assert functional.mse_loss(first[0], first[1]) > 0
