# make demo     the whole pipeline on embedded data, about a minute after the set-up
# make quick    lint, types and the fast tests: under three minutes
# make test     lint, types and every test but the long ones: under fourteen minutes
# make long     the long tests: soak, fuzz, simulations, large networks, clean installs; goes on where it was stopped
#
# Each makes .venv from this project's files first. PYTHON picks the interpreter (3.10 or newer).

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed-from-constraints
# One process per core; the tests of a file share a process, and its expensive fixtures.
PYTEST := $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile

.PHONY: demo quick test long lint clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(VENV)/bin/mexit demo
	@echo "The commands above work after:  . $(VENV)/bin/activate"

quick: $(STAMP) lint
	$(PYTEST) -m "not slow and not long"

test: $(STAMP) lint
	$(PYTEST) -m "not long"

long: $(STAMP)
	$(VENV)/bin/python tests/run_long.py

lint: $(STAMP)
	$(VENV)/bin/ruff check mexit tests examples benchmarks
	$(VENV)/bin/ruff format --check mexit tests examples benchmarks
	$(VENV)/bin/mypy

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mexit needs Python 3.10 or newer; try: make PYTHON=python3.12"; exit 1; }
	@echo "Installing mexit with its training, serving, camera and test parts into $(VENV):"
	@echo "PyTorch (CPU, 190 MB to download), ONNX, ONNX Runtime, PyAV, matplotlib and small packages;"
	@echo "about 1.3 GB on disk, one to three minutes."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV)
