#!/usr/bin/env bash
# Build with cargo: `build.sh host`, `build.sh guest`; `build.sh lint` checks the source;
# `build.sh guest-path` prints where the guest binary is built.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

need_cargo
cd "$root"

case ${1:-} in
host)
	say "building target/release/matchlock"
	name_commit
	cargo build --release --locked
	;;
guest)
	triple=$(guest_triple)
	say "building the guest for $triple"
	if [ "$triple" = "$gnu_triple" ]; then
		export RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static"
	fi
	cargo build -p matchlock-guest --profile guest --locked --target "$triple"
	;;
guest-path)
	echo "$target/$(guest_triple)/guest/matchlock-guest"
	;;
lint)
	say "checking the format"
	cargo fmt --all --check
	say "running clippy"
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo clippy --workspace --locked --features matchlock/failpoints -- -D warnings
	;;
*)
	die "usage: scripts/build.sh host|guest|guest-path|lint"
	;;
esac
