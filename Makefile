# Everything is made in out/. What takes long and does not depend on the sources (guest kernel, test node, crictl, images) is
# kept in $ISOPOD_CACHE (default ~/.cache/isopod) and made once.

SHELL := /bin/bash
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
MINUTES ?= 10

.PHONY: all programs kernel initramfs fixtures demo test unit e2e critest kubelet bench soak upgrade fuzz bench-images node lint clean help

help:
	@sed -n 's/^## //p' Makefile

## make all         the programs, the guest kernel and the initramfs, in out/
all: programs kernel initramfs

## make programs    out/isopod, out/isopod-vmm and out/isopod-fs, optimized
programs:
	@tests/setup/packages gcc libc6-dev
	@tests/setup/rust
	@echo "programs: building isopod, isopod-vmm and isopod-fs; some minutes the first time"
	@$(CARGO) build --release --locked -p isopod-cri-server -p isopod-vmm -p isopod-fs --bins
	@mkdir -p out
	@for name in isopod isopod-vmm isopod-fs; do ln -sfn "$$(realpath "$(TARGET)/release/$$name")" "out/$$name"; done

kernel:
	@guest/kernel/build

initramfs:
	@guest/initramfs/build

fixtures:
	@tests/setup/fixtures

## make demo        a pod with nginx from a registry to its removal, each step shown and checked
demo: all fixtures
	@tests/node/run --timeout 900 -- tests/demo

## make test        all tests; the last line is "N passed, N failed, N skipped"
test: all fixtures
	@tests/test

## make unit        the tests that need no node: cargo test
unit:
	@tests/setup/packages strace
	@tests/setup/rust
	@$(CARGO) test --locked --workspace

## make e2e TEST=x  the end-to-end tests whose name has x in it, in the node (all of them without TEST)
e2e: all fixtures
	@tests/e2e $(TEST)

## make critest TEST=x  the kubelet's conformance suite in the node, or the specs whose name has x in it
critest: all fixtures
	@tests/critest/run $(if $(TEST),"$(TEST)")

## make kubelet     the real kubelet on the daemon's socket, in the node: one pod, from its start to its removal
kubelet: all fixtures
	@tests/kubelet/run

## make node        a shell in the test node with the daemon running
node: all fixtures
	@tests/node/run --interactive --timeout 86400 -- tests/session

## make bench       the figures of SPECIFICATION.md
bench: all fixtures
	@tests/bench/run

## make bench-images MB=300 RUNS=1  pulls natively, isopod's store beside containerd, images of about so many MB each
bench-images:
	@tests/bench/images $(or $(MB),300) $(or $(RUNS),1)

## make soak MINUTES=x  for so long each: a log that is written and rotated, no line lost or doubled, the daemon's memory flat; and
##                  pods that come and go while VMMs and the daemon are killed; then a restart of the daemon under PODS pods (20),
##                  and SANDBOXES sandboxes (100), 20 at a time
soak: all fixtures
	@$(CARGO) build --release --locked -p isopod-tests --bin soak
	@for what in log pods; do tests/node/run --timeout $$(($(MINUTES) * 60 + 900)) -- \
		tests/session "$$(realpath "$(TARGET)/release/soak")" $$what $(MINUTES) || exit; done
	@for what in "restart $(or $(PODS),20)" "many $(or $(SANDBOXES),100)"; do tests/node/run --memory 8192 --timeout 3600 -- \
		tests/session "$$(realpath "$(TARGET)/release/soak")" $$what || exit; done

## make upgrade FROM=x  PODS pods (20) that revision x of this repository has started, taken over by the daemon of this tree
upgrade: all fixtures
	@tests/upgrade $(or $(FROM),HEAD^) $(or $(PODS),20)

## make fuzz SECONDS=x  every parser of hostile bytes under a fuzzer, for so long each (30); what is found is in fuzz/artifacts
fuzz:
	@fuzz/run $(or $(SECONDS),30) $(TEST)

## make lint        formatting and clippy
lint:
	@tests/setup/packages gcc g++ libc6-dev
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --locked --workspace --all-targets --all-features -- -D warnings

## make clean       removes out/ and cargo's target; the cache stays
clean:
	rm -rf out
	$(CARGO) clean
