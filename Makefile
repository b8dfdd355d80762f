# make demo, make test: each sets up what it needs of .venv on first use and is quick afterwards.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Of thousands of modules few are ever imported, and those Python compiles then.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
# An installation without native kernels is renewed once they can be built.
HEADERS := import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").is_file())
$(shell test -f ftfast/_build_report.json && ! grep -q '"reason": ""' ftfast/_build_report.json \
	&& command -v $${CXX:-c++} >/dev/null && $(BIN)/python -c '$(HEADERS)' && rm -f $(VENV)/ready)

.PHONY: help demo test test-all test-versions machine-code lint bench wheel hub clean
help:
	@echo "make demo    check the kernels, time the loss, distil digits with four methods over six seeds"
	@echo "make test    the tests, but for those that take long or start many processes"
	@echo "make test-all   all tests, as CI runs them"
	@echo "make machine-code   compile every shipped Triton launch and keep the record of what passed"
	@echo "make test-versions  its core with the oldest torch and with every Python, each in a .venv-* of its own"
	@echo "make lint    ruff and mypy"
	@echo "make bench   every benchmark, into runs/bench.json"
	@echo "make wheel   a wheel for other machines, in dist/, tested with the oldest and the newest torch"
	@echo "make hub     the loss as Hugging Face's package kernels loads it, in dist/ftfast-loss"
	@echo "make clean   removes .venv, .venv-*, build products, dist and runs/demo"

$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is missing: apt-get install python3 python3-venv python3-dev" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV); the first time takes a few minutes, most of them for torch."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --editable ".[distill]"
	@$(BIN)/python -c 'import json; reason = json.load(open("ftfast/_build_report.json"))["reason"]; reason and print(f"Note: {reason}.")'
	@touch $@

# ftfast is installed already, so this brings the packages alone and compiles nothing.
$(VENV)/ready-for-tests: $(VENV)/ready
	@echo "Setting up $(VENV) for the tests, which takes some more minutes."
	@$(PIP_INSTALL) "ftfast[all]"
	@touch $@

demo: $(VENV)/ready
	@$(BIN)/ftfast check
	@$(BIN)/python -m bench ft_loss --quick --shapes cifar-r56-r20 --layouts nchw --peers eager,compile
	@$(BIN)/ftfast distill --data digits --methods none,ft,kd,ft+kd --seeds 6 --output runs/demo $(if $(wildcard runs/demo/settings.json),--resume)

# Two processes of as many threads as there are cores: one that waits must not keep the core of one that works.
test test-all: export OMP_WAIT_POLICY := passive

test: $(VENV)/ready-for-tests
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not process" tests
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not process" $(LOSS_INTERPRETED)

test-all: $(VENV)/ready-for-tests
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal tests
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(INTERPRETED)

# Compiles what every shipped Triton launch becomes, and keeps which sources were found good; minutes.
machine-code: $(VENV)/ready-for-tests
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal --keep-machine-code $(wildcard tests/*/test_*_resources.py)

# What the Triton kernels share with the other backends, and what only they have; the interpreter needs a process of its own.
LOSS_INTERPRETED := tests/losses/test_ft_loss.py tests/losses/test_ft_loss_triton.py tests/losses/test_gates.py tests/losses/test_hub_kernel.py
INTERPRETED := $(LOSS_INTERPRETED) tests/losses/test_ft_loss_range.py tests/head/test_ft_head.py $(filter-out $(LOSS_INTERPRETED),$(wildcard tests/*/test_*_triton.py))

test-versions:
	@$(PYTHON) tests/project/versions.py

lint: $(VENV)/ready-for-tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/ready-for-tests
	@mkdir -p runs
	@$(BIN)/python -m bench --out runs/bench.json

wheel:
	@$(PYTHON) release/wheel.py

hub:
	@$(PYTHON) release/hub_kernel.py dist/ftfast-loss

clean:
	rm -rf $(VENV) .venv-py* build dist *.egg-info ftfast/_C*.so ftfast/_build_report.json runs/demo
