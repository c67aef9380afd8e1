"""``python -m train VERB``: everything that reads shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_specs.io.cli import end, run_program
from data_specs.io.hardware import use_threads
from train.loop.launch import require_device, require_launch

VERBS = {
    "fit": ("train.student.fit", "train a student, or continue a run"),
    "teacher": ("train.teacher.fit", "train a teacher's head on rated clips, or continue a run"),
    "experiment": ("train.evaluation.experiment", "students on labels and on ratings (Figure 3)"),
    "lengths": ("train.evaluation.lengths", "how well models score short crops"),
    "prune": ("train.pruning.prune", "prune a trained network round by round, or continue a run"),
    "prune-structured": ("train.pruning.prune_structured", "take whole units out of a model"),
    "finetune": ("train.finetune.finetune", "an encoder on tasks: joint, distilled, pruned"),
    "word-errors": ("train.word_errors", "word error rates of finetunings, compared"),
    "evaluate": ("train.evaluation.evaluate", "compare models with ratings and shards' labels"),
    "robustness": ("train.robustness.grid", "what fewer bits and weights cost, by condition"),
    "score": ("train.scoring.score", "score files, folders or lists to a CSV"),
    "export": ("train.export.export", "write ONNX, int8, a model card, a bundle, a web page"),
    "report": ("train.report.report", "write one HTML page about a run"),
    "submit": ("train.submit", "submit a training to Slurm, Kubernetes or Ray, or show it"),
    "variants": ("train.student.variants", "list the students and what they cost"),
}

ONE_WRITER = (
    *("fit", "teacher", "experiment", "lengths", "prune", "prune-structured", "finetune"),
    *("evaluate", "robustness"),
)
"""Verbs that nothing but their own means may start several times for one folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    return run_program("train", VERBS, argv, check)


def check(verb: str, options: argparse.Namespace) -> None:
    """Refuse processes that nothing joins, and a device that is not here; set the threads."""
    if verb in ONE_WRITER:
        require_launch(getattr(options, "devices", None), getattr(options, "nodes", 1))
    if hasattr(options, "device"):
        require_device(options.device)
    if hasattr(options, "threads"):
        use_threads(options.threads)


if __name__ == "__main__":
    end(main())
