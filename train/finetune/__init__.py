"""Finetuning of an encoder of speech on tasks: distillation and pruning within the same updates."""
