"""The outside reference for speakers: Resemblyzer's equal error rate on our clips and trials.

``python -m tests.bench speakers --clips labels.csv [--trials LIST]``; needs ``pip install --no-deps
resemblyzer webrtcvad-wheels``. Its network (GE2E, 1.4 M parameters) comes in the wheel.
"""

from __future__ import annotations

import argparse

from data_specs.io.addresses import path_here
from data_specs.io.progress import progress_bar
from data_specs.labelled import read_labelled
from train.audio import read_mono, to_16k
from train.finetune.tasks.speakers import Speakers
from train.finetune.tasks.trials import read_trials


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench speakers``."""
    parser.add_argument("--clips", type=path_here, action="append", required=True)
    parser.add_argument("--trials", type=path_here)


def run(args: argparse.Namespace) -> int:
    """Print both figures of the test split with their intervals."""
    from resemblyzer import VoiceEncoder, preprocess_wav  # type: ignore[import-not-found]

    clips = [c for c in read_labelled(args.clips) if c.split == "test" and c.speaker]
    encoder = VoiceEncoder("cpu", verbose=False)
    heard = (preprocess_wav(to_16k(*read_mono(c.path)), 16_000) for c in progress_bar(clips))
    embeddings = [encoder.embed_utterance(wave_T) for wave_T in heard]
    task = Speakers(1, 1, ["any"])
    task.pairs = read_trials(args.trials) if args.trials else None
    for name, figure in task.judge(clips, embeddings, 0).items():
        print(f"{name} {figure.text()}")
    return 0
