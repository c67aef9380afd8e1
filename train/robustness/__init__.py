"""What compression costs, condition by condition: ``python -m train robustness``."""
