"""Bytes that a model takes on disk and in memory, from its plan alone. Imports `formats` and below, never `train`."""
