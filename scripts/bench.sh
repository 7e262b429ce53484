#!/usr/bin/env bash
# bench.sh BUSYBOX.tar: measure, and write docs/PERFORMANCE.md. Quiet machine, please.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# = 1 ] || die "usage: scripts/bench.sh BUSYBOX.tar"
export MATCHLOCK_TEST_BIN=$target/release/matchlock
export MATCHLOCK_TEST_BUSYBOX=$1
export MATCHLOCK_TEST_CACHE=$target/test-cache
# Results must be comparable, whatever else is built.
export KERNEL=${KERNEL:-stock}
"$root/scripts/install-bundle.sh" "$MATCHLOCK_TEST_CACHE"
"$root/scripts/debian-image.sh" "$(dirname -- "$1")/debian.tar"

cd "$root"
# The program that `make build` has made is the one to measure.
name_commit
say "measuring"
cargo bench --locked --bench store -- --quiet
# They leave their sections to the scenarios. An old one must not pass for this run's.
rm -f -- "$target/bench/boot.md" "$target/bench/network.md" "$target/bench/fleet.md" "$target/bench/session.md" "$target/bench/images.md"
cargo bench --locked --bench boot
cargo bench --locked --bench network
cargo bench --locked --workspace --bench fleet
cargo bench --locked --bench session
cargo bench --locked --bench images
cargo bench --locked --bench scenarios
