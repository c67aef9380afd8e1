"""Pruning: scores by hand, dead weights that stay dead, runs that kills cost nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from data_specs.io.waves import filled
from tests.bench import prune as bench_prune
from tests.bench.random_xlsr import config_of
from tests.export_helpers import write_run
from tests.tolerance import STUDENT, rounding
from tests.train_helpers import (
    CROP,
    dies_at,
    dies_writing,
    interrupted,
    killed,
    logged,
    python,
    require_same_states,
    small_xlsr,
    tone_pcm,
    write_dataset,
    write_rated,
    write_xlsr,
)
from train.data.stream import batch_of
from train.files import load_checkpoint
from train.models.calibration import Affine, Calibration
from train.models.front_end import load_xlsr
from train.models.head import HeadConfig, build_head
from train.models.head_teacher import HeadTeacher, load_pruned_teacher
from train.models.pruned import load_pruned
from train.models.student import VARIANTS, Student, StudentConfig
from train.models.xlsr import Encoder
from train.pruning import prune as pruning
from train.pruning.config import PruneHost, make_config, open_data
from train.pruning.layer_drop import keep_layers, layers_within, weights_by_layers
from train.pruning.masks import Masks, prunable
from train.pruning.prune import Pruner, prune
from train.pruning.select import TaylorScores
from train.pruning.subject import Subject, TeacherNetwork, load_subject, teacher_subject
from train.scoring.score import load

QUIET = PruneHost(device="cpu", workers=0, checkpoint_every=2, progress=False, logger="none")
TINY = StudentConfig(channels=(4, 4), strides=((4, 2), (4, 4)), dim=8, heads=2, layers=2)
PRUNABLE = 72 + 144 + 320 + 2 * 512
"""Two convolutions, the projection, two layers."""

LEFT = [1560, 1404, 1264, 1138, 1025, 923]
"""A tenth of the living goes each round."""

NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout", "attention_dropout", "feat_proj_dropout", "activation_dropout"), 0.0
)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_are_the_first_order_change_of_the_loss_by_hand():
    network = nn.Linear(2, 1, bias=False)
    inputs, weight = torch.tensor([1.0, 2.0]), torch.tensor([[0.5, -0.25]])

    def loss_of(weights: torch.Tensor) -> torch.Tensor:
        return (functional.linear(inputs, weights) - 1).square().sum()

    with torch.no_grad():
        network.weight.copy_(weight)
    loss_of(network.weight).backward()  # the output is 0, the loss 1
    assert network.weight.grad.tolist() == [[-2, -4]]
    scores = TaylorScores(network, ["weight"], decay=0.9)
    scores.gather(network)
    assert scores.averages["weight"][0].tolist() == pytest.approx([0.1, 0.1], abs=1e-6)
    for place, by_hand in enumerate((2.25, 0.25)):  # the loss with that weight set to zero
        without = weight.clone()
        without[0, place] = 0
        assert loss_of(without).item() == pytest.approx(by_hand)
        # The loss is quadratic: what is not of first order is (w x)^2, here 0.25 for both.
        first_order = (1 - by_hand) + (weight[0, place] * inputs[place]).item() ** 2
        assert 0.1 * first_order**2 == pytest.approx(
            scores.averages["weight"][0, place].item(), abs=1e-6
        )


def test_scores_of_a_deep_network_are_derivatives_towards_zero():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 1)).double()
    inputs, truth = torch.randn(4, 1, 8).double(), torch.randn(4, 1).double()
    names = ["0.weight", "3.weight"]

    def loss() -> torch.Tensor:
        return functional.mse_loss(network(inputs), truth)

    loss().backward()
    scores = TaylorScores(network, names, decay=0.0)
    scores.gather(network)
    for name in names:
        weight = network.get_parameter(name).data.view(-1)
        for place in range(len(weight)):
            kept, step = weight[place].item(), 1e-5
            losses = []
            for share in (1 + step, 1 - step):
                weight[place] = kept * share
                losses.append(loss().item())
            weight[place] = kept
            expected = ((losses[0] - losses[1]) / (2 * step)) ** 2
            assert scores.averages[name].view(-1)[place].item() == pytest.approx(expected, abs=1e-6)


def test_scores_are_averaged_recursively():
    network, expected = nn.Linear(3, 2), np.zeros((2, 3))
    scores = TaylorScores(network, ["weight"])
    for step in range(5):
        network.zero_grad()
        network(torch.randn(4, 3)).square().mean().backward()
        scores.gather(network)
        product = (network.weight.grad * network.weight).detach().double().numpy()
        expected = 0.9 * expected + 0.1 * product**2
        np.testing.assert_allclose(scores.averages["weight"].numpy(), expected, atol=1e-6)
        with torch.no_grad():
            network.weight.add_(0.1 * step)
    network.zero_grad()
    with pytest.raises(ValueError, match="weight has no gradient"):
        scores.gather(network)


# --- masks ----------------------------------------------------------------------------------------

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamw, plain": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_dead_stay_exactly_zero(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    network[0].to(memory_format=torch.channels_last)
    names = ["0.weight", "3.weight"]
    optimiser = OPTIMISERS[name](network.parameters())
    masks = Masks.full(network, names)
    held = masks.hold(optimiser, network)

    def step(number: int) -> None:
        optimiser.zero_grad()
        functional.mse_loss(network(torch.randn(3, 1, 4, 4)), torch.randn(3, 2)).backward()
        if number == 50:
            for weight, mask in zip(weights, masks.values(), strict=True):
                weight.grad[~mask] = float("inf")
        optimiser.step()

    weights = [network.get_parameter(name) for name in names]
    for _ in range(5):  # so that there is momentum towards everywhere
        step(0)
    for mask in masks.values():
        mask &= torch.rand(mask.shape) < 0.5
    assert all(weights[0][~masks["0.weight"]] != 0)
    held.remove()
    masks.apply_(network)
    masks.hold(optimiser, network)
    before = [weight.detach().clone() for weight in weights]
    for number in range(100):
        step(number)
        for weight, mask in zip(weights, masks.values(), strict=True):
            assert not weight[~mask].any()
            for memory in optimiser.state[weight].values():
                if memory.shape == weight.shape:
                    assert not memory[~mask].any()
    for weight, mask, old in zip(weights, masks.values(), before, strict=True):
        assert (weight[mask] != old[mask]).all()
        assert torch.isfinite(weight).all()


def test_masks_count_and_fit_their_weights():
    network = nn.Sequential(nn.Linear(7, 3), nn.Conv1d(2, 3, 5))
    masks = Masks.full(network, ["0.weight", "1.weight"])
    assert masks.alive() == masks.total() == 21 + 30
    for mask in masks.values():
        mask &= torch.rand(mask.shape) < 0.5
    assert masks.total() == 51
    with pytest.raises(ValueError, match=r"no weight '0\.weight' of the mask's shape"):
        masks.apply_(nn.Sequential(nn.Linear(2, 2)))


def test_what_may_be_pruned():
    with torch.device("meta"):
        v7 = Student(VARIANTS["v7"])
    names = prunable(v7)
    assert not [name for name in names if "norm" in name or "bias" in name or "pool" in name]
    assert Masks.full(v7, names).total() == 1_586_304 + 204_800 + 7 * 320_000
    assert Masks.full(v7, prunable(v7, "convolutions")).total() == 1_586_304
    with torch.device("meta"):
        encoder = Encoder(config_of("2b"), [10])
    teacher = TeacherNetwork(encoder, build_head(HeadConfig(features=1920)), Affine())
    names = prunable(teacher)
    assert names == prunable(teacher, "encoder")
    whole = sum(parameter.numel() for parameter in encoder.parameters())
    assert 0.999 < Masks.full(teacher, names).total() / whole < 1
    others = [p for name, p in encoder.named_parameters() if f"encoder.{name}" not in names]
    assert all(parameter.ndim == 1 for parameter in others)
    with pytest.raises(ValueError, match="Student has no part 'encoder' to prune: known are all"):
        prunable(v7, "encoder")


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    return write_rated(tmp_path_factory.mktemp("rated"), clips=8)


def tiny() -> Subject:
    torch.manual_seed(0)
    return Subject(Student(TINY), "tiny", "none")


def parsed(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    pruning.add_arguments(parser)
    return parser.parse_args([str(part) for part in argv])


def settings_of(labels: Path, *changes: object) -> argparse.Namespace:
    """Five rounds of three steps."""
    return parsed(
        *("--rated", labels, "--rate", 0.1, "--sizes", 60, 80, "--steps", 3, "--batch", 4),
        *("--lr", 1e-3, "--validate-every", 2, "--device", "cpu", "--out", "unused", *changes),
    )


def set_up(subject: Subject, labels: Path, *changes: object):
    args = settings_of(labels, *changes)
    sources = open_data(args, subject.calibration)
    return make_config(args, subject, sources), subject, sources


def rows_of(run: Path) -> list[dict]:
    rows = json.loads((run / "results.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def require_same_runs(one: Path, other: Path) -> None:
    """Masks, weights, moments, scores, results and pruned models, bit for bit."""
    require_same_states(one, other, "round", "network", "scores", "masks")
    assert rows_of(one) == rows_of(other)
    for folder in other.glob("pruned-*"):
        for path in folder.iterdir():
            assert (one / folder.name / path.name).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("method", ["importance", "magnitude"])
def test_a_run_leaves_what_its_schedule_says(labels, tmp_path, method):
    config, subject, sources = set_up(tiny(), labels, "--method", method)
    assert config.sizes == (80, 60)
    assert (config.rated_clips, config.validation_samples, config.what) == (6, 2, "all")
    prune(config, subject, sources, tmp_path, QUIET)
    rows = rows_of(tmp_path)
    assert [row["size"] for row in rows] == [None, 100, 80, 60]
    assert [row["round"] for row in rows] == [0, 0, 3, 5]
    assert [row["steps"] for row in rows] == [0, 3, 12, 18]
    left = [row["weights_left"] for row in rows]
    if method == "importance":
        assert left == [1560, 1560, LEFT[3], LEFT[5]]
    else:  # whole kernels of nine, and a floor in each of eleven tensors
        assert left[:2] == [1560, 1560]
        assert all(goal - 40 < n <= goal for n, goal in zip(left[2:], (1138, 923), strict=True))
    parameters = sum(parameter.numel() for parameter in subject.network.parameters())
    assert [parameters - row["parameters_left"] for row in rows] == [1560 - n for n in left]
    log = [line for line in logged(tmp_path) if "round" in line]
    assert [line["round"] for line in log] == list(range(6))
    assert [line["left"] * 1560 for line in log][3:6:2] == pytest.approx(left[2:])
    weights, about = load_pruned(tmp_path / "pruned-60")
    assert about["config"]["dim"] == 8
    assert about["metrics"]["weights_left"] == left[3]
    masks = load_checkpoint(tmp_path / "last.pt")["masks"]
    assert list(masks) == prunable(subject.network)
    for name, tensor in subject.network.state_dict().items():
        assert torch.equal(weights[name], tensor), name
        if name in masks:
            assert not tensor[~masks[name]].any()
    assert sum(int((weights[name] != 0).sum()) for name in masks) == left[3]
    assert (tmp_path / "results.csv").read_text().startswith("size,left,weights_left")


def test_the_lowest_scores_go_and_the_living_are_untouched(labels):
    config, subject, _sources = set_up(tiny(), labels)
    pruner = Pruner(subject, config)
    for _ in range(3):
        pruner.update(some_batch(4))
    averages = {name: average.clone() for name, average in pruner.scores.averages.items()}
    before = {name: tensor.clone() for name, tensor in subject.network.state_dict().items()}
    pruner.remove()
    assert pruner.round == 1
    ordered = torch.cat([average.flatten() for average in averages.values()]).sort().values
    for name, average in averages.items():
        assert torch.equal(pruner.masks[name], average > ordered[155])
        assert not pruner.scores.averages[name][~pruner.masks[name]].any()
    after = subject.network.state_dict()
    for name, tensor in before.items():
        mask = pruner.masks.get(name, torch.ones(tensor.shape, dtype=torch.bool))
        assert torch.equal(after[name][mask], tensor[mask])
        assert not after[name][~mask].any()


def some_batch(clips: int, seconds: float | None = None):
    pcm_BT = torch.from_numpy(np.stack([tone_pcm(number) for number in range(clips)]))
    lengths = [CROP] * clips
    if seconds:
        lengths[1] = int(seconds * 16_000)
        pcm_BT[1, lengths[1] :] = 0
    return batch_of(pcm_BT, [1.5 + number % 3 for number in range(clips)], lengths)


def test_short_clips_are_heard_as_in_training(labels):
    """The batch whose short clip is repeated beforehand gives the loss; rounding to int16 aside."""
    batch = some_batch(4, seconds=2.0)
    pcm_BT = batch.pcm_BT.clone()
    pcm_BT[1] = torch.from_numpy(filled(pcm_BT[1, :32_000].numpy() / 32768, "repeat") * 32768)
    losses = {}
    for name, padding, given in (
        ("repeats", "repeat", batch),
        ("is repeated", "zero", batch._replace(pcm_BT=pcm_BT)),
        ("hears silence", "zero", batch),
    ):
        config, subject, _sources = set_up(tiny(), labels)
        student = subject.network
        student.config = student.config.model_copy(update={"padding": padding})
        losses[name] = Pruner(subject, config).gradients(given).item()
    assert losses["repeats"] == pytest.approx(losses["is repeated"], rel=1e-4)
    assert losses["repeats"] != pytest.approx(losses["hears silence"], rel=1e-3)


def test_layers_are_dropped_from_the_top(labels, tmp_path):
    changes = ("--method", "layer-drop", "--sizes", 95, 70, 50)
    config, subject, sources = set_up(tiny(), labels, *changes)
    assert weights_by_layers(subject.network, prunable(subject.network)) == [1048, 1560]
    prune(config, subject, sources, tmp_path, QUIET)
    rows = rows_of(tmp_path)
    assert [row["size"] for row in rows] == [None, 100, 95, 70]  # one layer is 67 %, more than 50
    assert [row["weights_left"] for row in rows] == [1560, 1560, 1048, 1048]
    assert [row["round"] for row in rows] == [0, 0, 1, 4]  # when the others have so much left
    weights, about = load_pruned(tmp_path / "pruned-70")
    assert about["config"]["layers"] == 1
    small = Student(StudentConfig.model_validate(about["config"]))
    small.load_state_dict(weights)
    assert sum(p.numel() for p in small.parameters()) == rows[-1]["parameters_left"]
    with pytest.raises(ValueError, match=r"67\.2% of the weights: dropping layers reaches none"):
        Pruner(tiny(), config.model_copy(update={"sizes": (50.0,)}))
    assert layers_within([10, 20, 30], 25) == 2
    assert layers_within([10, 20, 30], 5) == 1


@pytest.mark.parametrize("method", ["importance", "magnitude", "layer-drop"])
@pytest.mark.parametrize("step", [4, 6])
def test_a_stopped_run_continues(labels, tmp_path, method, step):
    """Within a round, and between two."""
    changes = ("--method", method, "--sizes", 70, 80)
    with interrupted(Pruner, step - 1):
        prune(*set_up(tiny(), labels, *changes), tmp_path / "run", QUIET)
    assert load_checkpoint(tmp_path / "run/last.pt")["step"] == step
    for run in ("run", "unbroken"):
        prune(*set_up(tiny(), labels, *changes), tmp_path / run, QUIET)
    require_same_runs(tmp_path / "run", tmp_path / "unbroken")
    prune(*set_up(tiny(), labels, *changes), tmp_path / "run", QUIET)  # done: nothing to do
    require_same_runs(tmp_path / "run", tmp_path / "unbroken")
    with pytest.raises(ValueError, match=r"rate=0\.1, not 0\.2"):
        prune(*set_up(tiny(), labels, *changes, "--rate", 0.2), tmp_path / "run", QUIET)


# --- killed ---------------------------------------------------------------------------------------


def prune_tiny(out: Path, labels: Path) -> None:
    prune(*set_up(tiny(), labels), out, QUIET)


def kill_again_and_again(out: Path, labels: Path) -> None:
    """A run killed at many points, each time further on; not finished."""
    work = partial(prune_tiny, out, labels)

    def killed_in(method: str, when: Callable[[Pruner], bool]) -> None:
        killed(lambda: dies_at(Pruner, method, when, work))

    killed_in("update", lambda p: p.step == 1)  # nothing saved yet
    killed(lambda: dies_writing("last.pt", 1, True, work))
    killed_in("remove", lambda p: True)
    killed_in("hold", lambda p: p.step == 3 and p.round == 1)  # selected
    killed_in("update", lambda p: p.step == 5)  # within a round
    killed(lambda: dies_writing("last.pt", 3, False, work))
    killed(lambda: dies_writing("model.sparse.safetensors", 1, True, work))
    killed(lambda: dies_writing("model.json", 1, False, work))
    killed(lambda: dies_writing("results.csv", 3, False, work))
    killed_in("update", lambda p: p.step == 17)


@pytest.fixture(scope="module")
def kills(tmp_path_factory, labels) -> Path:
    """A folder where a process of its own left what kills leave: forks of this one would hang."""
    folder = tmp_path_factory.mktemp("kills")
    code = (
        "import sys, torch, tests.train.test_prune as t;"
        "from pathlib import Path; torch.set_num_threads(1);"
        "broken, unbroken, labels = map(Path, sys.argv[1:]);"
        "t.kill_again_and_again(broken, labels);"
        "t.prune_tiny(broken, labels); t.prune_tiny(unbroken, labels)"
    )
    python("-c", code, folder / "broken", folder / "unbroken", labels)
    return folder


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_at_the_same_bits(kills):
    require_same_runs(kills / "broken", kills / "unbroken")
    assert {folder.name for folder in (kills / "broken").glob("pruned-*")} == {
        "pruned-80",
        "pruned-60",
    }


@pytest.mark.slow
def test_the_log_of_a_killed_run_has_each_round_once(kills):
    logs = [logged(kills / run) for run in ("broken", "unbroken")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0] if "round" in line] == [3, 6, 9, 12, 15, 18]


# --- teachers -------------------------------------------------------------------------------------


def small_teacher(folder: Path, **changes: object) -> HeadTeacher:
    """A teacher of three small XLS-R layers, with scales."""
    write_xlsr(folder, 4, **changes)
    torch.manual_seed(0)
    head = build_head(HeadConfig(features=32, dim=8, heads=2, layers=1))
    maps = Calibration(universal=Affine(scale=1.2, shift=0.3), datasets={"set0": Affine()})
    return HeadTeacher("small", load_xlsr("small", folder, [3], precision="fp32"), head, "x", maps)


def test_gradients_flow_through_what_the_teacher_computes(tmp_path):
    teacher = small_teacher(tmp_path)
    batch, subject = some_batch(3, seconds=2.5), teacher_subject(teacher, "small")
    waves_BT = batch.pcm_BT.float() / 32768
    expected = [
        teacher.logits(waves_BT[row : row + 1, :length])
        for row, length in enumerate(batch.lengths_B.tolist())
    ]
    mos_B = subject.network.eval()(waves_BT, batch.lengths_B)
    torch.testing.assert_close(mos_B, 1 + 4 * torch.cat(expected).sigmoid(), rtol=0, atol=STUDENT)
    mos_B.sum().backward()
    names = prunable(subject.network)
    assert all(subject.network.get_parameter(name).grad.any() for name in names)


def test_micro_batches_are_one_batch_and_the_head_stays(tmp_path, labels):
    gradients = []
    for size in (4, 3, 1):
        subject = teacher_subject(small_teacher(tmp_path / str(size), **NO_DROPOUT), "small")
        config = set_up(subject, labels, "--micro-batch", size)[0]
        assert (config.what, config.micro_batch, config.train_head) == ("encoder", size, False)
        pruner = Pruner(subject, config)
        head = {name: tensor.clone() for name, tensor in subject.network.head.state_dict().items()}
        pruner.gradients(some_batch(4))
        names = prunable(subject.network)
        gradients.append([subject.network.get_parameter(name).grad.clone() for name in names])
        pruner.update(some_batch(4))
        after = subject.network.head.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in head.items())
    for ours in gradients[1:]:
        for mine, whole in zip(ours, gradients[0], strict=True):
            atol = rounding(4 * 50, whole.abs().max(), layers=40)  # clips x frames, and back
            torch.testing.assert_close(mine, whole, rtol=0, atol=atol)
    with pytest.raises(ValueError, match="--micro-batch: a batch norm counts the whole batch"):
        Pruner(subject, config.model_copy(update={"train_head": True}))
    Pruner(subject, config.model_copy(update={"train_head": True, "batch_norm": "frozen"}))


def test_a_teacher_is_pruned_stopped_continued_and_loads_again(tmp_path, labels):
    """With dropout, whose random numbers a continued run must repeat."""
    changes = ("--sizes", 75, "--batch", 2)

    def subject() -> Subject:
        return teacher_subject(small_teacher(tmp_path / "weights"), "small")

    with interrupted(Pruner, 4):
        prune(*set_up(subject(), labels, *changes), tmp_path / "run", QUIET)
    prune(*set_up(subject(), labels, *changes), tmp_path / "run", QUIET)
    whole = set_up(subject(), labels, *changes)
    prune(*whole, tmp_path / "unbroken", QUIET)
    require_same_runs(tmp_path / "run", tmp_path / "unbroken")
    batch, network = some_batch(2), whole[1].network.eval()
    waves_BT = batch.pcm_BT.float() / 32768
    again = load_pruned_teacher(tmp_path / "run/pruned-75", "cpu", "fp32")
    with torch.no_grad():
        expected_B = network(waves_BT, batch.lengths_B)
    scored_B = torch.from_numpy(again.score(waves_BT)[0])
    torch.testing.assert_close(scored_B, expected_B, rtol=0, atol=STUDENT)
    assert again.calibration == whole[1].calibration


def test_a_teacher_without_its_top_layers_hears_an_earlier_one(tmp_path):
    subject = teacher_subject(small_teacher(tmp_path), "small")
    waves_BT = some_batch(1).pcm_BT.float() / 32768
    encoder = subject.network.encoder.eval()
    names = prunable(subject.network)
    keep = weights_by_layers(subject.network, names)
    assert len(keep) == 3
    assert keep[-1] == Masks.full(subject.network, names).total()
    encoder.layers = (2, 3)
    with torch.no_grad():
        second = encoder(waves_BT)[0]
        with pytest.raises(ValueError, match="none of them can be dropped"):
            keep_layers(subject.network, 2)
        encoder.layers = (3,)
        keep_layers(subject.network, 2)
        (found,) = encoder(waves_BT)
    assert torch.equal(found, second)
    assert Masks.full(subject.network, prunable(subject.network)).total() == keep[1]


# --- data, settings, the command ------------------------------------------------------------------


def test_what_a_run_trains_and_validates_on(labels, tmp_path):
    shards = write_dataset(tmp_path / "shards", validation=4)

    def config_of_run(*changes: object):
        args = settings_of(labels, *changes)
        return make_config(args, tiny(), open_data(args, None))

    both = config_of_run("--shards", shards)
    assert (both.samples, both.rated_clips, both.rated_share) == (12, 8, 0.2)
    assert (both.validation_samples, both.validation_hash) == (4, "held")
    on_shards = config_of_run("--validation", shards)
    assert (on_shards.samples, on_shards.rated_clips, on_shards.rated_share) == (0, 8, 1.0)
    assert (on_shards.validation_samples, on_shards.validation_hash) == (12, "abc")
    sets = ("--rated-set", "set0", "--rated-validation-set", "set1", "--rated-validation", labels)
    by_set = config_of_run(*sets)
    assert (by_set.rated_clips, by_set.validation_samples) == (4, 4)
    alone = parsed("--shards", shards, "--out", "unused", "--device", "cpu")
    config = make_config(alone, tiny(), open_data(alone, None))
    assert (config.samples, config.rated_share, config.rate, config.steps) == (12, 0.0, 0.005, 30)
    with pytest.raises(ValueError, match=r"labels\.csv, --shards DIR or both"):
        open_data(parsed("--out", "x"), None)
    with pytest.raises(ValueError, match="both trains and validates"):
        open_data(settings_of(labels, "--rated-validation", labels), None)
    with pytest.raises(ValueError, match="one of --validation and --rated-validation"):
        open_data(settings_of(labels, "--rated-validation", labels, "--validation", shards), None)


def test_ratings_are_on_the_scale_of_a_teacher_with_scales(labels):
    maps = Calibration(universal=Affine(scale=1.5), datasets={"set0": Affine(), "set1": Affine()})
    plain, mapped = (open_data(settings_of(labels), scale).rated for scale in (None, maps))
    for before, after in zip(plain, mapped, strict=True):
        assert after.mos == pytest.approx(float(maps.to_universal(before.mos, before.dataset)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--sizes", 0), "sizes"),
        (("--rate", 0), "rate"),
        (("--batch", 1), "batch"),
        (("--decay", 1), "decay"),
        (("--what", "encoder"), "no part 'encoder'"),
        (("--sizes", 0.01), r"a size of 0\.01 % leaves no weight"),
        (("--micro-batch", 2), "a batch norm counts the whole batch"),
    ],
)
def test_bad_settings(labels, changes, message):
    with pytest.raises(ValueError, match=message):
        config, subject, _ = set_up(tiny(), labels, *changes)
        Pruner(subject, config)


def test_what_cannot_be_pruned(labels):
    with pytest.raises(ValueError, match="teacher 'mfcc' has no XLS-R encoder"):
        load_subject("mfcc")


def test_a_loss_that_is_not_finite_ends_the_run(labels, tmp_path):
    with pytest.raises(ValueError, match=r"lower --lr|the loss or its gradients went wrong"):
        prune(*set_up(tiny(), labels, "--lr", 1e30), tmp_path, QUIET)


def test_the_command(labels, tmp_path, capsys):
    model = write_run(tmp_path / "student", tiny().network)
    args = settings_of(labels, "--model", model, "--workers", 0, "--logger", "none")
    args.out = tmp_path / "run"
    assert pruning.run(args) == 0
    told = capsys.readouterr().out
    assert "student: 1,560 of" in told
    assert "5 rounds of 3 steps of 4" in told
    lines = told.splitlines()
    places = [line.split()[0] for line in lines if line.strip()]
    assert places[-5:] == ["loaded", "100", "80", "60", "done:"]
    assert load(tmp_path / "run/pruned-80").name


def test_the_bench(monkeypatch, capsys):
    monkeypatch.setattr(bench_prune, "config_of", lambda size, layers=None: small_xlsr(layers or 5))
    parser = argparse.ArgumentParser()
    bench_prune.add_arguments(parser)
    argv = ["--size", "300m", "--batch", "2", "--updates", "2"]
    assert bench_prune.run(parser.parse_args([*argv, "--device", "cpu"])) == 0
    told = capsys.readouterr().out
    for phase in ("forward and backward", "scoring", "selection", "masking", "optimiser's step"):
        assert phase in told
    assert "EFLOP" in told
