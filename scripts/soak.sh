#!/usr/bin/env bash
# soak.sh BUSYBOX.tar PART: crash tests that are too long for `make test`, and what comes of them.
#   matrix    every failpoint × every fault
#   random    kills at random instants
#   all       these and fleet, in pieces of MINUTES each
#   fleet     20 (VMS) machines at once with every command, owners and hypervisors killed, for MINUTES
#   session   30 VMs in one session, of which some crash all the time, for MINUTES
#   sim       SEEDS (0..5000) of the simulated actor tree
#   mutants   each way to break the program on purpose is seen
#   table     write what the soak has found of this commit into docs/SPECIFICATION.md
# A part goes on where it stopped: results are in target/soak/COMMIT.jsonl. MINUTES (8) limits a
# piece, KILLS (300) is how many random kills there are; MATCHLOCK_CRASH_SEED draws other acts.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# = 2 ] || die "usage: scripts/soak.sh BUSYBOX.tar matrix|random|all|fleet|session|sim|mutants|table"
export MATCHLOCK_TEST_BIN=$target/debug/matchlock
export MATCHLOCK_TEST_FAILPOINTS_BIN=$target/debug/matchlock-failpoints
export MATCHLOCK_TEST_BUSYBOX=$1
export MATCHLOCK_TEST_CACHE=$target/test-cache
export MATCHLOCK_SOAK_DIR=$target/soak
export MATCHLOCK_SOAK_MINUTES=${MINUTES:-8}
export MATCHLOCK_SOAK_KILLS=${KILLS:-300}
export MATCHLOCK_SOAK_VMS=${VMS:-20}
# The commit of the program; a change of the tests or the documents does not make its results old.
program=(actors failpoints guest host migrations model src store wire ':(exclude,glob)*/tests/**')
MATCHLOCK_SOAK_COMMIT=$(git -C "$root" log -1 --format=%h --abbrev=12 -- Cargo.lock "${program[@]}")
if ! git -C "$root" diff --quiet HEAD -- Cargo.lock "${program[@]}"; then
	MATCHLOCK_SOAK_COMMIT+=-dirty
fi
export MATCHLOCK_SOAK_COMMIT
mkdir -p "$MATCHLOCK_SOAK_DIR"
cd "$root"
if [ "$2" = sim ]; then
	export MATCHLOCK_SIM_SEEDS=${SEEDS:-0..5000}
	exec cargo test --locked --workspace --test sim seeds -- --nocapture </dev/null
fi
# Results must be comparable, whatever else is built.
export KERNEL=${KERNEL:-stock}
"$root/scripts/install-bundle.sh" "$MATCHLOCK_TEST_CACHE"
if [ "$2" = session ]; then
	cargo test --locked --workspace --no-run --test rpc
	exec cargo test --locked --workspace --test rpc -- --ignored --exact --nocapture \
		soak::healthy_vms_notice_nothing_of_those_that_crash </dev/null
fi

say "building"
# In this order: see scripts/test.sh.
cargo build --workspace --locked --features matchlock/failpoints --bin matchlock-failpoints --test crash
cargo test --locked --workspace --no-run --test crash

# crash TEST: run one of the suite's ignored tests.
crash() {
	cargo test --locked --workspace --test crash -- --ignored --exact --nocapture "$1" </dev/null
}

case $2 in
matrix) crash soak::the_whole_matrix ;;
random) crash soak::kills_at_random_instants ;;
all)
	crash soak::the_whole_matrix
	crash soak::kills_at_random_instants
	crash fleet::twenty_vms_at_once
	;;
fleet) crash fleet::twenty_vms_at_once ;;
mutants) crash mutants::every_mutation_is_seen ;;
table) crash table::the_table_is_written ;;
*) die "no such part: $2" ;;
esac
