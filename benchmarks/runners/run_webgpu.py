"""A web page of ours in Chromium, by WebGPU on a software adapter: slow, and right."""

from __future__ import annotations

from runner import run
from transformersjs import loader

if __name__ == "__main__":
    run(loader("webgpu"))
