#!/usr/bin/env bash
# llama.cpp's server, for a CPU, out of the source package of llama-cpp-python, which holds the whole tree: 200 files to
# compile, about ten minutes on two cores. Nothing is downloaded but that package.
set -euo pipefail
command -v c++ >/dev/null || { echo "c++ not found: install a C++ compiler"; exit 1; }
root=$(cd "$1" && pwd)
"$root/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
  --no-binary llama-cpp-python \
  --dest "$root/source" --requirement /dev/stdin <<'PIN'
llama-cpp-python==0.3.36 --hash=sha256:832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
PIN
export PATH="$root/bin:$PATH"
# llama.cpp's kernels for AMX die where gcc 12 compiled them; without the macro that guards them they are left out
export CFLAGS="${CFLAGS:-} -U__AMX_INT8__" CXXFLAGS="${CXXFLAGS:-} -U__AMX_INT8__"
tar --extract --gzip --strip-components 1 --directory "$root/source" --file "$root"/source/llama_cpp_python-*.tar.gz
cmake -S "$root/source/vendor/llama.cpp" -B "$root/build" -G Ninja -Wno-dev --log-level=WARNING \
  -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_ALL_WARNINGS=OFF
cmake --build "$root/build" --target llama-server --parallel "${JOBS:-2}"
cp "$root/build/bin/llama-server" "$root/bin/"
rm -r "$root/source" "$root/build"
