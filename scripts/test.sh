#!/usr/bin/env bash
# test.sh MATCHLOCK BUSYBOX.tar: run every test, those with real microVMs as well.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# = 2 ] || die "usage: scripts/test.sh MATCHLOCK BUSYBOX.tar"
export MATCHLOCK_TEST_BIN=$1
export MATCHLOCK_TEST_BUSYBOX=$2
export MATCHLOCK_TEST_CACHE=$target/test-cache
"$root/scripts/install-bundle.sh" "$MATCHLOCK_TEST_CACHE"

say "running the tests"
cd "$root"
exec cargo test --workspace --locked </dev/null
