#!/usr/bin/env bash
# test.sh BUSYBOX.tar: run every test, those with real microVMs as well. They run the program of
# the dev profile, which checks its own assertions.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# = 1 ] || die "usage: scripts/test.sh BUSYBOX.tar"
export MATCHLOCK_TEST_BIN=$target/debug/matchlock
export MATCHLOCK_TEST_FAILPOINTS_BIN=$target/debug/matchlock-failpoints
export MATCHLOCK_TEST_BUSYBOX=$1
export MATCHLOCK_TEST_CACHE=$target/test-cache
export MATCHLOCK_TEST_PYTHON=$target/python-sdk/bin/python
# With Debian's kernel, so that the result does not depend on what else is built; KERNEL=own make test is
# another one. The tests that are about our own kernel run when it is built, and else say that they were not.
export KERNEL=${KERNEL:-stock}
"$root/scripts/install-bundle.sh" "$MATCHLOCK_TEST_CACHE"
"$root/scripts/python-sdk.sh" "$target/python-sdk"
"$root/scripts/debian-image.sh" "$(dirname -- "$1")/debian.tar"

say "building the tests"
cd "$root"
# One selection of packages for everything: another one would unify features anew and build all
# dependencies twice. The program itself is built with its tests.
# First the program with failpoints. With a test, so that features are unified as they are below; as
# that builds target/debug/matchlock with failpoints too, the ordinary one comes after it.
cargo build --workspace --locked --features matchlock/failpoints --bin matchlock-failpoints --test crash
cargo test --workspace --locked --no-run

say "running the tests"
exec cargo test --workspace --locked </dev/null
