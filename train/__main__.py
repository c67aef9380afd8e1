"""``python -m train``: everything that reads shards."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap

from data_specs.io.cli import EXIT_STATUSES, end, run_command, signals_end_at_once
from data_specs.io.output import visible_output
from train.loop.launch import require_device, require_launch

VERBS = {
    "fit": ("student.fit", "train a student, or continue a run"),
    "teacher": ("teacher.fit", "train a teacher's head on rated clips, or continue a run"),
    "experiment": (
        "evaluation.experiment",
        "students on labels against students on ratings (Figure 3)",
    ),
    "lengths": ("evaluation.lengths", "how well models score short crops, by length and filling"),
    "prune": ("pruning.prune", "prune a trained network round by round, or continue a run"),
    "prune-structured": (
        "pruning.prune_structured",
        "take whole units out of a model, so that it is smaller and faster",
    ),
    "evaluate": ("evaluation.evaluate", "compare models with rated clips and with shards' labels"),
    "score": ("scoring.score", "score files, folders or lists to a CSV"),
    "export": ("export.export", "write ONNX, int8, a model card, a bundle, and a page that scores"),
    "report": ("report.report", "write one HTML page about a run"),
    "submit": (
        "submit",
        "hand a training to Slurm, Kubernetes or Ray, or show what would be handed",
    ),
    "variants": ("student.variants", "list the students and what they cost"),
}
"""By verb: the module, with ``add_arguments`` and ``run`` (``submit``: ``main``), and what it is
for."""

ONE_WRITER = (
    "fit",
    "teacher",
    "experiment",
    "lengths",
    "prune",
    "prune-structured",
)
"""Verbs that nothing but their own means may start several times for one folder."""


def _run(verb: str, argv: list[str]) -> int:
    # Only the verb's own module is imported: scoring must not need what training needs.
    with signals_end_at_once():
        module = importlib.import_module(f"train.{VERBS[verb][0]}")
    if verb == "submit":  # what follows -- is another verb's
        return int(module.main(argv))
    parser = argparse.ArgumentParser(prog=f"python -m train {verb}", description=module.__doc__)
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    if verb in ONE_WRITER:
        require_launch(getattr(args, "devices", None), getattr(args, "nodes", 1))
    if hasattr(args, "device"):
        require_device(args.device)
    return int(module.run(args))


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit code (2: wrong usage or input; 130, 143: stopped)."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            [
                *(f"{name:17} {about}" for name, (_, about) in VERBS.items()),
                "",
                textwrap.fill(EXIT_STATUSES, 80),
            ]
        ),
    )
    parser.add_argument("verb", choices=VERBS)
    with visible_output():
        args = parser.parse_args(argv[:1])
        return run_command(lambda: _run(args.verb, argv[1:]))


if __name__ == "__main__":
    end(main(sys.argv[1:]))
