"""Checkpoints that others made: opened, looked into, and converted without losing the grid they were trained on.

Imports `formats`, `train` and below.
"""
