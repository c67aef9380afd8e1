"""Pruning: which weights are alive, what each is worth, which go, how a pruned model is kept."""
