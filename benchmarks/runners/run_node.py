"""An ONNX folder in Transformers.js, in node."""

from __future__ import annotations

from runner import run
from transformersjs import loader

if __name__ == "__main__":
    run(loader("node"))
