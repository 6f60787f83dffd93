# Needs python3 >= 3.11 with venv; everything else is installed into .venv/.
PYTHON ?= python3
BIN := .venv/bin
# With it set, every Ray worker compiles all that it imports, again and again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart test test-all lint constraints manifests clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 >= 3.11 is needed; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[test]"
	touch $@

quickstart: install
	$(BIN)/cosmic-ray run jobs/quickstart.yaml

test: install
	$(BIN)/python -m pytest -m "not exhaustive"

test-all: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check cosmic_ray tests cluster
	$(BIN)/ruff format --check cosmic_ray tests cluster

# Names and versions alone: no index, no hosts, so that any mirror serves.
constraints: install
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --extra test --no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml --output-file constraints.txt

# What each committed manifest's first line prints; a test holds them to it.
manifests: install
	for file in cluster/*.rayjob.yaml; do \
	  line=$$(head -1 $$file); \
	  { echo "$$line"; PATH="$(BIN):$$PATH" sh -c "$${line#\# }"; } > $$file.new && mv $$file.new $$file || exit 1; \
	done

clean:
	rm -rf .venv .pytest_cache .hypothesis .ruff_cache
