"""Who makes the shards, where, and how far they are."""
