"""Latents, loss, data, loop, calibration and checkpoints of training. Imports `packed` and below, and no format."""
