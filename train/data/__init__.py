"""Shards and rated clips as batches."""
