"""Scorers against people's ratings and teachers' labels."""
