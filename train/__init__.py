"""Students: read shards, train, evaluate, score. Imports nothing of ``pipeline``."""
