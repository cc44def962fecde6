# `make demo` and `make test` do all their own set-up, in .venv; run again, they repeat only what changed.
PYTHON ?= python3
# Exactly this version: a looser wish can fetch gigabytes of CUDA packages. For a GPU: make clean && make test TORCH=torch==2.11.0
TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
INSTALL := ENGINE_BUILD=none $(PIP) -c constraints.txt --no-build-isolation -e

# On a machine with a GPU: with this Python and what is installed for it, without a network. Results go to OUT.
OUT ?= build/gpu
SUITES ?= kernels decode sampling
LENGTH ?= --full
SANITIZERS ?= memcheck racecheck synccheck

.PHONY: demo test lint bench wheel native gpu gpu-build gpu-test gpu-verify gpu-sanitize gpu-bench clean

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

# Every stage, also after one that fails; each can be called by itself, and so can each suite (make gpu-bench SUITES=decode LENGTH=--quick).
gpu:
	@failed=; for stage in gpu-build gpu-test gpu-verify gpu-sanitize gpu-bench; do $(MAKE) --no-print-directory $$stage || failed="$$failed $$stage"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

gpu-build:
	@$(PYTHON) -c 'import sys, torch; ok = torch.cuda.is_available(); print(torch.cuda.get_device_name() if ok else "torch finds no CUDA GPU"); \
		sys.exit(not ok)'
	@$(PYTHON) -c 'import engine.kernels as k, os, sys; sys.exit(os.path.dirname(k.__file__) != os.path.realpath("kernels"))' 2> /dev/null || \
		ENGINE_BUILD=none $(PYTHON) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(PYTHON) setup.py -q build_ext --inplace

# Mostly Triton compiles: several processes, where pytest-xdist is installed.
gpu-test: WORKERS = $(shell $(PYTHON) -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2> /dev/null)
gpu-test: gpu-build
	@mkdir -p $(OUT)
	$(PYTHON) -m pytest -m gpu $(WORKERS) -o timeout=500 --junitxml=$(OUT)/tests.xml $$(grep -rl --include='test_*.py' 'mark.gpu' tests)

gpu-verify: gpu-build
	$(PYTHON) -m engine verify --device cuda

# One small call of every kernel. Without PyTorch's cache of memory each tensor is an allocation of its own, whose ends memcheck knows.
gpu-sanitize: gpu-build
	@mkdir -p $(OUT); command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer was not found: not run"; exit 0; }; \
	failed=; for tool in $(SANITIZERS); do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTORCH_NO_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 --log-file $(OUT)/$$tool.log \
			$(PYTHON) -m pytest -m gpu -o timeout=0 tests/ops/test_gpu_calls.py || failed="$$failed $$tool"; \
		tail -n 3 $(OUT)/$$tool.log; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

gpu-bench: gpu-build
	@mkdir -p $(OUT); failed=; for suite in $(SUITES); do \
		$(PYTHON) benchmarks/run.py --device cuda --suite $$suite $(LENGTH) --out $(OUT)/$$suite.json || failed="$$failed $$suite"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

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
