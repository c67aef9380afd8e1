"""The tasks by name."""

from __future__ import annotations

from train.finetune.tasks.keywords import Keywords
from train.finetune.tasks.quality import Quality
from train.finetune.tasks.self_supervised import SelfSupervised
from train.finetune.tasks.speakers import Speakers
from train.finetune.tasks.task import SpeechTask
from train.finetune.tasks.words import Words, WordsByCtc

TASKS: dict[str, type[SpeechTask]] = {
    task.name: task for task in (Keywords, Speakers, Quality, Words, WordsByCtc, SelfSupervised)
}
