# Every target does the set-up it needs; `make` alone lists the targets.
# PYTHON=... and GRAIL_FBGEMM=... reach setup.sh through the environment.

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench chaos clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## build .venv, or bring it up to the pins
	@./setup.sh

demo: setup ## train, evaluate and recommend on a synthetic world
	@.venv/bin/grail demo

test: lint ## the whole test suite
	@.venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: setup ## ruff: rules and format
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check . || { echo 'not formatted: run make format' >&2; exit 1; }

format: setup ## let ruff rewrite what it can
	@.venv/bin/ruff check --quiet --fix .
	@.venv/bin/ruff format .

bench: setup ## ratios against stock libraries, into benchmarks/results
	@.venv/bin/python -m benchmarks

chaos: setup ## random kills and resumes, longer than in the tests
	@.venv/bin/python -m tests.chaos

clean: ## remove .venv and all caches; runs and shards stay
	@rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
