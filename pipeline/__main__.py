"""``python -m pipeline VERB``: everything that makes shards."""

from __future__ import annotations

from collections.abc import Sequence

from data_specs.io.cli import end, run_program

VERBS = {
    "manifest": ("pipeline.dataset.scan", "scan a recipe's corpora and show what was found"),
    "plan": ("pipeline.dataset.plan_file", "plan samples without making audio, as parquet"),
    "shards": (
        "pipeline.engine.make_shards",
        "make a dataset of labelled shards, or go on with it",
    ),
    "verify": ("pipeline.dataset.verify", "hold a dataset to its records"),
    "finish": ("pipeline.engine.finish", "write the card of a dataset made in parts, once whole"),
    "replay": ("pipeline.dataset.replay", "make samples again from their own records"),
    "status": ("pipeline.engine.status", "how far a dataset is; exit status 0 where it is whole"),
    "card": ("pipeline.dataset.card", "write a dataset's card again"),
    "extend": ("pipeline.engine.extend", "more samples, or a new version with more recordings"),
    "merge": ("pipeline.dataset.merge", "several outputs of one recipe as one dataset"),
    "relabel": ("pipeline.engine.relabel", "label samples again by another teacher"),
    "preview": ("pipeline.dataset.preview", "a static page to listen to samples of a dataset"),
    "corpora": ("pipeline.corpora.synthetic", "write corpora: speech, noise, simulated rooms"),
    "speak": ("pipeline.corpora.speak", "write a corpus of synthetic speech by text to speech"),
    "words": ("pipeline.dataset.words", "strings of words, or sentences, with their exact text"),
    "conditions": ("pipeline.dataset.conditions", "labelled clips in a grid of rooms and noise"),
    "transcribe": ("pipeline.corpora.transcribe", "fill a labelled CSV's text by a recogniser"),
    "weights": ("pipeline.corpora.weights", "fetch, list and check the processors' weights"),
    "estimate": ("pipeline.cluster.estimate", "time, size and cost of a dataset to be made"),
    "submit": ("pipeline.cluster.submit", "submit a job to Ray, Slurm or Kubernetes, or show it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    return run_program("pipeline", VERBS, argv)


if __name__ == "__main__":
    end(main())
