"""The packed model and source checkpoints on disk, streamed. Imports `plan` and below."""
