# SPDX-License-Identifier: LGPL-2.1-or-later
# CI and the README call these and nothing else. Each can run on a fresh Debian 12 or 13, and again.

PYTHON := .venv/bin/python
# A throwaway NFS server, guests' images and kernel devices need root.
SETTINGS := SUITE,ARCH,KERNEL,HERE,NBDNFS_CACHE,NBDNFS_VM_ACCEL,NBDNFS_TEST_SETTINGS,TIME,MIRROR,XDG_CACHE_HOME
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=$(SETTINGS))
PYTEST := $(AS_ROOT) $(PYTHON) -m pytest
# Most tests wait for a server, so there are more processes than processors. A file's tests stay together. A process
# that crashes ends the run: pytest-xdist 3.8 starts another, and then was seen to wait for ever.
IN_PARALLEL := -n 4 --dist loadfile --max-worker-restart 0
# Programs that use what tests share; pytest has the same folders from pyproject.toml.
PROGRAM := $(AS_ROOT) env PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/vm-tests:$(CURDIR)/bench $(PYTHON)
C_FILES = $(wildcard nbdnfs/*.c nbdnfs/engine/*.[ch] nbdnfs/engine/*/*.[ch] nbdnfs/heir/*.[ch] bench/*.c vm-tests/inside/*.c)

# What the simulator tries beside the tests, most of which wait: the first seeds, always so many, so that the result is
# always the same. It takes about ten minutes of processor time, most of it beside tests that wait. `make prove` tries
# others.
SEEDS := 30000
FIRST_SEED := 1

.PHONY: help release demo test unit faults hostile odd-servers prove vm-test bench bench-vm lint format clean deb
.PHONY: world soak check-deb autopkgtest dist check-dist check-arm
help:
	@echo 'make demo         a Debian guest swaps onto a file on an NFS server; a table at the end'
	@echo 'make demo HERE=1  the same on this machine, without a guest (needs the kernel module nbd)'
	@echo 'make demo DISKLESS=1  a guest without a disk boots from the server, and swaps to it'
	@echo 'make test         lint, types, all tests, and one guest that swaps; ONE=tests/FILE.py::NAME for one test'
	@echo 'make unit         the tests that need no server, no root and no nbdkit: less than a minute'
	@echo 'make faults       ten minutes of verified reads and writes while faults strike; ARGS="--seed 7 --version 4"'
	@echo 'make hostile      a million answers of a server that mutates them, under a sanitizer; ARGS="--answers 1000"'
	@echo 'make prove        the data path on a simulated machine: seeds, crash points, failing calls, seeded faults;'
	@echo '                  goes on where it was ended. PARTS=seeds,mutants for some of it, SECONDS_EACH=3600'
	@echo 'make odd-servers  serve from odd servers, and write the table of docs/servers.md'
	@echo 'make vm-test      all tests in guests; SUITE=trixie, ARCH=arm64, KERNEL=generic, ARGS="--memory-rounds 3"'
	@echo 'make world        fio, stress-ng and tests of other projects on our device in guests; ARGS="--only fio --write"'
	@echo 'make soak HOURS=8 faults, acts of an administrator and loads at once in guests of both Debians; a report'
	@echo 'make bench        our worker beside qemu-nbd, the reference engine and bare libnfs'
	@echo 'make bench-vm     a guest swaps to zram, kernel nbd, kernel NFS and nbdnfs; ARGS="--size 64 --rounds 1"'
	@echo '                  in virtual time; TIME=real for the clock of this machine'
	@echo 'make lint         ruff, mypy, and the C compiler with warnings as errors'
	@echo 'make deb          the Debian package for this Debian, in build/deb'
	@echo 'make check-deb    build it in a fresh Debian, install, use and purge it in others; SUITE=trixie for Debian 13'
	@echo 'make autopkgtest  debian/tests in a guest, by Debian'"'"'s runner, with the package that check-deb built'
	@echo 'make check-arm    cross-compile, and run the unit tests emulated: armhf, or ARCH=arm64 with pages of 16 KiB'
	@echo 'make dist         wheel and source distribution, in build/dist'
	@echo 'make check-dist   the same twice, and what a user does with them'
	@echo 'make release      wheel, source distribution and Debian packages from a clean clone of HEAD, all checked'
	@echo 'make format       ruff format, and clang-format where it is installed'
	@echo 'make clean        remove what was built; .venv stays'

demo:
	@tools/bootstrap.sh demo
	$(PROGRAM) vm-tests/demo.py $(if $(HERE),--here) $(if $(DISKLESS),--diskless)

# One after the other, also under make -j: the cheap checks come first.
# -m "": one test that is named runs even if it is long.
test:
	@tools/bootstrap.sh test
ifdef ONE
	$(PYTEST) -m "" $(ONE) $(ARGS)
else
	$(MAKE) --no-print-directory run-lint
	@mkdir -p build
	nice -n 19 env PYTHONPATH=tests $(PYTHON) -m simulator.prove --only-seeds --seeds $(SEEDS) \
	    --first-seed $(FIRST_SEED) >build/seeds.log 2>&1 & seeds=$$!; status=0; trap "kill $$seeds" INT TERM; \
	$(PYTEST) $(IN_PARALLEL) tests && $(AS_ROOT) tools/sanitize.sh both -q || status=$$?; \
	[ $$status = 0 ] || kill $$seeds; wait $$seeds || [ $$status != 0 ] || status=1; cat build/seeds.log; exit $$status
	$(PYTEST) vm-tests -m "smoke or meta"
endif

unit:
	@tools/bootstrap.sh test
	$(PYTHON) -m pytest -q tests -m "not server and not fake and not long" $(ARGS)

# Long: a minute of it is in `make test`. With ARGS only the run itself, for example to replay a seed.
faults:
	@tools/bootstrap.sh test
	$(if $(ARGS),,$(PYTEST) tests -m long)
	$(PROGRAM) tests/faults/run.py $(ARGS)

hostile:
	@tools/bootstrap.sh test
	tools/sanitize.sh address --program tests/hostile/run.py $(ARGS)

# SECONDS_EACH=3600 for more seeds; ARGS="--first-seed 5000" for others, ARGS="--shrink 7" to make one smaller.
prove:
	@tools/bootstrap.sh test
	PYTHONPATH=tests $(PYTHON) -m simulator.prove --seconds $(or $(SECONDS_EACH),300) $(if $(PARTS),--parts $(PARTS)) \
	    --write $(ARGS)

odd-servers:
	@tools/bootstrap.sh test
	$(PROGRAM) tests/hostile/odd_servers.py --write

vm-test:
	@tools/bootstrap.sh test
	$(PYTEST) vm-tests $(ARGS)

# LTP, XFSTESTS and BLKTESTS name the folders of suites that Debian does not package: vm-tests/README.md.
world:
	@tools/bootstrap.sh test
	$(PROGRAM) vm-tests/run_world.py $(if $(LTP),--ltp $(LTP)) $(if $(XFSTESTS),--xfstests $(XFSTESTS)) \
	    $(if $(BLKTESTS),--blktests $(BLKTESTS)) $(ARGS)

soak:
	@tools/bootstrap.sh test
	$(PROGRAM) vm-tests/soak.py --hours $(or $(HOURS),1) $(ARGS)

bench:
	@tools/bootstrap.sh bench
	$(PROGRAM) bench/native.py --json build/bench.json --svg build/bench.svg $(ARGS)

bench-vm:
	@tools/bootstrap.sh demo
	$(PROGRAM) bench/vm.py --json build/bench-vm.json --svg build/bench-vm.svg $(ARGS)

lint:
	@tools/bootstrap.sh test
	$(MAKE) --no-print-directory run-lint

deb:
	@tools/bootstrap.sh deb
	tools/build_deb.sh build/deb/here

# The last one boots the guest of vm-tests/test_package.py: an upgrade under load, and the removal.
check-deb:
	@tools/bootstrap.sh test
	$(AS_ROOT) tools/check_deb.sh $(or $(SUITE),bookworm) $(ARCH)
	$(PYTEST) -m "" vm-tests/test_package.py $(ARGS)

# ARGS=--test-name=smoke for one of the tests, ARGS=--debug to see what the runner does.
autopkgtest:
	@tools/bootstrap.sh test
	$(PROGRAM) vm-tests/run_autopkgtest.py $(ARGS)

# 32 bits by default: all else about arm64 is the guests' business.
check-arm: ARCH := $(or $(ARCH),armhf)
check-arm:
	@ARCH=$(ARCH) tools/bootstrap.sh test
	$(AS_ROOT) tools/check_arm.sh $(ARCH) $(or $(SUITE),trixie) $(ARGS)

dist:
	@tools/bootstrap.sh test
	tools/build_dist.sh build/dist

check-dist:
	@tools/bootstrap.sh test
	tools/check_dist.sh

# From what is committed, in a folder of its own. SUITES names the Debians, for example "trixie trixie/arm64"; it needs
# root, the network, and an hour.
release:
	$(AS_ROOT) tools/release.sh $(or $(SUITES),bookworm trixie)

# Warnings are errors here and not in setup.py: a newer compiler's new warning must not break an installation.
.PHONY: run-lint
run-lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	NBDNFS_CFLAGS=-Werror $(PYTHON) -W ignore setup.py -q build_ext --build-temp build/werror --build-lib build/werror/lib
	gcc -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Werror -fsyntax-only -Inbdnfs/engine $$(pkg-config --cflags libnfs) bench/*.c

format:
	@tools/bootstrap.sh test
	$(PYTHON) -m ruff check --fix-only --quiet .
	$(PYTHON) -m ruff format .
	$(if $(and $(wildcard .clang-format),$(shell command -v clang-format)),clang-format -i $(C_FILES))

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find nbdnfs -name '*.so' -delete
	find nbdnfs plugin systemd tests vm-tests bench tools -name __pycache__ -prune -exec rm -rf {} +
