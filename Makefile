# Everything installs what it needs on a bare Debian 12 machine with Rust (lab/setup).

CARGO ?= cargo
TARGET = $(or $(CARGO_TARGET_DIR),target)
export LANLET_BIN ?= $(abspath $(TARGET)/release/lanlet)

.PHONY: all demo test built check e2e image release bench compare guard-record clean

all: release

# Two real QEMU guests on one rootless network, as an unprivileged user.
demo:
	lab/setup demo
	lab/guest-image/build
	$(CARGO) build --release --locked --bin lanlet
	stage=$$(lab/stage) && "$$stage/lab/as-user" "$$stage/lanlet" demo --lab "$$stage/lab"

# What CI runs. Library, benches, clippy and the fuzz targets share the dev profile's dependencies;
# only the binary under test is built for release, beside them as its last steps use one core. The benches
# run each case once, to keep them alive.
test:
	lab/setup test
	lab/guest-image/build
	lab/dpdk/build
	$(MAKE) --no-print-directory -j2 release built
	$(CARGO) test --locked --benches -- --test
	$(MAKE) --no-print-directory e2e

built: check
	$(CARGO) test --locked --no-run --lib --bins --tests --benches

# What needs no lab.
check:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	if [ -e fuzz/Cargo.toml ]; then \
		$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml && \
		$(CARGO) check --manifest-path fuzz/Cargo.toml --target-dir $(TARGET); \
	fi

# Unit, property and layering tests, then those in namespaces and with QEMU guests: the binary under
# test runs as an unprivileged user (lab/as-user), from a copy that this user can reach (lab/stage).
# Three at a time: the scenarios wait more than they work.
e2e:
	RUST_TEST_THREADS=3 $(CARGO) test --locked --lib --bins --tests --no-fail-fast
	$(CARGO) test --locked --doc

image:
	lab/setup demo
	lab/guest-image/build

release:
	$(CARGO) build --release --locked --bin lanlet

bench:
	lab/setup demo
	$(CARGO) bench --locked

# lanlet, the kernel's bridge and NAT, pasta, slirp4netns and QEMU's user network, interleaved, as a table;
# and guests on vhost-user ports beside the same guests on a kernel bridge.
compare:
	lab/setup test
	lab/guest-image/build
	lab/dpdk/build
	$(CARGO) build --release --locked --bin lanlet
	lab/compare
	lab/compare-vhost-user

# What pieces of the hot path take, in times of plain loops: tests/guard.rs compares to it. For changes
# that are meant to cost something; on a machine that has nothing else to do.
guard-record: release
	$(TARGET)/release/lanlet bench-peer guard --record benches/guard.ratios

clean:
	$(CARGO) clean
	rm -rf lab/out
