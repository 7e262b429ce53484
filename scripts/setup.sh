#!/usr/bin/env bash
# Install what the build, the guest bundle and the tests need, if it is missing.
#   setup.sh           install what is missing
#   setup.sh --dev     the same, with rustfmt and clippy
#   setup.sh --check   only report; exit 1 when something is missing
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

check=false
dev=false
for argument in "$@"; do
	case $argument in
	--check) check=true dev=true ;;
	--dev) dev=true ;;
	*) die "usage: scripts/setup.sh [--check | --dev]" ;;
	esac
done

# Debian package, and how to see that what it holds is there some other way.
requirements=(
	"qemu-system-x86   command qemu-system-x86_64"
	"erofs-utils       command mkfs.erofs"
	"e2fsprogs         command mkfs.ext4"
	"libclang1-14      libclang"
	"busybox-static    busybox"
	"kmod              command depmod modprobe"
	"cpio              command cpio"
	"xz-utils          command xz"
	"zstd              command zstd"
	"lz4               command lz4"
	"sqlite3           command sqlite3"
	"gcc               command cc"
	"libc6-dev         file /usr/include/linux/netfilter/nf_tables.h"
	"binutils          command readelf"
	"make              command make"
	"pkg-config        command pkg-config"
	"nftables          command nft"
	"iproute2          command ip"
	"python3           command python3"
	"python3-venv      python_venv"
	"docker-registry   command docker-registry"
	"skopeo            command skopeo"
	"umoci             command umoci"
	"openssl           command openssl"
	"libarchive-tools  command bsdtar"
	"debootstrap       command debootstrap"
	"ca-certificates   file /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt"
)

# there KIND WORD...: is it there, whoever installed it?
there() {
	local kind=$1 word
	shift
	case $kind in
	command)
		for word; do have "$word" || return 1; done
		;;
	file)
		for word; do [ -e "$word" ] && return 0; done
		return 1
		;;
	python_venv)
		python3 -c 'import ensurepip, venv' 2>/dev/null
		;;
	libclang)
		# Not libclang-cpp, which has another interface.
		local directory
		for directory in "${LIBCLANG_PATH:-/nowhere}" "/usr/lib/llvm*/lib" "/usr/lib*" "/usr/lib/x86_64-linux-gnu"; do
			compgen -G "$directory/libclang.so*" >/dev/null && return 0
			compgen -G "$directory/libclang-[0-9]*.so*" >/dev/null && return 0
		done
		return 1
		;;
	busybox)
		have busybox && have readelf && is_static "$(command -v busybox)"
		;;
	esac
}

# Fill `missing` with the packages to install. On Debian the package database answers first.
find_missing() {
	local line package probe installed=" "
	if is_debian; then
		installed=" $(dpkg-query -W -f '${db:Status-Status}/${Package} ' 2>/dev/null) "
	fi
	missing=()
	for line in "${requirements[@]}"; do
		read -r package probe <<<"$line"
		if [[ $installed == *" installed/$package "* ]]; then
			continue
		fi
		# shellcheck disable=SC2086 # the probe is a list of words
		there $probe || missing+=("$package")
	done
}

install_missing() {
	say "setup: installing ${missing[*]}"
	apt_get update || die "apt-get update failed: the Debian package lists cannot be fetched; check the network and /etc/apt/sources.list"
	# Newer Debian releases have another libclang; any will do.
	if ! apt-cache show libclang1-14 >/dev/null 2>&1; then
		missing=("${missing[@]/%libclang1-14/libclang1}")
	fi
	apt_get install --no-install-recommends "${missing[@]}" >/dev/null ||
		die "apt-get could not install: ${missing[*]}"
	find_missing
	[ ${#missing[@]} = 0 ] || die "still missing after apt-get install: ${missing[*]}"
}

[ "$(uname -sm)" = "Linux x86_64" ] || die "this is $(uname -sm): Matchlock is built and run on Linux x86_64 only"
cd "$root"

find_missing

if $check; then
	problems=0
	report() {
		printf 'missing: %s\n' "$*"
		problems=$((problems + 1))
	}
	[ ${#missing[@]} = 0 ] || report "${missing[*]} ($(how_to_get "${missing[@]}"))"
	if ! have cargo; then
		report "cargo, the Rust toolchain (install it from https://rustup.rs)"
	else
		for component in fmt clippy; do
			cargo "$component" --version >/dev/null 2>&1 ||
				report "cargo $component (run: rustup component add ${component/fmt/rustfmt})"
		done
		[ "$(guest_triple)" = "$musl_triple" ] ||
			echo "note: no Rust target $musl_triple (rustup target add $musl_triple); the guest will be built for $gnu_triple"
	fi
	[ "$problems" = 0 ] || exit 1
	say "setup: nothing is missing"
	exit 0
fi

need_cargo

if [ ${#missing[@]} != 0 ]; then
	if is_debian && is_root; then
		install_missing
	else
		die "missing: ${missing[*]}; $(how_to_get "${missing[@]}")"
	fi
fi

if $dev; then
	for component in fmt clippy; do
		cargo "$component" --version >/dev/null 2>&1 && continue
		name=${component/fmt/rustfmt}
		have rustup || die "missing cargo $component: install your distribution's $name (Debian: rustfmt rust-clippy) or use rustup"
		say "setup: adding the Rust component $name"
		rustup component add "$name" </dev/null || die "missing $name: rustup component add $name failed"
	done
fi

# The musl target; where it cannot be had, remember that for this toolchain and go on with glibc.
if [ "$(guest_triple)" != "$musl_triple" ]; then
	refused=$target/.no-musl
	toolchain=$(rustc -V)
	if ! holds "$refused" "$toolchain"; then
		say "setup: adding the Rust target $musl_triple"
		if ! have rustup || ! rustup target add "$musl_triple" </dev/null; then
			say "setup: $musl_triple cannot be had here; the guest will be built static for $gnu_triple"
			mkdir -p "$target"
			put "$refused" <<<"$toolchain"
		fi
	fi
fi

say "setup: everything needed is installed"
