# make course   install, run every notebook, answer a sample question      SCALE=tiny|laptop|gpu|paper  GPUS=8
# make test     install, check the style, run the tests
# make lab      open JupyterLab
# make set-up   install only; the other doors do it themselves, and only once
# make clean    remove .venv, caches and runs/tiny (other runs are kept)
#
# Works with GNU make 3.81 and newer. pip's own configuration (index, proxy, find-links) is respected.

SCALE ?= tiny
GPUS ?= 1
# more for torchrun on several machines, for example TORCHRUN="--nnodes=2 --rdzv-endpoint=first:29500"
TORCHRUN ?=
# recorded questions to answer at the end, any audio files
QUESTIONS ?= $(wildcard data_samples/questions/*.wav)
# test workers, and more for pytest, for example PYTEST="-m 'not slow' tests/test_chunk.py"
WORKERS ?= 2
PYTEST ?=
# the first Python that is new enough
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13; do \
  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The stamp carries a checksum of what was installed, so that a second run installs nothing and a changed file does.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
TORCH_VERSION := $(BIN)/python -c "from importlib.metadata import version; print(version('torch'))"
ifeq ($(GPUS),1)
RUN := $(BIN)/freeze-omni
else
RUN = $(BIN)/torchrun --nproc_per_node=$(GPUS) $(TORCHRUN) -m freeze_omni_lite
endif

.PHONY: course test lab set-up clean

course: $(STAMP)
	$(RUN) run all --scale $(SCALE)
	$(BIN)/freeze-omni talk $(QUESTIONS) --scale $(SCALE) --out-dir runs/$(SCALE)/answers
	@echo
	@echo "Look:   runs/$(SCALE)/index.html   every notebook as it ran, with figures and players"
	@echo "Listen: data_samples/questions/*.wav   the questions"
	@echo "        runs/$(SCALE)/answers/*.wav        the answers; the state of every chunk is in the .json beside them"
	@echo "Next:   make lab, or make course SCALE=laptop"

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb
	FREEZE_OMNI_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks

set-up: $(STAMP)

# torch comes first, so that nothing can ask for another build of it; afterwards that is checked.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found. Install it, or name it: make PYTHON=/path/to/python3." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv module does not work. On Debian and Ubuntu install python3-venv." >&2; exit 2; }
	@echo "Installing torch, then about 160 packages: some minutes, once."
	$(PIP) install --quiet -c constraints.txt torch
	@$(TORCH_VERSION) > $(VENV)/torch-version
	$(PIP) install --quiet -c constraints.txt -e ".[course]"
	@test "$$($(TORCH_VERSION))" = "$$(cat $(VENV)/torch-version)" || \
	  { echo "torch $$(cat $(VENV)/torch-version) was replaced by $$($(TORCH_VERSION)): a package asks for another one." >&2; exit 1; }
	@echo "torch $$(cat $(VENV)/torch-version) is in place and was not replaced."
	$(BIN)/freeze-omni doctor --fix
	@rm -f $(VENV)/.installed-*
	@touch $@

clean:
	rm -rf $(VENV) runs/tiny .pytest_cache .ruff_cache .hypothesis freeze_omni_lite.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
