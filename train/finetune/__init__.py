"""Encoders of speech trained on labelled clips: tasks, distillation, budgets."""
