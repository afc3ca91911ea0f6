"""Tensors on disk: formats, downloads, layouts of other frameworks."""
