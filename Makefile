PYTHON ?= python3.11
BIN := .venv/bin
VLLM := .venv-vllm

.PHONY: install quickstart test test-slow test-vllm bench chaos check clean
install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "raylign needs Python 3.11 ($(PYTHON) was not found; set PYTHON=…)"; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0' -e '.[dev,qlora,trackio]'
	touch $@

quickstart: install
	$(BIN)/raylign run recipes/quickstart.yaml

# Two files of tests side by side, each process with a Ray of its own.
test: install
	$(BIN)/pytest -n 2 --dist loadfile -m 'not slow'

test-slow: install
	$(BIN)/pytest -m slow

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/pytest -m vllm

# An environment of its own, since vLLM holds an older transformers. Every version is given and nothing is resolved:
# vLLM also asks for torchvision, whose build for CUDA breaks `import vllm` beside a torch for CPUs.
$(VLLM)/.installed: constraints-vllm.txt
	@command -v $(PYTHON) >/dev/null || { echo "raylign needs Python 3.11 ($(PYTHON) was not found; set PYTHON=…)"; exit 2; }
	test -x $(VLLM)/bin/pip || $(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

bench: install
	@$(BIN)/python -m benchmarks $(or $(NAME),all) $(if $(CASE),--case '$(CASE)')

chaos: install
	@$(BIN)/python -m benchmarks.chaos

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache
