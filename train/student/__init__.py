"""Training of students (section IV-B)."""
