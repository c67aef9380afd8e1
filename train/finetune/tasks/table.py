"""The tasks by name."""

from __future__ import annotations

from train.finetune.tasks.keywords import Keywords
from train.finetune.tasks.quality import Quality
from train.finetune.tasks.speakers import Speakers
from train.finetune.tasks.task import SpeechTask

TASKS: dict[str, type[SpeechTask]] = {t.name: t for t in (Keywords, Speakers, Quality)}
