"""Plans, and the audio that follows from them."""
