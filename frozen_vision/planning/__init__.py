"""Memory and time of a training step on machines that are not at hand."""
