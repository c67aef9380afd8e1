"""Encoders of speech behind one interface: waves to the states of their layers."""
