# Every target works as the first thing typed in a fresh clone, and again without redoing work.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The first Python that runs and is one of those supported; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
GL_PACKAGES := libegl1 libgl1 libopengl0 libgl1-mesa-dri
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || { sudo -n true 2>/dev/null && echo sudo -n || echo no; })

.PHONY: help setup demo study test test-slow fuzz lint bench bench-peers clean
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) .gl  ## venv, locked packages, GL libraries

$(READY): requirements.lock pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "pvrpipe needs Python 3.11 to 3.13: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory .install PACKAGES="python3-venv"
	@[ -x $(BIN)/python ] || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@echo "installing the locked packages (about 7 GB with torch; a minute on a fast line)"
	@$(BIN)/uv pip install -q --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $(READY)

# Off-screen rendering needs EGL and a driver; nothing is done where they are there.
.PHONY: .gl .install
.gl:
	@{ ldconfig -p | grep -q libEGL.so.1 && ldconfig -p | grep -q libOpenGL.so.0 && \
		{ ldconfig -p | grep -q libEGL_nvidia || find /usr/lib -name 'swrast_dri.so' -o -name 'libgallium*' | grep -q .; }; } \
		2>/dev/null || $(MAKE) --no-print-directory .install PACKAGES="$(GL_PACKAGES)"

.install:
	@if command -v apt-get >/dev/null && [ "$(AS_ROOT)" != no ]; then \
		echo "installing $(PACKAGES)"; \
		$(AS_ROOT) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(AS_ROOT) apt-get install -y -qq $(PACKAGES) >/dev/null; \
	else echo "please install these packages and run make again: apt-get install $(PACKAGES)"; exit 1; fi

demo: setup  ## the whole way on a real environment, in minutes
	@$(BIN)/pvrpipe demo

study: setup  ## studies/quick.yaml, and what it found as a page: data/studies/quick/report/index.html
	@$(BIN)/pvrpipe study studies/quick.yaml

# Three at a time where there are two processors: a third of the time is waiting, for Ray and for disks. Files that
# have few tests are the long ones, and would be begun last.
test: setup  ## everything that is not marked slow, three files at a time
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: setup  ## what takes minutes
	@$(BIN)/python -m pytest -m slow

FUZZ_MINUTES ?= 30
fuzz: setup  ## coverage-guided fuzzing of all that a stranger's store goes through; FUZZ_MINUTES=30
	@$(BIN)/uv pip install -q --python $(BIN)/python atheris==3.0.0
	@$(BIN)/python -m tests.fuzz.run --minutes $(FUZZ_MINUTES)

lint: setup  ## ruff, and mypy on the package as it installs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf build && mkdir -p build/lint
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --target build/lint/site .
	@cd build/lint && MYPYPATH=site ../../$(BIN)/mypy --config-file ../../pyproject.toml -p pvrpipe

bench: setup  ## the speeds that the design promises, side by side
	@for script in collect embed windows storage reader train probe; do $(BIN)/python benchmarks/$$script.py || exit 1; done

# LeRobot's requirements (an older torch) do not fit beside ours: it has a venv of its own and is spoken to through a pipe.
bench-peers: setup  ## other formats for windows and storage to be compared with (8 GB more with LeRobot)
	@$(BIN)/uv pip install -q --python $(BIN)/python -r benchmarks/peers.txt
	@[ -x .venv-lerobot/bin/python ] || $(BIN)/uv venv -q --python $(BIN)/python .venv-lerobot
	@$(BIN)/uv pip install -q --python .venv-lerobot/bin/python -r benchmarks/lerobot.txt

clean:  ## remove what the targets made
	rm -rf $(VENV) .venv-lerobot build demo data .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
