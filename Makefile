# make demo   a phantom examination, read and explained: prints where the report is
# make test   the tests
# Both do their own set-up in .venv. Choose the Python with PYTHON=..., a torch build with TORCH_INDEX=... (README.md).

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.medrationale-installed
DEMO := build/demo
# Threads that spin while they wait make torch many times slower when anything else uses the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test lint tables bench bench-train bench-scene screenshots clean

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  got=$$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo missing); \
	  echo "MedRationale needs Python 3.10 or newer, but '$(PYTHON)' is $$got;" \
	    "name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv first" >&2; exit 1; }

# torch comes first and alone, so that an installed pair or the chosen build is what everything else is fitted to.
$(STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) show --quiet torch torchvision || \
	  $(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	@{ grep -v '^torch' constraints.txt; $(PIP) list --format=freeze | grep -E '^torch(vision)?=='; } \
	  > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt -e '.[train,dev]'
	@touch $@

demo: install
	rm -rf $(DEMO)
	$(BIN)/medrationale phantom --out $(DEMO)/phantom
	$(BIN)/medrationale predict --case $(DEMO)/phantom --out $(DEMO)/report

# A file of tests has a process to itself; each process holds some GB.
test: install
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# The README's tables, from the figures that are kept beside the shipped model.
tables: install
	$(BIN)/python -m MedRationaleTraining.readme_tables .

# The loader against the training step, and the step against the same with segment_anything's own attention.
bench-train: install
	$(BIN)/medrationale-train speed --config Training/configs/compact.yaml

# SAM's encoder and whole studies against segment_anything and MONAI, and the shipped model; takes long on a CPU.
bench: install
	$(BIN)/medrationale-train benchmark --out Resources/Benchmarks --training Training/configs/paper.yaml

# The panel's times: bringing results into the scene, switching heatmaps, and how long its window is blocked.
bench-scene: install
	$(BIN)/python Testing/bench_scene.py

# The README's pictures of the panel; needs GL for off-screen drawing.
screenshots: install
	$(BIN)/python Testing/screenshots.py

# Leaves $(VENV) alone: it takes minutes to make; remove it by hand.
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find MedRationaleLib Training Testing -name __pycache__ -type d -prune -exec rm -rf {} +
