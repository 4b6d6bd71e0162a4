# Two commands for a newcomer: `make demo` and `make test`. Everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test light test-runtimes check coverage docs release format browser clean

demo: $(VENV)/.demo
	$(BIN)/intaglio demo

# A file of tests goes to one process, which its fixtures may then train a model for. A process has one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test: $(VENV)/.test browser
	$(PYTEST)

# Tests that need no browser and run no artifact in llama.cpp.
light: $(VENV)/.test
	$(PYTEST) tests/unit -m "not runtime and not browser and not environment"

# Lines and branches that tests/unit reaches in its own process.
coverage: $(VENV)/.test
	$(BIN)/coverage run -m pytest tests/unit
	$(BIN)/coverage report

# Each runtime that pins other versions than ours has an environment of its own, with what its .txt lists; one
# that cannot be installed fails here. The artifacts are written in $(VENV) and run there.
RUNTIMES := $(basename $(notdir $(wildcard benchmarks/runners/*.txt)))

test-runtimes: $(VENV)/.test browser $(RUNTIMES:%=.runtimes/%/.done)
	$(BIN)/python -m pytest tests/runtimes -m environment

.runtimes/%/.done: benchmarks/runners/%.txt
	rm -rf .runtimes/$*
	$(PYTHON) -m venv .runtimes/$*
	.runtimes/$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	.runtimes/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	test ! -f benchmarks/runners/$*.sh || bash benchmarks/runners/$*.sh .runtimes/$*
	touch $@

CODE := src tests benchmarks notebooks docs/site

check: $(VENV)/.test
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/codespell

format: $(VENV)/.test
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# site/index.html opens from the folder. The warning is about a later version than the one that is pinned.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# llama.cpp's kernels for AMX die where gcc 12 compiled them. Without the macro that guards them they are left out,
# and everything else is compiled for this processor as before. Some compilers link libstdc++ statically, once into each
# library of llama.cpp. Unless each library hides its copy, one calls another's and dies with signal 11.
LLAMA_FLAGS := CFLAGS="$$CFLAGS -U__AMX_INT8__" CXXFLAGS="$$CXXFLAGS -U__AMX_INT8__"
ifeq ($(shell uname -s),Linux)
LLAMA_FLAGS += LDFLAGS="$$LDFLAGS -Wl,--exclude-libs,ALL"
endif

# torch first and by exact version: then its CPU build is taken where an index offers one
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(LLAMA_FLAGS) $(PIP) --editable '.[llama,onnx,tensorboard,dev]'
	touch $@ $(VENV)/.demo

# What a release is: both archives, checked, and the wheel's own demo in an environment that has nothing else.
release: $(VENV)/.base
	$(PIP) --editable '.[release]'
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --constraint constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	build/fresh/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && fresh/bin/intaglio demo --out demo

$(VENV)/.docs: $(VENV)/.base
	$(PIP) --editable '.[docs]'
	touch $@ $(VENV)/.demo

# The report is tested in a real browser; on Debian and Ubuntu the package manager has one.
browser:
	@command -v chromium chromium-headless-shell google-chrome >/dev/null 2>&1 \
	  || (apt-get update -qq && apt-get install -y -qq chromium) \
	  || echo "no Chromium found: install one, the browser tests need it"

clean:
	rm -rf $(VENV) .runtimes build dist site *.egg-info src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
