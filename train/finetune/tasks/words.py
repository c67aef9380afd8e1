"""Words: characters by CTC or by an RNN transducer, greedy search, word error rate.

The transducer (Graves 2012, arXiv 1211.3711) is Parakeet's of ``transformers``: an LSTM over the
characters so far and a sum of its output and a state, with a CTC layer beside it while it trains
(SpeechBrain's share).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from data_specs.io.errors import UserError
from data_specs.labelled import LabelledClip
from train.bootstrap import draws, interval
from train.finetune.tasks.task import Result, SpeechTask, groups_of
from train.loop.loop import Metrics
from train.models.encoders.interface import SpeechEncoder, States
from train.word_errors import KINDS, rates, total, word_errors

ALPHABET = " '0123456789abcdefghijklmnopqrstuvwxyz"
"""Symbols 1, 2 ...; 0 is the blank."""

SYMBOLS = len(ALPHABET) + 1
BLANK = 0

CTC_SHARE = 0.3
"""Weight of the CTC loss beside the transducer's (speechbrain, ``conformer_transducer.yaml``)."""

MOST_A_STATE = 10
"""Characters that greedy search takes from one state."""

WIDTH = 256
"""Of the transducer's predictor and joint."""


class Words(SpeechTask):
    """The transducer over the last states, and CTC beside it."""

    name, column = "words", "text"
    is_transducer = True

    def __init__(self, dim: int, width: int = WIDTH) -> None:
        super().__init__(dim=dim, width=width)
        self.ctc = nn.Linear(dim, SYMBOLS)
        self.transducer = Transducer(dim, width) if self.is_transducer else None

    @classmethod
    def new(cls, encoder: SpeechEncoder, training: Sequence[LabelledClip]) -> Self:
        head = cls(encoder.dims[-1])
        head.require(training)
        return head

    def require(self, clips: Sequence[LabelledClip]) -> None:
        for clip in clips:
            if not plain_words(str(clip.text)):
                raise UserError(f"{clip.where}: text {clip.text!r} has no letter from a to z")

    def loss(self, states: States, clips: Sequence[LabelledClip]) -> Tensor:
        """Negative log-likelihood a character, nats."""
        symbols = [spelled(str(clip.text)) for clip in clips]
        states_BFD, frames_B = states.layers[-1], states.lengths_B
        by_ctc = ctc_loss(self.ctc(states_BFD), frames_B, symbols)
        if self.transducer is None:
            return by_ctc
        return self.transducer.loss(states_BFD, frames_B, symbols) + CTC_SHARE * by_ctc

    def predict(self, states: States) -> list[Any]:
        states_BFD, frames_B = states.layers[-1], states.lengths_B
        if self.transducer is None:
            found = ctc_heard(self.ctc(states_BFD), frames_B)
        else:
            found = self.transducer.heard(states_BFD, frames_B)
        return [text_of(symbols) for symbols in found]

    def measure(self, clips: Sequence[LabelledClip], predicted: Sequence[Any]) -> Metrics:
        """Word error rate, and the loss: that of characters, which moves earlier."""
        from torchaudio.functional import edit_distance

        texts = [plain_words(str(clip.text)) for clip in clips]
        found = total([word_errors(*pair) for pair in zip(texts, predicted, strict=True)])
        wrong = sum(edit_distance(*pair) for pair in zip(texts, predicted, strict=True))
        return {"loss": wrong / sum(map(len, texts)), "wer": found.errors / found.words}

    def judge(self, clips: Sequence[LabelledClip], predicted: Sequence[Any], seed: int) -> Result:
        """Errors a word, all and of each kind; speakers are drawn."""
        rows = self.rows(clips, predicted)
        found = [word_errors(row["text"], row["heard"]) for row in rows]
        counts_RN, once = draws(groups_of(clips), seed), np.ones((1, len(found)))
        kinds = {"wer": "errors"} | {name: name for name in KINDS}
        return {
            name: interval(float(rates(once, found, kind)[0]), rates(counts_RN, found, kind))
            for name, kind in kinds.items()
        }

    def rows(self, clips: Sequence[LabelledClip], predicted: Sequence[Any]) -> list[dict[str, str]]:
        """What was said and what was heard, for ``python -m train word-errors``."""
        return [
            {
                "clip": clip.path.name,
                "group": clip.speaker or clip.path.name,
                "text": plain_words(str(clip.text)),
                "heard": heard,
            }
            for clip, heard in zip(clips, predicted, strict=True)
        ]


class WordsByCtc(Words):
    """CTC alone."""

    name = "words-ctc"
    is_transducer = False


