PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install quickstart test check clean
install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "raylign needs Python 3.11 ($(PYTHON) was not found; set PYTHON=…)"; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0' -e '.[dev,qlora]'
	touch $@

quickstart: install
	$(BIN)/raylign run recipes/quickstart.yaml

test: install
	$(BIN)/pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
