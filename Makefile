# `make help` tells what there is; each target sets itself up first (a .venv, and Debian packages).

PYTHON ?= python3
BIN := .venv/bin

# What `make demo` needs: a kernel with nbd (user-mode Linux, where the host's has none), and its tools.
DEMO_PACKAGES := python3-venv user-mode-linux nbd-client e2fsprogs iproute2 kmod
# What the tests and benchmarks need besides: real clients and peers.
TEST_PACKAGES := $(DEMO_PACKAGES) libnbd-bin python3-libnbd qemu-utils fio nbdkit prometheus chromium chromium-driver \
	redis-server podman buildah runc mmdebstrap systemd \
	openssl xfsprogs btrfs-progs makefs gcc make flex bison bc xz-utils

# And what compiles the benchmarks' floor.
BENCH_PACKAGES := $(TEST_PACKAGES) gcc libc6-dev

.PHONY: setup help demo test bench report crash lint clean packages-demo packages-test packages-bench

setup: packages-demo .venv/ready

help:
	@echo 'make setup    .venv/bin/nbdram'
	@echo 'make demo     a real kernel, a 1 TiB device, ext4, files: half a minute'
	@echo 'make test     lint and all tests, with coverage; PYTEST_ARGS="tests/memory -x" for some'
	@echo 'make lint     ruff and mypy'
	@echo 'make bench    beside other servers; BENCH_ARGS="serving --rounds 2"'
	@echo 'make report   docs/benchmarks.md, measured anew'
	@echo 'make crash    servers killed under a file system: docs/crash.md; CRASH_ARGS="--kills 20"'
	@echo 'make soak     mixed clients, for MINUTES=60: docs/soak.md'
	@echo 'make chaos    faults under load: docs/chaos.md; CHAOS_ARGS="--times 2"'
	@echo 'make fuzz     for MINUTES=10: docs/fuzzing.md'
	@echo 'make clean    removes .venv and caches; not .fuzz, the corpus'

demo: packages-demo .venv/ready
	$(BIN)/python -m bench.demo

# The checks first, because they are quick; then all tests, with coverage of nbdram/.
test: packages-test .venv/test-ready lint
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest --cov --cov-report= $(PYTEST_ARGS)
	$(BIN)/coverage report

lint: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: packages-bench .venv/ready
	$(BIN)/python -m bench $(BENCH_ARGS)

# All that docs/benchmarks.md tells, measured anew.
report: packages-bench .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m bench publish $(BENCH_ARGS)

# Kills servers under a busy file system, for minutes; the record of it is docs/crash.md.
crash: packages-test .venv/test-ready
	$(BIN)/python -m tests.kernel.crash $(CRASH_ARGS)

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[top]'
	touch $@

.venv/test-ready: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

packages-demo:
	@deploy/need-packages $(DEMO_PACKAGES)

packages-test:
	@deploy/need-packages $(TEST_PACKAGES)

packages-bench:
	@deploy/need-packages $(BENCH_PACKAGES)

clean:
	rm -rf .venv build *.egg-info .coverage .coverage.* .pytest_cache .hypothesis .mypy_cache .ruff_cache

# Mixed clients on many exports, verified all the time, for so many minutes; docs/soak.md.
.PHONY: soak
soak: MINUTES ?= 60
soak: packages-test .venv/test-ready
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

# Faults under load, one after the other; docs/chaos.md.
.PHONY: chaos
chaos: packages-chaos .venv/test-ready
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

packages-chaos:
	@deploy/need-packages $(TEST_PACKAGES) faketime

# Inputs that nobody thought of, for so many minutes, going on where the last run ended; docs/fuzzing.md.
.PHONY: fuzz
fuzz: MINUTES ?= 10
fuzz: packages-test .venv/test-ready
	$(BIN)/python -m tests.fuzz run --minutes $(MINUTES)
