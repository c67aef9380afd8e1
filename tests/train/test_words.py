"""Words: losses against sums over all paths, greedy search one by one, errors by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torchaudio.functional import edit_distance

from tests.tolerance import rounding
from train.finetune.tasks import words
from train.finetune.tasks.words import Transducer
from train.word_errors import WordErrors, compare, total, word_errors

TEXTS = ["it's 3 o'clock", "no"]
FRAMES_B = torch.tensor([6, 4])


def transducer(dim: int = 6, width: int = 5) -> Transducer:
    torch.manual_seed(3)
    made = Transducer(dim, width)
    for parameter in made.parameters():  # far from even odds
        parameter.data.mul_(3)
    return made


def states(dim: int = 6) -> Tensor:
    return torch.randn(2, 6, dim, generator=torch.Generator().manual_seed(4))


def test_texts_are_spelled_in_the_alphabet_and_back() -> None:
    assert words.plain_words("  Don’t stop—Ünïcode, 12-3! ") == "don't stop unicode 12 3"
    symbols = words.spelled("Ab, 9'")
    assert symbols.tolist() == [13, 14, 1, 12, 2] and symbols.dtype == torch.int32
    assert words.text_of([0, 13, 0, 1, 1, 14, 1]) == "a b"
    assert all(words.text_of(words.spelled(text).tolist()) == text for text in TEXTS)


def by_hand(made: Transducer, states_FD: Tensor, symbols: list[int]) -> float:
    """Alpha recursion over frames and symbols, one entry at a time, in double."""
    before_1U = torch.tensor([[words.BLANK, *symbols]])
    with torch.inference_mode():
        predicted_UJ, states_FJ = made.predictor(before_1U)[0], made.states(states_FD)
        joint = [[made.joint(p, s) for p in predicted_UJ] for s in states_FJ]
    likely = [[logits.double().log_softmax(-1).tolist() for logits in row] for row in joint]
    frames, ends = len(likely), len(symbols)
    alpha = np.full((frames, ends + 1), -np.inf)
    for f, u in itertools.product(range(frames), range(ends + 1)):
        ways = [0.0] if f == u == 0 else []
        ways += [alpha[f - 1, u] + likely[f - 1][u][words.BLANK]] if f else []
        ways += [alpha[f, u - 1] + likely[f][u - 1][symbols[u - 1]]] if u else []
        alpha[f, u] = np.logaddexp.reduce(ways)
    return -float(alpha[-1, -1] + likely[-1][-1][words.BLANK])


def test_the_transducers_loss_is_a_dynamic_programme_by_hand() -> None:
    made, states_BFD = transducer(), states()
    symbols = [words.spelled(text) for text in TEXTS]
    losses = [
        by_hand(made, states_FD[:frames], row.tolist())
        for states_FD, frames, row in zip(states_BFD, FRAMES_B, symbols, strict=True)
    ]
    found = made.loss(states_BFD, FRAMES_B, symbols)
    mean = sum(losses) / sum(map(len, symbols))
    # A sum of at most 6 x 15 log-probabilities a path, each within 10 nats.
    assert found.item() == pytest.approx(mean, abs=rounding(6 * 15, magnitude=10 * 15 / 16))
    torch.autograd.backward(found)
    grads = {name: p.grad for name, p in made.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values()), grads


def test_ctc_sums_over_all_paths() -> None:
    logits_BFV = torch.randn(2, 4, words.SYMBOLS, generator=torch.Generator().manual_seed(5))
    logits_BFV[..., 20:] = -30.0  # so that few symbols matter
    target, frames = [13, 14], 3
    likely_FV = logits_BFV[0, :frames].double().log_softmax(-1)
    paths = itertools.product(range(20), repeat=frames)
    right = [path for path in paths if _merged(path) == target]
    wanted = -torch.logsumexp(
        torch.stack([sum(likely_FV[f, s] for f, s in enumerate(path)) for path in right]), 0
    )
    rows = [torch.tensor(target, dtype=torch.int32), torch.tensor([5] * 9, dtype=torch.int32)]
    found = words.ctc_loss(logits_BFV, torch.tensor([frames, 4]), rows)  # nine fit no four states
    assert found.item() == pytest.approx(float(wanted) / 11, abs=rounding(100))


def _merged(path: tuple[int, ...]) -> list[int]:
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != words.BLANK]


def test_ctc_hears_repeats_once() -> None:
    rows = torch.tensor([[0, 13, 13, 0, 13, 14], [14, 14, 0, 0, 5, 5]])
    logits_BFV = torch.nn.functional.one_hot(rows, words.SYMBOLS).float()
    assert words.ctc_heard(logits_BFV, torch.tensor([6, 4])) == [[13, 13, 14], [14]]


@torch.inference_mode()
def alone(made: Transducer, states_FD: Tensor) -> list[int]:
    """Greedy search of one clip; the predictor reads all symbols anew each time."""
    found: list[int] = []
    for state_J in made.states(states_FD):
        for _ in range(words.MOST_A_STATE):
            predicted_J = made.predictor(torch.tensor([[words.BLANK, *found]]))[0, -1]
            best = int(made.joint(predicted_J, state_J).argmax())
            if best == words.BLANK:
                break
            found.append(best)
    return found


def test_greedy_search_of_a_batch_is_that_of_each_clip() -> None:
    made, states_BFD = transducer(), states()
    made.joint.head.bias.data[words.BLANK] += 2.0  # a character a state or so
    wanted = [alone(made, states_BFD[0]), alone(made, states_BFD[1, :4])]
    assert made.heard(states_BFD, FRAMES_B) == wanted
    assert all(wanted) and any(len(set(row)) > 1 for row in wanted)


def test_word_errors_are_the_fewest_and_of_three_kinds() -> None:
    assert word_errors("a b c", "a b c") == WordErrors(0, 0, 0, 0, 3)
    assert word_errors("a b c", "a x c d") == WordErrors(2, 1, 0, 1, 3)
    assert word_errors("a b c", "c") == WordErrors(2, 0, 2, 0, 3)
    assert word_errors("", "a b") == WordErrors(2, 0, 0, 2, 0)
    assert word_errors("a b", "") == WordErrors(2, 0, 2, 0, 2)
    draw = np.random.default_rng(0)
    for _ in range(200):
        text, heard = (" ".join(draw.choice(list("abc"), draw.integers(7))) for _ in range(2))
        found = word_errors(text, heard)
        assert found.errors == edit_distance(text.split(), heard.split()) == sum(found[1:4])
        # What is deleted and what is inserted is what the lengths differ by.
        assert found.insertions - found.deletions == len(heard.split()) - len(text.split())


def test_systems_are_compared_on_the_same_utterances() -> None:
    draw = np.random.default_rng(1)
    words_N = draw.integers(3, 9, 60)
    one = [WordErrors(e := int(draw.integers(0, w)), e, 0, 0, int(w)) for w in words_N]
    better = [row._replace(errors=row.errors // 2) for row in one]
    groups = [str(n) for n in range(60)]
    found = compare(one, better, groups)
    assert found.rate.value == pytest.approx(total(one).errors / total(one).words)
    assert found.p is not None and found.p < 0.01
    low, high = found.difference.low, found.difference.high
    assert low is not None and high is not None and 0 < low < high
    same = compare(one, one, groups)
    assert same.difference.value == 0 and same.p == 1.0
    assert compare(one, better, ["all"] * 60).difference.low == found.difference.value
