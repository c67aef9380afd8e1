"""What an update adds beside the drawn task's loss: distillation, a budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.finetune.clips import Batch
from train.models.encoders.interface import SpeechEncoder, States


class Term(nn.Module):
    """One summand of the loss. Its parameters are learned, its state dict is in checkpoints."""

    def groups(self) -> list[dict[str, object]]:
        """Its parameters as groups for AdamW; a group without ``lr`` has the heads'."""
        parameters = list(self.parameters())
        return [{"params": parameters, "weight_decay": 0.0}] if parameters else []

    def tensors(self, encoder: SpeechEncoder) -> Mapping[str, Tensor]:
        """Tensors by which the encoder is called instead of its own (gates); none: its own."""
        return {}

    def loss(self, batch: Batch, states: States, step: int) -> Tensor:
        """What is added to the loss of update ``step``."""
        return torch.zeros(())

    def is_ready(self) -> bool:
        """Whether a validation now is one of what will be left: only then may it be the best."""
        return True

    def figures(self) -> dict[str, float]:
        """What a line of the log holds of it."""
        return {}

    def finish(self, encoder: SpeechEncoder) -> SpeechEncoder:
        """The encoder that is saved and judged: cut for real."""
        return encoder
