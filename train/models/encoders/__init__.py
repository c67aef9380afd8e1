"""Speech encoders behind one interface."""
