"""Drafters for multi-token prediction: made for a target, trained on it as it is quantized, and measured with it.

Imports `train` and below.
"""
