"""Task ``words``: the word error rate of a recogniser, of ``transformers`` or finetuned here.

Held against the clips' text, or, where a clip has none, against what the model itself hears in its
clean twin before compression: then the rate is what noise and compression add, and no person's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from data_specs.labelled import LabelledClip
from data_specs.sample import SAMPLE_RATE
from train.audio import Wave, read_mono, to_16k
from train.bootstrap import Doubles
from train.finetune.saved import NAME, load_model
from train.finetune.tasks.words import Words, plain_words
from train.models.bits import int8_linears_, matrices, megabytes
from train.models.recogniser import Recogniser, load_recogniser
from train.models.tensors import state_sha256
from train.robustness.interface import Clip, Judged, Metric, Values
from train.scoring.code import made_with
from train.scoring.scorer import torch_on
from train.word_errors import word_errors


class Finetuned:
    """A recogniser of a folder of ``python -m train finetune``: its encoder and its words."""

    def __init__(self, folder: Path, device: str) -> None:
        encoder, tasks, _ = load_model(folder)
        heads = [task for task in tasks.values() if isinstance(task, Words)]
        if not heads:
            raise UserError(f"{folder}: was not finetuned on words, but on {', '.join(tasks)}")
        both = nn.ModuleDict({"encoder": encoder, "head": heads[0]})
        self.network: nn.Module = both.to(device).eval()
        self.device, self.longest_s = device, encoder.longest_s

    def _states(self, wave_T: Wave) -> tuple[Any, Any]:
        wave_1T = torch.from_numpy(wave_T)[None].to(self.device)
        lengths_B = torch.tensor([len(wave_T)])
        head: Any = self.network.get_submodule("head")
        encoder = self.network.get_submodule("encoder")
        return head, encoder(wave_1T, lengths_B, **head.inputs(encoder, wave_1T, lengths_B))

    @torch.inference_mode()
    def hear(self, waves: Sequence[Wave]) -> list[str]:
        """See ``Recogniser``; one by one."""
        found = (self._states(wave_T) for wave_T in waves)
        return [str(head.predict(states)[0]) for head, states in found]

    def loss(self, wave_T: Wave, text: str) -> Tensor:
        head, states = self._states(wave_T)
        clip = LabelledClip(path=Path(), dataset="", split="test", text=text)
        found: Tensor = head.loss(states, [clip])
        return found


def _wer(counts_RN: Doubles, _: Doubles, values: Values) -> Doubles:
    rates_R: Doubles = counts_RN @ values["errors"] / (counts_RN @ values["words"])
    return rates_R


class WordsJudged(Judged):
    """A recogniser on clips of speech."""

    metrics: ClassVar[Mapping[str, Metric]] = {"WER": Metric(1, _wer)}
    columns = ("errors", "words")

    def __init__(self, model: str, device: str) -> None:
        finetuned = (Path(model) / f"{NAME}.safetensors").is_file()
        self.recogniser: Finetuned | Recogniser = (
            Finetuned(Path(model), device) if finetuned else load_recogniser(model, device)
        )
        self.network = self.recogniser.network
        self.name, self.names = model, matrices(self.network)
        self.weights_sha256 = state_sha256(self.network)
        self.version = made_with(torch_on(torch.device(device)))
        self.megabytes = megabytes(self.network)
        self._heard: dict[Path, str] = {}

    def prepare(self, clips: Sequence[Clip]) -> None:
        """Hear the clean twins of clips without text, once."""
        for path in {c.clean or c.path for c in clips if c.text is None} - self._heard.keys():
            self._heard[path] = self._heard_in(path)

    def judge(self, clips: Sequence[Clip]) -> Iterator[dict[str, float]]:
        for clip in clips:
            text = self._heard[clip.clean or clip.path] if clip.text is None else clip.text
            found = word_errors(plain_words(text), plain_words(self._heard_in(clip.path)))
            yield {"errors": float(found.errors), "words": float(found.words)}

    def _heard_in(self, path: Path) -> str:
        wave_T, longest_s = to_16k(*read_mono(path)), self.recogniser.longest_s
        if len(wave_T) < SAMPLE_RATE // 10:
            raise UserError(f"{path}: shorter than a tenth of a second: no word is in it")
        if len(wave_T) > longest_s * SAMPLE_RATE:
            raise UserError(
                f"{path}: {len(wave_T) / SAMPLE_RATE:.1f} s, but {self.name} hears {longest_s:g} "
                "s, and words behind them would count as missed: cut the clip"
            )
        return self.recogniser.hear([wave_T])[0]

    def influence(self, wave_T: Wave) -> Tensor:
        """The likelihood of what it hears: see ``Judged.influence``."""
        return self.recogniser.loss(wave_T, self.recogniser.hear([wave_T])[0])

    def hear(self, wave_T: Wave) -> None:
        self.recogniser.hear([wave_T])

    def int8(self, waves: Sequence[Wave], folder: Path) -> Judged:
        """Every linear layer in int8 by oneDNN; convolutions, norms and embeddings as they are."""
        made = copy.copy(self)
        made.recogniser = copy.copy(self.recogniser)
        made.network = made.recogniser.network = int8_linears_(copy.deepcopy(self.network))
        made.megabytes = megabytes(made.network)
        return made
