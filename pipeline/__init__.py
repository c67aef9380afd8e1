"""From folders of audio to pseudo-labelled WebDataset shards."""
