# shellcheck shell=bash
# Shared by the scripts beside this file; sourced, never run.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=$root/target
# cargo may be installed without being in PATH; depmod lives in /usr/sbin.
PATH=$PATH:${HOME:-/root}/.cargo/bin:/usr/sbin:/sbin
export PATH CARGO_TARGET_DIR=$target
# Sorting and messages must not depend on the caller's language.
export LC_ALL=C
export DEBIAN_FRONTEND=noninteractive

musl_triple=x86_64-unknown-linux-musl
gnu_triple=x86_64-unknown-linux-gnu

say() { printf '==> %s\n' "$*"; }

die() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# need COMMAND PACKAGE: COMMAND must exist; PACKAGE is Debian's package that holds it.
need() {
	have "$1" || die "missing $1: $(how_to_get "$2")"
}

is_debian() {
	have dpkg-query && have apt-get && [ -e /etc/debian_version ]
}

is_root() { [ "$(id -u)" = 0 ]; }

# how_to_get PACKAGE...: what to type (or look for) to get these Debian packages.
how_to_get() {
	if ! is_debian; then
		echo "install the equivalent of: $*"
	elif is_root; then
		echo "run: apt-get install --no-install-recommends $*"
	else
		echo "run: sudo apt-get install --no-install-recommends $*"
	fi
}

# apt_get COMMAND...: apt-get without questions; waits for another apt to finish.
apt_get() {
	local options=(-y -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -o Dpkg::Options::=--force-confold)
	if is_root; then
		options+=(-o APT::Sandbox::User=root)
	fi
	apt-get "${options[@]}" "$@" </dev/null
}

# What is built, for `matchlock version`; the commit's own time keeps the build reproducible. Cargo
# builds anew where it differs: who needs target/release/matchlock as it is says the same.
name_commit() {
	git -C "$root" rev-parse --verify -q HEAD >/dev/null 2>&1 || return 0
	MATCHLOCK_COMMIT=$(git -C "$root" rev-parse --short=12 HEAD)
	MATCHLOCK_BUILT=$(git -C "$root" log -1 --format=%cI)
	export MATCHLOCK_COMMIT MATCHLOCK_BUILT
}

need_cargo() {
	have cargo || die "missing cargo (the Rust toolchain): install it from https://rustup.rs, then run make again"
}

# The triple the guest is built for: static musl, or static glibc where musl cannot be had.
guest_triple() {
	if [ -d "$(cd "$root" && rustc --print sysroot)/lib/rustlib/$musl_triple/lib" ]; then
		echo "$musl_triple"
	else
		echo "$gnu_triple"
	fi
}

sha256() { sha256sum -- "$1" | cut -d' ' -f1; }

# is_static FILE: an ELF program that asks for no dynamic loader.
is_static() {
	need readelf binutils
	readelf -hW -- "$1" >/dev/null 2>&1 || return 1
	local segments
	segments=$(readelf -lW -- "$1")
	[[ $segments != *INTERP* ]]
}

# put FILE: write standard input to FILE in one step.
put() {
	local temporary=$1.tmp.$$
	cat >"$temporary"
	mv -f -- "$temporary" "$1"
}

# holds FILE TEXT: FILE exists and says exactly TEXT.
holds() { [ -f "$1" ] && [ "$(cat -- "$1")" = "$2" ]; }

# The kind of the guest bundle to boot by default: what KERNEL says, or our own where it is packed.
chosen_kernel() {
	local packed=$target/guest-bundle/current
	case ${KERNEL:-} in
	'') if [ -f "$packed-own" ]; then echo own; else echo stock; fi ;;
	stock) echo stock ;;
	own)
		[ -f "$packed-own" ] || die "KERNEL=own, and there is no kernel of our own: run make kernel"
		echo own
		;;
	*) die "KERNEL=$KERNEL: use stock or own" ;;
	esac
}
