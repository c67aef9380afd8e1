"""What an encoder is trained and judged on: a file each."""
