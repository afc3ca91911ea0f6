"""EfficientNet (arXiv 1905.11946) and EfficientNet-Lite."""
