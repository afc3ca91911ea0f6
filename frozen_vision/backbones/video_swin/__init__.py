"""Video Swin Transformer (arXiv 2106.13230)."""
