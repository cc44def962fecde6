# `make demo` and `make test` do all their own set-up, in .venv; run again, they repeat only what changed.
PYTHON ?= python3
# Exactly this version: a looser wish can fetch gigabytes of CUDA packages. For a GPU: make clean && make test TORCH=torch==2.11.0
TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
INSTALL := ENGINE_BUILD=none $(PIP) -c constraints.txt --no-build-isolation -e

.PHONY: demo test lint bench wheel native clean

demo: native .venv/.grammar
	$(BIN)/python -m engine demo

test: native lint
	$(BIN)/python -m pytest

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	@# mypy cannot see that kernels/ is engine.kernels; a folder of links shows it.
	@rm -rf build/typing && mkdir -p build/typing/engine && ln -s $(CURDIR)/engine/* $(CURDIR)/kernels build/typing/engine/
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p engine

bench: native .venv/.bench
	$(BIN)/python benchmarks/run.py

wheel: .venv/.runtime
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

native: .venv/.runtime
	@$(BIN)/python setup.py -q build_ext --inplace

.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed, and $(PYTHON) is not that. Name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	@touch $@

.venv/.runtime: .venv/.torch pyproject.toml setup.py constraints.txt
	$(PIP) -c constraints.txt setuptools wheel pybind11 ninja
	$(INSTALL) .
	@touch $@

.venv/.test .venv/.bench .venv/.grammar: .venv/.%: .venv/.runtime
	$(INSTALL) '.[$*]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info kernels/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
