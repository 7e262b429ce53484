# Two commands do everything: `make run` and `make test`.
# The work is done by scripts/*.sh; every step is skipped when its result is up to date.

PREFIX  ?= /usr/local
DESTDIR ?=
TARGET  := $(CURDIR)/target
BINARY  := $(TARGET)/release/matchlock
BUSYBOX := $(TARGET)/images/busybox.tar

export CARGO_TARGET_DIR := $(TARGET)
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin

.PHONY: help run test soak soak-table mutants bench setup check build guest kernel image fmt lint install clean
.DEFAULT_GOAL := help
# One step after the other; cargo itself uses every core.
.NOTPARALLEL:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: build guest image ## Set everything up and run a first command in a microVM
	@scripts/run.sh $(BINARY) $(BUSYBOX)

test: lint guest image ## Set everything up, check format and lints, run every test
	@scripts/test.sh $(BUSYBOX)

# A piece of it: PART=matrix, random, fleet, session or sim; MINUTES=8, KILLS=300, VMS=20, SEEDS=0..5000 say
# how much.
PART ?= all

# The simulation runs on fakes alone.
soak: $(if $(filter sim,$(PART)),setup,guest image) ## Crash at every failpoint, every fault, and at random instants (long; goes on where it stopped)
	@scripts/soak.sh $(BUSYBOX) $(PART)

soak-table: guest image ## Write what `make soak` has found into docs/SPECIFICATION.md
	@scripts/soak.sh $(BUSYBOX) table

mutants: guest image ## Break the program on purpose, and see that the crash suite notices
	@scripts/soak.sh $(BUSYBOX) mutants

bench: build guest image ## Measure, and write docs/PERFORMANCE.md
	@scripts/bench.sh $(BUSYBOX)

setup: ## Install what is missing (Debian packages, Rust targets)
	@scripts/setup.sh

check: ## Only say what is missing
	@scripts/setup.sh --check

build: setup ## Build target/release/matchlock
	@scripts/build.sh host

# KERNEL=stock or own chooses the one that is booted; without it our own where it is built.
guest: setup ## Build the guest bundle (kernel and initramfs)
	@scripts/build.sh guest
	@scripts/guest-bundle.sh

kernel: setup ## Build our own guest kernel, which boots faster, and a bundle with it (20 minutes)
	@scripts/kernel.sh
	@scripts/build.sh guest
	@scripts/guest-bundle.sh

image: setup ## Build the busybox image, target/images/busybox.tar
	@scripts/busybox-image.sh $(BUSYBOX)

fmt: ## Format the source
	@scripts/setup.sh --dev
	cargo fmt --all

lint: ## Check the format and run clippy
	@scripts/setup.sh --dev
	@scripts/build.sh lint

install: build ## Copy the binary to PREFIX/bin (PREFIX=/usr/local)
	install -D -m 0755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/matchlock

clean: ## Remove target/ (and nothing outside this directory)
	rm -rf $(TARGET)
