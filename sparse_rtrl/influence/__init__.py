"""Influence matrices: how they are stored, moved, planned and estimated."""
