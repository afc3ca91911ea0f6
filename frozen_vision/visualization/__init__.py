"""Pictures of predictions beside the truth."""
