"""ResNet v1.5 (arXiv 1512.03385) and ResNet-RS (arXiv 2103.07579)."""
