"""Finetuning of an encoder on tasks. ``python -m train finetune``.

An update is the loss of the task whose turn it is, plus the terms: distillation, budget
(``train.finetune.terms``). The best model by the validation losses, summed by share, is judged on
the test split: ``results.json`` and ``results.csv``, with bootstrap intervals over speakers.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_specs.io.addresses import path_here
from data_specs.io.audio import header_of
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.options import add_options, options_of
from data_specs.labelled import LabelledClip, read_labelled
from data_specs.rated import require_heard
from data_specs.sample import SAMPLE_RATE
from data_specs.strict import checked, digest, unknown
from train.command import made_by
from train.data.order import generator
from train.data.stream import Waves
from train.files import csv_text, run_folder
from train.finetune.clips import (
    Batch,
    Feed,
    TaskClips,
    by_task,
    shard_clips,
)
from train.finetune.config import FinetuneConfig, Settings
from train.finetune.saved import save_model
from train.finetune.tasks.speakers import Speakers
from train.finetune.tasks.table import TASKS
from train.finetune.tasks.task import SpeechTask
from train.finetune.tasks.trials import read_trials
from train.finetune.terms import Distilling, Shrinking, Term
from train.loop.loop import (
    ONE_PROCESS,
    Host,
    Metrics,
    Task,
    attention_backward,
    host_of,
    load_best,
    train,
)
from train.models.encoders.interface import SpeechEncoder, States, weights_sha256
from train.models.encoders.loading import load_encoder
from train.pages import ranged

STREAM_DROPOUT = 4
"""Of ``train.data.order.generator``: what an update's dropout and gates are drawn from."""


