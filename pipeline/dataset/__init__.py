"""Shards, their records, and what is done with whole datasets."""
