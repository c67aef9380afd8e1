"""Benchmarks and drills; not in the wheel."""
