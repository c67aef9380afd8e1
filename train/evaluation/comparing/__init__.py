"""Comparing scorers on rated sets: others' scorers, statistics, the page."""
