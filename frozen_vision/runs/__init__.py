"""The workdir of a run: checkpoints, metrics, curves."""
