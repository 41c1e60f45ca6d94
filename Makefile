# Everything a developer runs. Each target does its own set-up; `make PYTHON=python3.12` chooses the Python of a
# new environment, and the environment variables CXX, CXXFLAGS, CUDACXX and NVCCFLAGS the compilers and their flags.

PYTHON ?= python3
WARNINGS ?= -Wall -Wextra

BIN := .venv/bin
ENVIRONMENT := .venv/installed
BASELINES := .venv/installed-baselines
OLDEST_TRITON := 3.6.0
OLDEST := .venv-oldest
WITH_OLDEST := PYTHONPATH="$(CURDIR)/$(OLDEST)" $(BIN)/python
LIBRARY := ttsr_fast/_C.abi3.so
CUDA_LIBRARY := ttsr_fast/_C_cuda.abi3.so
KERNELS := $(wildcard $(foreach folder,csrc csrc/*,$(addprefix $(folder)/,*.h *.cpp *.cu)))
BUILD := $(BIN)/python ttsr_fast/operators/build.py

# nvcc, found as by ttsr_fast/operators/build.py; empty where there is none.
CUDACXX ?= $(shell PATH="$${CUDA_HOME:+$$CUDA_HOME/bin:}$$PATH:/usr/local/cuda/bin" command -v nvcc)
CUDA_WARNINGS := -Xcompiler='$(WARNINGS)' $(if $(filter -Werror,$(WARNINGS)),-Werror=all-warnings)

# GCC, because its run-time libraries are preloaded below.
SANITIZED := build/sanitized/$(LIBRARY)
SANITIZER := g++
SANITIZER_FLAGS := -DTTSR_PORTABLE_TILES -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
WITH_SANITIZERS = LD_PRELOAD="$$($(SANITIZER) -print-file-name=libasan.so) $$($(SANITIZER) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	TTSR_FAST_LIBRARY=$(SANITIZED) TTSR_FAST_TEST_BACKENDS=cpp OMP_NUM_THREADS=1
SANITIZER_TESTS := tests/test_search.py tests/test_gather_fold.py tests/test_ops.py tests/test_broken_calls.py

.DEFAULT_GOAL := help
.PHONY: help env build sanitized demo train-demo test test-oldest-triton check format sanitize docs bench wheel clean
.PHONY: campaigns gpu-check-a gpu-check-b gpu-bundle

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 28

env: $(ENVIRONMENT)  ## create .venv with everything that development needs

# The package is installed as a link to this folder; the kernels are built by the next rule.
$(ENVIRONMENT): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the package and the tools of development into .venv, which takes minutes"
	@TTSR_FAST_BUILD=none $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# ninja knows what has changed.
build: env  ## compile the kernels in place, in CUDA where nvcc is
	@CXXFLAGS="$(WARNINGS) $$CXXFLAGS" NVCCFLAGS="$(CUDA_WARNINGS) $$NVCCFLAGS" \
	$(BUILD) $(LIBRARY) $(if $(CUDACXX),$(CUDA_LIBRARY))

demo: build  ## super-resolve a stereo pair, draw what matched, time the search
	$(BIN)/python docs/demo.py
	$(BIN)/python bench/search.py --quick

train-demo: build  ## train a narrow TTSR from scratch on free photographs; a quarter of an hour
	$(BIN)/python docs/train_demo.py

test: build  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n auto --maxprocesses 4 --dist loadgroup

# Next to everything else in .venv: a second torch would be 200 MB for the same tests. The interpreter of that
# Triton takes an array for a number, which NumPy 2.4 refuses.
test-oldest-triton: build $(OLDEST)/installed  ## test and compile the Triton kernels with the oldest Triton
	$(WITH_OLDEST) -c "import triton; assert triton.__version__ == '$(OLDEST_TRITON)'"
	OMP_NUM_THREADS=1 $(WITH_OLDEST) -m pytest --quiet -n auto --maxprocesses 4 --dist loadgroup \
	tests/test_offline.py tests/test_kernels.py

$(OLDEST)/installed: Makefile $(ENVIRONMENT)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON) "numpy<2.4"
	touch $@

check: env  ## lint, formatting and types; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(KERNELS)

format: env  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(KERNELS)

sanitize: sanitized  ## run the tests of the operators under AddressSanitizer and UBSan
	$(WITH_SANITIZERS) $(BIN)/python -m pytest --quiet --capture=no $(SANITIZER_TESTS)
	$(WITH_SANITIZERS) TTSR_FAST_ISA=amx $(BIN)/python -m pytest --quiet --capture=no tests/test_parts.py

campaigns: build sanitized  ## run the long random tests, the operators under the sanitizers; an hour
	$(WITH_SANITIZERS) $(BIN)/python -m tests.campaigns.fuzz_operators --calls 4000 --broken 1000
	$(BIN)/python -m tests.campaigns.mutate_images --tries 1500
	$(BIN)/python -m tests.campaigns.damage_checkpoints --tries 300
	$(BIN)/python -m tests.campaigns.kill_and_resume --kills 40

sanitized: env
	CXX=$(SANITIZER) CXXFLAGS="$(SANITIZER_FLAGS)" $(BUILD) $(SANITIZED)

docs: env  ## build the user guide into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: build $(BASELINES)  ## measure everything into bench/results, plots into docs/images; takes long
	$(BIN)/python bench/search.py --out bench/results
	$(BIN)/python bench/transfer.py --out bench/results
	$(BIN)/python bench/transfer.py --sizes '9*40x40' --out bench/results
	$(BIN)/python bench/model.py --out bench/results
	$(BIN)/python bench/highres.py --out bench/results
	$(BIN)/python docs/draw/plots.py bench/results/search.json bench/results/transfer*.json bench/results/model.json

# Without an environment of its own: a machine with a GPU has a torch that fits it. FROM names the step to go on from.
gpu-check-a:  ## kernels on a CUDA GPU with PYTHON as it is: right or wrong, times, ceilings, profiles
	$(PYTHON) bench/gpu_check.py a $(if $(FROM),--from $(FROM))

gpu-check-b:  ## the same for benchmarks, tests and memcheck
	$(PYTHON) bench/gpu_check.py b $(if $(FROM),--from $(FROM))

gpu-bundle:  ## compile for a GPU that is elsewhere, with PYTHON as it is, into gpu-bundle
	PYTHONPATH="bench/uninstalled:.:$$PYTHONPATH" $(PYTHON) bench/gpu_bundle.py make

$(BASELINES): $(ENVIRONMENT)
	TTSR_FAST_BUILD=none $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[baselines]"
	touch $@

wheel: build  ## build the wheel, which needs nvcc, and the source archive into dist
	TTSR_FAST_BUILD=cuda $(BIN)/python -m build --no-isolation

clean:  ## remove everything that was made here
	rm -rf .venv $(OLDEST) build dist out gpu-bundle .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf *.egg-info
	rm -f ttsr_fast/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