class Finetuning(Task):
    """An encoder, the tasks' heads, the terms and their optimiser."""

    def __init__(
        self,
        config: FinetuneConfig,
        encoder: SpeechEncoder,
        tasks: Mapping[str, SpeechTask],
        terms: Sequence[Term] = (),
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.name, self.config, self.steps = "finetune", config, config.steps
        self.device = torch.device(device)
        self.encoder = encoder.to(self.device).requires_grad_(not config.frozen)
        self.tasks = nn.ModuleDict(tasks).to(self.device)
        self.terms = nn.ModuleList(terms).to(self.device)
        heads = [*self.tasks.parameters()]
        groups: list[dict[str, Any]] = [{"params": heads, "lr": config.head_lr}]
        if not config.frozen:
            groups.append({"params": [*self.encoder.parameters()], "lr": config.lr})
        for term in terms:
            groups += [{"lr": config.head_lr, **group} for group in term.groups()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parts = {
            **({} if config.frozen else {"encoder": self.encoder}),
            **{"tasks": self.tasks, "terms": self.terms, "optimizer": self.optimizer},
        }

    def update(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the loss: the task's and the terms'."""
        # Seeded anew, so that a continued run drops the same.
        draw = generator(self.config.seed, STREAM_DROPOUT, self.step)
        torch.manual_seed(int(draw.integers(1 << 62)))
        factor = rate_factor(self.config, self.step)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
        self._train(True)
        self.optimizer.zero_grad(set_to_none=True)
        with attention_backward(self.device):
            states = self.states(batch)
            task: Any = self.tasks[batch.task]
            loss: Tensor = task.loss(states, batch.clips)
            for term in self.terms:
                loss = loss + term.loss(batch, states, self.step)  # type: ignore[operator]
            torch.autograd.backward(loss)
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(learned, self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def states(self, batch: Batch) -> States:
        """The encoder's states of a batch, its gates applied."""
        waves_BT, lengths_B = batch.waves_BT.to(self.device), batch.lengths_B.to(self.device)
        task: Any = self.tasks[batch.task]
        tensors: dict[str, Tensor] = {}
        for term in self.terms:
            tensors |= term.tensors(self.encoder)  # type: ignore[operator]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            # Without tensors of terms this is a plain call.
            more = task.inputs(self.encoder, waves_BT, lengths_B)
            return torch.func.functional_call(  # type: ignore[no-any-return]
                self.encoder, tensors, (waves_BT, lengths_B), more
            )

    def _train(self, mode: bool) -> None:
        self.encoder.train(mode and not self.config.frozen)
        self.tasks.train(mode)
        self.terms.train(mode)

    @torch.no_grad()
    def predict(self, data: TaskClips, task: str, clips: Sequence[LabelledClip]) -> list[Any]:
        self._train(False)
        head: Any = self.tasks[task]
        predicted: list[Any] = []
        for start in range(0, len(clips), self.config.batch):
            batch = data.batch(task, clips[start : start + self.config.batch])
            predicted += head.predict(self.states(batch))
        return predicted

    def validate(self, held: TaskClips) -> Metrics:
        """Every task on its validation clips; ``loss`` is their sum by share."""
        metrics: Metrics = {"loss": 0.0}
        for name, share in self.config.shares.items():
            clips = held.clips[name]["validation"]
            head: Any = self.tasks[name]
            found = head.measure(clips, self.predict(held, name, clips))
            metrics["loss"] += share * found["loss"]
            metrics |= {f"{name}_{key}": value for key, value in found.items()}
        return metrics

    def figures(self) -> dict[str, float]:
        found = {"lr": self.config.lr * rate_factor(self.config, self.step - 1)}
        for term in self.terms:
            found |= term.figures()  # type: ignore[operator]
        return found

    def keep(self, metrics: Metrics, out: Path) -> str:
        ready = all(term.is_ready() for term in self.terms)  # type: ignore[operator]
        return super().keep(metrics, out) if ready else ""

    def best_model(self) -> dict[str, Any]:
        parts = {name: part for name, part in self.parts.items() if name != "optimizer"}
        return {name: part.state_dict() for name, part in parts.items()} | {"metrics": self.best}

    def take_best(self, out: Path) -> None:
        """Go back to the best weights, and let the terms cut the encoder for real."""
        best = load_best(out)
        for name, part in self.parts.items():
            if name != "optimizer":
                part.load_state_dict(best[name])
        self._train(False)
        for term in self.terms:
            self.encoder = term.finish(self.encoder).to(self.device)  # type: ignore[operator]
        self.terms = nn.ModuleList()


def rate_factor(config: Settings, step: int) -> float:
    """What a learning rate is multiplied by: a linear rise, then a cosine to 0."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    left = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * left))


def make_terms(config: FinetuneConfig, encoder: SpeechEncoder) -> list[Term]:
    """What an update adds to the tasks' loss, as the options ask for it.

    By low rank the encoder's layers are split here, in place.
    """
    terms: list[Term] = []
    if config.distil_from:
        own = config.distil_from == "self"
        teacher = copy.deepcopy(encoder) if own else load_encoder(config.distil_from)
        how = (config.distil_weight, config.distil_loss, config.teacher_hears)
        terms.append(Distilling(encoder, teacher, *how))
    if config.keep is not None:
        terms.append(Shrinking(encoder, config.by, config.keep, config.steps, config.gates_lr))
    return terms


def finetune(
    config: FinetuneConfig,
    encoder: SpeechEncoder,
    data: TaskClips,
    out: Path,
    host: Host,
    pairs: Sequence[tuple[Path, Path]] = (),
) -> dict[str, Any]:
    """Train, or continue the run in ``out``; write the model, and return its results.

    ``pairs`` are the trials by which speakers are judged (none: every pair). What a signal does,
    and errors, as of ``train.loop.loop.train``.
    """
    torch.manual_seed(config.seed)
    if config.chunk_ms:
        encoder = encoder.streaming(config.chunk_ms)
    if config.start == "random":
        encoder = encoder.fresh()
    tasks = {name: TASKS[name].new(encoder, data.clips[name]["train"]) for name in config.shares}
    if pairs and isinstance(speakers := tasks.get("speakers"), Speakers):
        speakers.pairs = pairs
    for name, task in tasks.items():
        for split in ("validation", "test"):
            task.require(data.clips[name][split])
    terms = make_terms(config, encoder)
    run = Finetuning(config, encoder, tasks, terms, host.device)
    feed = Feed(data, config.shares, config.steps, config.batch, config.seed)
    train(run, feed, data, out, host)
    run.take_best(out)
    results = judged(run, data, out)
    about = {"config": config.model_dump(mode="json"), "results": results}
    save_model(out, run.encoder, tasks, about)
    return results


def judged(run: Finetuning, data: TaskClips, out: Path) -> dict[str, Any]:
    """Each task on the test clips of each dataset, as rows with intervals; and the sizes.

    Writes what a task keeps of each clip to ``out``.
    """
    rows = []
    for name in run.config.shares:
        test, kept = data.clips[name]["test"], []
        for dataset in sorted({clip.dataset for clip in test}):
            clips = [clip for clip in test if clip.dataset == dataset]
            head: Any = run.tasks[name]
            predicted = run.predict(data, name, clips)
            kept += head.rows(clips, predicted)
            found = head.judge(clips, predicted, run.config.seed)
            for figure, value in found.items():
                row = {"task": name, "dataset": dataset, "clips": len(clips)}
                row["speakers"] = len({clip.speaker for clip in clips if clip.speaker})
                rows.append(row | {"figure": figure, **value.named("value")})
        if kept:
            write_text(out / f"{name}.csv", csv_text(kept))
    return {"step": (run.best or {}).get("step"), **run.encoder.sizes(), "rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train finetune``."""
    add = parser.add_argument
    labels = (
        "CSV of labelled clips: path, split, and any of keyword, speaker, mos, text; repeatable"
    )
    add("--clips", type=path_here, action="append", default=[], help=labels)
    shards = "train=FOLDER, validation= or test=: shards with scores, for quality; repeatable"
    add("--shards", action="append", default=[], help=shards)
    trials = "list of 1|0 path path by which speakers are judged (default: every pair); repeatable"
    add("--trials", type=path_here, action="append", default=[], help=trials)
    add("--out", type=path_here, required=True, help="run folder; continued if it exists")
    add_options(parser, Settings)
    add_options(parser, Host, [*ONE_PROCESS, "workers"])


def require_whole(clips: Sequence[LabelledClip], seconds: float) -> None:
    """``UserError`` for a clip of which less is heard than its text is of."""
    for clip in clips:
        header = header_of(clip.path)
        if clip.text is not None and header.frames > seconds * header.sample_rate_hz:
            raise UserError(
                f"{clip.where}: {header.frames / header.sample_rate_hz:.1f} s, but {seconds:g} are "
                "heard, and its text is of all of it: give more --seconds, or leave the clip out"
            )


def run(args: argparse.Namespace) -> int:
    """``python -m train finetune``; returns the exit code."""
    host = host_of(args, Host)
    settings = checked(Settings, options_of(args, Settings), "options")
    for name in settings.shares:
        if name not in TASKS:
            raise UserError(f"--tasks: {unknown('task', name, TASKS)}")
    labelled, (sampled, readers) = read_labelled(args.clips), shard_clips(args.shards)
    clips = [*labelled, *sampled]
    columns = {name: TASKS[name].column for name in settings.shares}
    split = by_task(clips, columns)
    encoder = load_encoder(settings.encoder)
    if settings.seconds > encoder.longest_s:
        raise UserError(f"--seconds {settings.seconds:g}: this encoder hears {encoder.longest_s:g}")
    config = FinetuneConfig(
        **settings.model_dump(),
        encoder_sha256=weights_sha256(encoder),
        clips_sha256=digest([clip.model_dump(mode="json") for clip in clips]),
    )
    with run_folder(args.out):
        if not (args.out / "last.pt").is_file():
            require_heard(labelled)
            require_whole(labelled if "text" in columns.values() else (), settings.seconds)
        waves = Waves(host.cache_gb * 1e9, readers, encoder.resampler)
        data = TaskClips(split, waves, max(1, round(settings.seconds * SAMPLE_RATE)))
        pairs = [pair for path in args.trials for pair in read_trials(path)]
        results = finetune(config, encoder, data, args.out, host, pairs)
        about = {**made_by("finetune", args, add_arguments), **results}
        write_text(args.out / "results.json", json.dumps(about, indent=2) + "\n")
        write_text(args.out / "results.csv", csv_text(results["rows"]))
    for row in results["rows"]:
        shown = ranged(row["value"], row["value_low"], row["value_high"])
        print(f"{row['task']}, {row['dataset']}: {row['figure']} {shown}")
    print(f"done: {args.out / 'results.json'}")
    return 0
