"""What ``train.scoring.score`` is made of: reading, windows, the student's own engine, tables."""
