"""The tasks by name."""

from __future__ import annotations

from train.finetune.tasks.keywords import Keywords
from train.finetune.tasks.task import SpeechTask

TASKS: dict[str, type[SpeechTask]] = {task.name: task for task in (Keywords,)}
