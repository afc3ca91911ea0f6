"""Swin Transformer V2 (arXiv 2111.09883)."""
