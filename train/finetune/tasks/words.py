"""Words: characters by CTC or by an RNN transducer, greedy search, word error rate.

The transducer (Graves 2012, arXiv 1211.3711) is Parakeet's of ``transformers``: an LSTM over the
characters so far and a sum of its output and a state, with a CTC layer beside it while it trains
(SpeechBrain's share).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

ALPHABET = " '0123456789abcdefghijklmnopqrstuvwxyz"
"""Symbols 1, 2 ...; 0 is the blank."""

SYMBOLS = len(ALPHABET) + 1
BLANK = 0

CTC_SHARE = 0.3
"""Weight of the CTC loss beside the transducer's (speechbrain, ``conformer_transducer.yaml``)."""

MOST_A_STATE = 10
"""Characters that greedy search takes from one state."""


def plain_words(text: str) -> str:
    """The text in the alphabet: small letters without accents, signs left out, single spaces."""
    letters = unicodedata.normalize("NFKD", text).lower().replace("’", "'").replace("-", " ")
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
    options = {"blank": BLANK, "reduction": "sum", "zero_infinity": True}
    total = functional.ctc_loss(likely_FBV, targets_BU, frames_B, counts_B, **options)
    return total / counts_B.sum().clamp(min=1)


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
