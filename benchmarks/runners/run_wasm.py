"""A web page of ours in Chromium, on the CPU."""

from __future__ import annotations

from runner import run
from transformersjs import loader

if __name__ == "__main__":
    run(loader("wasm"))
