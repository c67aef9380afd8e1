"""What every training run shares: processes, signals, log."""
