# Transformers.js with its runtimes, and what drives a browser. No package's own script is run: those download more.
set -eu
command -v npm >/dev/null || { echo "npm not found: install Node.js 20 or newer"; exit 1; }
npm install --prefix "$1" --ignore-scripts --no-audit --no-fund --silent @huggingface/transformers@4.3.1 playwright-core@1.65.1
