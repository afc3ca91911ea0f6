"""Meshes, sharding, processes and memory pages."""
