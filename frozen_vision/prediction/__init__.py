"""Predictions of trained heads on images and videos."""
