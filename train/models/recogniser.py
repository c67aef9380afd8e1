"""Recognisers of words as ``transformers`` has them, Whisper's and CTC's: waves to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from data_specs.io.waves import Wave
from data_specs.sample import SAMPLE_RATE

TOKENS_A_SECOND = 8
"""Of Whisper's, more than anybody speaks: a network that is broken repeats itself without end."""


class Recogniser:
    """A network, what makes its input, and its words."""

    def __init__(self, network: nn.Module, features: Any, tokens: Any, is_whisper: bool) -> None:
        self.network, self.is_whisper = network, is_whisper
        self.longest_s = 30.0 if is_whisper else float("inf")
        self._features, self._tokens = features, tokens

    def _inputs(self, waves: Sequence[Wave]) -> Any:
        asked = {"return_attention_mask": True} if self.is_whisper else {"padding": True}
        device = next(self.network.parameters()).device
        made = self._features(list(waves), sampling_rate=SAMPLE_RATE, return_tensors="pt", **asked)
        return made.to(device)

    @torch.inference_mode()
    def hear(self, waves: Sequence[Wave]) -> list[str]:
        """What is said in waves (T,) at 16 kHz, by greedy search; Whisper hears 30 s of each."""
        network: Any = self.network
        inputs = self._inputs(waves)
        if self.is_whisper:
            most = 16 + TOKENS_A_SECOND * max(map(len, waves)) // SAMPLE_RATE
            most = min(most, network.config.max_target_positions // 2)  # as Whisper's own code
            ids = network.generate(**inputs, max_new_tokens=most)
        else:
            ids = network(**inputs).logits.argmax(-1)
        texts = self._tokens.batch_decode(ids, skip_special_tokens=self.is_whisper)
        return [text.strip() for text in texts]

    def loss(self, wave_T: Wave, text: str) -> Tensor:
        """Negative log-likelihood of a text, nats."""
        ids = self._tokens(text, return_tensors="pt").input_ids
        if self.is_whisper:
            ids = ids[:, 1:]  # the network puts the start before it
        found: Tensor = self.network(**self._inputs([wave_T]), labels=ids).loss
        return found


def load_recogniser(source: str, device: str = "cpu") -> Recogniser:
    """Load a recogniser from a folder in ``transformers``' layout, or from a hub.

    Raises ``UserError`` for what is none, or is not to be had as safetensors.
    """
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModelForCTC,
        AutoTokenizer,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    safe: dict[str, Any] = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **safe)
        whisper = config.model_type == "whisper"
        kind: Any = WhisperForConditionalGeneration if whisper else AutoModelForCTC
        model, info = kind.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, dtype="float32", **safe
        )
        tokens = AutoTokenizer.from_pretrained(source, **safe)
        features = (
            WhisperFeatureExtractor(config.num_mel_bins)
            if whisper
            else AutoFeatureExtractor.from_pretrained(source, **safe)
        )
    except Exception as error:  # whatever the libraries raise of files from elsewhere
        told = str(error).strip().split("\n")[0]
        raise UserError(
            f"{source}: no recogniser of words can be loaded from it: {told}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{source}: no recogniser of words: its weights lack {missing[0]!r}")
    return Recogniser(model.eval().to(device), features, tokens, whisper)
