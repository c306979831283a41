# SPDX-License-Identifier: LGPL-2.1-or-later
# CI and the README call these and nothing else. Each may be run on a fresh Debian 12 or 13, and again.

PYTHON := .venv/bin/python
# A throwaway NFS server, guests' images and kernel devices need root.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=SUITE,HERE,NBDNFS_CACHE,NBDNFS_VM_ACCEL)
PYTEST := $(AS_ROOT) $(PYTHON) -m pytest
# Programs that use what tests share; pytest has the same folders from pyproject.toml.
PROGRAM := $(AS_ROOT) env PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/vm-tests:$(CURDIR)/bench $(PYTHON)

.PHONY: help demo test faults vm-test bench bench-vm lint
help:
	@echo 'make demo         a Debian guest swaps onto a file on an NFS server; a table at the end'
	@echo 'make demo HERE=1  the same on this machine, without a guest (needs the kernel module nbd)'
	@echo 'make test         lint, types, all tests, and one guest that swaps'
	@echo 'make faults       ten minutes of verified reads and writes while faults strike; ARGS="--seed 7 --version 4"'
	@echo 'make vm-test      all tests in guests; SUITE=trixie for Debian 13, ARGS="--memory-rounds 3"'
	@echo 'make bench        our worker beside qemu-nbd, the reference engine and bare libnfs'
	@echo 'make bench-vm     a guest swaps to zram, kernel nbd, kernel NFS and nbdnfs; ARGS="--size 64 --rounds 1" is short'
	@echo 'make lint         ruff and mypy'

demo:
	@tools/bootstrap.sh demo
	$(PROGRAM) vm-tests/demo.py $(if $(HERE),--here)

# One after the other, also under make -j: what is cheap to find out comes first.
test:
	@tools/bootstrap.sh test
	$(MAKE) --no-print-directory run-lint
	$(PYTEST) tests
	$(AS_ROOT) tools/sanitize.sh address -q
	$(AS_ROOT) tools/sanitize.sh thread -q
	$(PYTEST) vm-tests -m "smoke or meta"

# Long: a minute of it is in `make test`.
faults:
	@tools/bootstrap.sh test
	$(if $(ARGS),,$(PYTEST) tests -m long)
	$(PROGRAM) tests/faults/run.py $(ARGS)

vm-test:
	@tools/bootstrap.sh test
	$(PYTEST) vm-tests $(ARGS)

bench:
	@tools/bootstrap.sh bench
	$(PROGRAM) bench/native.py --json build/bench.json --svg build/bench.svg $(ARGS)

bench-vm:
	@tools/bootstrap.sh demo
	$(PROGRAM) bench/vm.py --json build/bench-vm.json --svg build/bench-vm.svg $(ARGS)

lint:
	@tools/bootstrap.sh test
	$(MAKE) --no-print-directory run-lint

.PHONY: run-lint
run-lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
