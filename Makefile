# Two commands do all set-up:
#   make run    installs into .venv and runs the main job: AWQ to 4 bits on the default model
#   make test   installs into .venv and passes the tests; GPTQ_AWQ_TEST_DTYPE=bfloat16 make test: with what
#               compute_dtype=auto means on processors that multiply bfloat16 (float32: on others)
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test test-slow lint format docs readme-numbers

run: $(INSTALLED)
	$(BIN)/python run.py method=awq bits=4 $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python scripts/check_notebooks.py notebooks

# The documentation as a site, in site/; a link that leads nowhere fails. ARGS=serve: shown while it is written.
docs: $(INSTALLED)
	$(BIN)/python -m mkdocs $(if $(ARGS),$(ARGS),build --strict)

# README's tables and plot, from the stored runs in benchmarks/results/readme; FROM=ROOT stores other runs first.
readme-numbers: $(INSTALLED)
	$(BIN)/python scripts/readme_numbers.py $(if $(FROM),--store $(FROM))

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,plots]'
	touch $@
