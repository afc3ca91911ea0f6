"""What features in memory know, measured without training a model by gradient steps."""
