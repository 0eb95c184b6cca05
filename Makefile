# Everything is done inside .venv; `make setup` builds it and does nothing when nothing changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KILLS ?= 200

.DEFAULT_GOAL := help
.PHONY: help setup train test unit check slow faults faults-net faults-slurm storm bench bench-setup lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv with the pinned packages (python >= 3.11)

train: setup ## train the quick walk run to a passed gate, on whatever device there is
	$(BIN)/accelerate launch --config_file accelerate_config.yaml scripts/train.py --config examples/walks_quick.yaml

test: setup ## run every test but the slow lanes
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu"

unit: setup ## run the unit tests (about a minute on two cores)
	$(BIN)/pytest tests/unit -q -n 3 --dist worksteal

check: setup ## check style, types and unit tests, all at once (under two minutes on two cores)
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint unit

slow: setup ## run what takes too long for every change, faults aside (four to six minutes on two cores)
	$(BIN)/pytest tests/unit tests/integration -n 2 --dist worksteal -m "slow and not gpu"

FAULTS_ELSEWHERE := test_net test_slurm test_storm

faults: setup ## inject every fault into real processes (20 to 25 minutes on two cores)
	$(BIN)/pytest tests/faults -n 3 --dist worksteal --durations 15 $(FAULTS_ELSEWHERE:%=--ignore tests/faults/%.py)

faults-net: setup ## cut the link between two machines (Linux, root; one to three minutes)
	$(BIN)/pytest tests/faults/test_net.py -m slow

faults-slurm: setup ## preempt and requeue a job on a SLURM cluster of two nodes on this machine (Debian, root)
	$(BIN)/pytest tests/faults/test_slurm.py -m slow

storm: setup ## kill runs KILLS times (200) at random moments; their bits must not change
	$(BIN)/python tests/faults/storm.py --kills $(KILLS)

bench-setup: setup ## install the trainers that `make bench` compares with
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.lock

bench: bench-setup ## measure everything against its target, into docs/benchmarks.md (25 to 30 minutes, nothing beside it)
	$(BIN)/python benchmarks/bench_report.py

lint: setup ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean: ## remove .venv and all caches; results stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find accel_train benchmarks scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "make: $(PYTHON) is missing or older than 3.11; install Python 3.11 or newer," \
			"or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make: $(PYTHON) has no venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	@echo "compiling what was installed (a minute)"
	@# On all cores instead of pip's one. Without it, where PYTHONDONTWRITEBYTECODE is set, every start would compile
	@# torch again, 3 s each. Packages hold a few files for newer Pythons, which fail.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
