"""What both sides need and neither owns: files, storage, audio, hardware, errors, progress."""
