# `make demo` shows the product, `make test` checks it. Both set themselves up on first use.
#   PYTHON  the interpreter the environment is made from (3.11 or newer)

PYTHON ?= python3
BIN    := .venv/bin
TORCH  := $(shell sed -n 's/^\(torch==.*\)$$/\1/p' constraints.txt)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check format docs clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/livery demo

test: check
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

check: .venv/.installed-dev
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit("torchvision is installed and breaks diffusers and transformers: run  $(BIN)/python -m pip uninstall torchvision" if u.find_spec("torchvision") else 0)'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	PYTHONPATH=src $(BIN)/lint-imports

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.installed
	$(BIN)/python -c "from pathlib import Path; from livery.nouns.reference import recipe_page; Path('docs/recipes.md').write_text(recipe_page())"

clean:
	rm -rf .venv

# torch goes first and alone, so that whichever build the user's package index offers (CPU or CUDA) is the one kept.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("livery needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": run  make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing livery into .venv (some minutes the first time)"
	$(PIP) "$(TORCH)"
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "installing the developer tools into .venv"
	$(PIP) -e ".[dev]"
	@touch $@
