# `make demo` and `make test` do everything on a fresh machine with Python 3.10+: they make their own environment.
# TORCH chooses a build of torch that is installed first and kept, for example TORCH=torch==2.13.0.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
# NNUNET does the same for nnU-Net, for example NNUNET=nnunetv2==2.8.0.
NNUNET ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.nnunet-flare
CONSTRAINT = $(VENV)/constraints.txt
TEST_ENV = PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 nnUNet_def_n_proc=1 nnUNet_compile=f MPLBACKEND=Agg
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest

.PHONY: demo test lint check coverage soak container-check gpu-check docs release-check clean

EXTRAS = [test,dev,docs,openvino,dicom]

# pip would compile 15000 files, of which few are imported: 79 s more on a slow CPU.
define install
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	: > $(CONSTRAINT)
	test -z "$(TORCH)" || $(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	test -z "$(TORCH)" || echo "$(TORCH)" > $(CONSTRAINT)
	test -z "$(NNUNET)" || echo "$(NNUNET)" >> $(CONSTRAINT)
	$(BIN)/python -m pip install --quiet --no-compile -c $(CONSTRAINT) -e "$(1)" ./packaging/niivue $(2)
endef

$(STAMP): pyproject.toml
	$(call install,.)
	touch $@

$(STAMP)-test: pyproject.toml
	$(call install,.$(EXTRAS),hatchling editables)
	touch $(STAMP) $@

demo: $(STAMP)
	$(BIN)/flare-pseudolabel demo -o flare_demo

test: lint check

lint: $(STAMP)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three test processes on two cores: each waits for child processes for a third of its time.
check: $(STAMP)-test
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 -m "not slow and not gpu" --durations=25 tests

# The same with the share of the code that it runs; a fifth slower.
coverage: $(STAMP)-test
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 -m "not slow and not gpu" --cov --cov-report=term tests

soak: $(STAMP)-test
	FLARE_FUZZ_EXAMPLES=1000 $(PYTEST) tests/test_fuzz.py
	FLARE_SOAK_PAGE=docs/soak.md $(PYTEST) -m "slow and not gpu" --durations=0 tests

# The image of docker/Dockerfile, built and run; FLARE_CONTAINER_ENGINE and FLARE_CONTAINER_BASE choose engine and base.
container-check: $(STAMP)-test
	FLARE_CONTAINER_TORCH="$(or $(TORCH),torch)" $(PYTEST) -m container tests/inference/test_container.py

# On a machine with a GPU: what only it can confirm, then the figures that the pages wait for.
gpu-check: $(STAMP)-test
	$(TEST_ENV) $(BIN)/python benchmarks/gpu.py

docs: $(STAMP)-test
	$(BIN)/mkdocs build

release-check: $(STAMP)-test
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m build --no-isolation --wheel --outdir dist packaging/niivue
	$(PYTEST) tests/plugin

clean:
	rm -rf $(VENV) build dist .coverage* .pytest_cache .mypy_cache .ruff_cache
