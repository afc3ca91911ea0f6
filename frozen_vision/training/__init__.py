"""The training loop, the evaluation loop, and the optimizer."""
