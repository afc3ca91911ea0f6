"""Mask2Former: masked-attention mask transformer."""
