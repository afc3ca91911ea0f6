"""Layers that several backbones, necks and heads are built of."""
