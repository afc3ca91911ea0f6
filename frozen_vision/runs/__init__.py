"""What a run leaves in its workdir: checkpoints, metrics, curves."""