def plain_words(text: str) -> str:
    """The text in the alphabet: small letters without accents, signs left out, single spaces."""
    letters = unicodedata.normalize("NFKD", text).lower().replace("’", "'")
    letters = re.sub("[-–—/]", " ", letters)
    return " ".join(re.sub(f"[^{ALPHABET}]", "", " ".join(letters.split())).split())


def spelled(text: str) -> Tensor:
    """Symbols of a text, int32 (U)."""
    return torch.tensor([1 + ALPHABET.index(c) for c in plain_words(text)], dtype=torch.int32)


def text_of(symbols: Sequence[int]) -> str:
    """What symbols spell, blanks left out; words apart by one space."""
    return " ".join("".join(ALPHABET[s - 1] for s in symbols if s != BLANK).split())


class Transducer(nn.Module):
    """States (B, F, D) and symbols to logits, and greedy search over both."""

    def __init__(self, dim: int, width: int) -> None:
        from transformers import ParakeetRNNTConfig
        from transformers.models.parakeet import modeling_parakeet as parakeet

        super().__init__()
        self.config = ParakeetRNNTConfig(
            vocab_size=SYMBOLS,
            decoder_hidden_size=width,
            num_decoder_layers=1,
            blank_token_id=BLANK,
            encoder_config={"model_type": "parakeet_encoder"},
        )
        self.states = nn.Linear(dim, width)
        self.predictor = parakeet.ParakeetRNNTDecoder(self.config)
        self.joint = parakeet.ParakeetRNNTJointNetwork(self.config)

    def loss(self, states_BFD: Tensor, frames_B: Tensor, symbols: Sequence[Tensor]) -> Tensor:
        """Negative log-likelihood a symbol, a scalar (nats)."""
        from torchaudio.functional import rnnt_loss

        targets_BU, counts_B = _padded(symbols, states_BFD.device)
        before_BU = functional.pad(targets_BU, (1, 0), value=BLANK)
        predicted_B1UJ = self.predictor(before_BU)[:, None]
        logits_BFUV = self.joint(predicted_B1UJ, self.states(states_BFD)[:, :, None])
        losses_B = rnnt_loss(
            logits_BFUV[:, : int(frames_B.max())].float().contiguous(),
            targets_BU,
            frames_B.int(),
            counts_B,
            blank=BLANK,
            reduction="none",
        )
        return losses_B.sum() / counts_B.sum().clamp(min=1)

    def heard(self, states_BFD: Tensor, frames_B: Tensor) -> list[list[int]]:
        """Symbols of each clip: of every state the likeliest ones until that is the blank."""
        from transformers.models.parakeet.generation_parakeet import ParakeetRNNTDecoderCache

        cache = ParakeetRNNTDecoderCache(self.config)
        found: list[list[int]] = [[] for _ in states_BFD]
        predicted_B1J = self.predictor(torch.full_like(frames_B, BLANK)[:, None], cache=cache)
        for frame, state_BJ in enumerate(self.states(states_BFD).unbind(1)):
            for _ in range(MOST_A_STATE):
                best_B = self.joint(predicted_B1J[:, 0], state_BJ).argmax(-1)
                best_B = best_B.where(frame < frames_B, BLANK)
                if not best_B.any():
                    break
                predicted_B1J = self.predictor(best_B[:, None], cache=cache)  # of blanks: as it was
                for symbols, symbol in zip(found, best_B.tolist(), strict=True):
                    symbols += [symbol] if symbol else []
        return found


def ctc_loss(logits_BFV: Tensor, frames_B: Tensor, symbols: Sequence[Tensor]) -> Tensor:
    """CTC's negative log-likelihood a symbol (nats); a text too long for its clip counts zero."""
    targets_BU, counts_B = _padded(symbols, logits_BFV.device)
    likely_FBV = logits_BFV.float().log_softmax(-1).transpose(0, 1)
    losses_B = functional.ctc_loss(
        likely_FBV, targets_BU, frames_B, counts_B, BLANK, reduction="none", zero_infinity=True
    )
    return losses_B.sum() / counts_B.sum().clamp(min=1)


def ctc_heard(logits_BFV: Tensor, frames_B: Tensor) -> list[list[int]]:
    """The likeliest symbol of every state, repeats taken once, without blanks."""
    best_BF = logits_BFV.argmax(-1)
    rows = [row[:count].unique_consecutive() for row, count in zip(best_BF, frames_B, strict=True)]
    return [row[row != BLANK].tolist() for row in rows]


def _padded(symbols: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Symbols (B, U) with blanks behind, and how many they are (B), int32."""
    counts_B = torch.tensor([len(row) for row in symbols], dtype=torch.int32)
    targets_BU = pad_sequence(list(symbols), batch_first=True, padding_value=BLANK)
    return targets_BU.to(device), counts_B.to(device)
