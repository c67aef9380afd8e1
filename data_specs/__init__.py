"""WHAT the data is: YAML specs and the types that both the pipeline and the trainer read."""
