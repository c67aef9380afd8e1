"""The networks: features, head, students, teachers."""
