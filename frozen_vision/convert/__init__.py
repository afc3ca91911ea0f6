"""Public checkpoints to our own format; strict, and without running anything they contain."""
