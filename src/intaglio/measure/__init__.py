"""Metrics, artifacts run in their runtimes, and reports. Imports `drafter`, `formats`, `train` and below."""
