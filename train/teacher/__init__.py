"""Training of the teacher's head (section IV-A)."""
