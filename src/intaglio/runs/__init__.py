"""The orders of work: train, finetune, quantize, drafter, release, proof and demo. Imports everything but `cli`."""
