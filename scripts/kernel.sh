#!/usr/bin/env bash
# Make target/guest-kernel/own/{vmlinux,config,release,package,stamp}: our own guest kernel, of
# Debian's package linux-source-6.1 and the configuration guest/kernel/x86_64.config. `make guest`
# then packs a guest bundle with it, and without modules.
#
# Nothing is built when the source package, the configuration, this script and the compiler are the
# ones of the last time. The source tree stays, so that a small change is a small build. What is half
# built is never seen under own/; an interrupted build goes on where it stopped.
#
# The same package, configuration and compiler make the same bytes, wherever and whenever that is:
# time, user, host and build number are given, there is no debug information, and the build is inside
# its tree, so that no path gets in. `kernel.sh --rebuild` builds once more, in a tree of another name,
# and compares.
#
# Overrides:
#   MATCHLOCK_KERNEL_SOURCE_DEB  a linux-source-6.1 package to use instead of fetching one
#   MATCHLOCK_KERNEL_REFRESH=1   look for a newer source package
#   JOBS                         how many compilers run at once (default: one for each CPU)
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

umask 022

source_package=linux-source-6.1
kernels=$target/guest-kernel
own=$kernels/own
build=$kernels/own-build
configuration=$root/guest/kernel/x86_64.config

# What only this build needs; `make setup` does not install it. gcc, make, xz and binutils it does.
packages=(flex bison libelf-dev bc)

install_requirements() {
	local missing=()
	have flex || missing+=(flex)
	have bison || missing+=(bison)
	have bc || missing+=(bc)
	[ -e /usr/include/libelf.h ] || [ -e /usr/include/libelf/libelf.h ] || missing+=(libelf-dev)
	[ ${#missing[@]} != 0 ] || return 0
	is_debian && is_root || die "missing: ${missing[*]}; $(how_to_get "${packages[@]}")"
	say "kernel: installing ${missing[*]}"
	apt_get update || die "apt-get update failed: the Debian package lists cannot be fetched; check the network and /etc/apt/sources.list"
	apt_get install --no-install-recommends "${missing[@]}" >/dev/null ||
		die "apt-get could not install: ${missing[*]}"
}

# Download the source package into $kernels and name it in $kernels/source-package. apt checks it
# against the signed lists.
fetch_source() {
	is_debian || die "the kernel's source comes from Debian's package $source_package and this is not Debian: download ${source_package}_*_all.deb and set MATCHLOCK_KERNEL_SOURCE_DEB to its path"
	local file attempt
	for attempt in 1 2; do
		say "kernel: downloading $source_package (140 MB)"
		rm -rf -- "$kernels/source-download"
		mkdir -p "$kernels/source-download"
		if (cd "$kernels/source-download" && apt_get download "$source_package"); then
			file=$(find "$kernels/source-download" -name '*.deb')
			mv -f -- "$file" "$kernels/"
			rmdir "$kernels/source-download"
			put "$kernels/source-package" <<<"${file##*/}"
			return
		fi
		# No package lists, or lists that name a version which is gone: only root can renew them.
		if [ "$attempt" = 1 ]; then
			is_root || break
			say "kernel: renewing the package lists"
			apt_get update || die "apt-get update failed: the package lists for $source_package cannot be fetched"
		fi
	done
	die "cannot download $source_package: run apt-get update as root, or set MATCHLOCK_KERNEL_SOURCE_DEB to a ${source_package}_*_all.deb"
}

# unpack DEB TREE: the source of DEB as TREE; whole, or not there.
unpack() {
	local deb=$1 tree=$2 work
	need dpkg-deb dpkg
	need xz xz-utils
	say "kernel: unpacking ${deb##*/}"
	work=$(mktemp -d "$build/.work.XXXXXX")
	dpkg-deb --fsys-tarfile "$deb" | tar -xO "./usr/src/$source_package.tar.xz" |
		tar -xJ -C "$work" || die "$deb: cannot unpack usr/src/$source_package.tar.xz"
	[ -f "$work/$source_package/Makefile" ] || die "$deb holds no kernel source"
	mv -T -- "$work/$source_package" "$tree"
	rmdir -- "$work"
}

# kernel_make TREE TARGET...: make without the caller's environment, which would tell in the result.
kernel_make() {
	local tree=$1 time
	shift
	# The source's own time, which the package brings.
	time=$(date -u -d "@$(stat -c %Y -- "$tree/Makefile")")
	nice -n 19 env -i PATH="$PATH" LC_ALL=C TZ=UTC \
		make -s -C "$tree" ARCH=x86_64 -j"${JOBS:-$(nproc)}" \
		KBUILD_BUILD_TIMESTAMP="$time" KBUILD_BUILD_USER=matchlock \
		KBUILD_BUILD_HOST=matchlock KBUILD_BUILD_VERSION=1 "$@" </dev/null
}

# check_configuration CONFIG: each line of ours must have been kept.
check_configuration() {
	local lost
	lost=$(awk '
		NR == FNR {
			if (/^CONFIG_/) { at = index($0, "="); value[substr($0, 1, at - 1)] = substr($0, at + 1) }
			next
		}
		/^CONFIG_/ {
			at = index($0, "="); name = substr($0, 1, at - 1); wanted = substr($0, at + 1)
			got = (name in value) ? value[name] : "n"
			if (got != wanted) print "  " $0 " (is " got ")"
		}
	' "$1" "$configuration")
	[ -z "$lost" ] || die "these lines of ${configuration#"$root"/} do not hold in the kernel's configuration: something they depend on is missing, or the kernel does not know them
$lost"
}

# compile TREE OUT: configure and build in TREE; OUT/{vmlinux,config,release}.
compile() {
	local tree=$1 out=$2
	need cc gcc
	need strip binutils
	# The given lines on top of "everything off". The file is the same in each tree, and a configuration
	# that comes out as it was before keeps its time: make then builds only what has changed.
	kernel_make "$tree" KCONFIG_ALLCONFIG="$configuration" allnoconfig >"$build/configure.log" 2>&1 || {
		cat -- "$build/configure.log" >&2
		die "the kernel cannot be configured (above)"
	}
	check_configuration "$tree/.config"
	kernel_make "$tree" vmlinux >"$build/build.log" 2>&1 || {
		tail -n 30 -- "$build/build.log" >&2
		die "the kernel could not be built: the end of $build/build.log is above"
	}
	mkdir -p "$out"
	strip --strip-all -o "$out/vmlinux" -- "$tree/vmlinux"
	cp -- "$tree/.config" "$out/config"
	kernel_make "$tree" kernelrelease >"$out/release"
	need readelf binutils
	local notes
	notes=$(readelf -nW -- "$out/vmlinux" 2>/dev/null)
	[[ $notes =~ Xen[[:space:]][^$'\n']*0x0*12\) ]] || die "$tree/vmlinux: the kernel has no PVH entry point"
}

# rebuild DEB: build again from the start, elsewhere, and compare.
rebuild() {
	local tree=$build/again/somewhere-else
	[ -f "$own/vmlinux" ] || die "there is no kernel to compare with: run make kernel"
	rm -rf -- "$build/again"
	mkdir -p "$build/again"
	unpack "$1" "$tree"
	compile "$tree" "$build/again/out"
	cmp -- "$own/vmlinux" "$build/again/out/vmlinux" || die "the second build differs from the first: $own/vmlinux, $build/again/out/vmlinux"
	say "kernel: a second build made the same vmlinux, sha256 $(sha256 "$own/vmlinux")"
	rm -rf -- "$build/again"
}

again=false
case ${1:-} in
'') ;;
--rebuild) again=true ;;
*) die "usage: scripts/kernel.sh [--rebuild]" ;;
esac
[ "$(uname -sm)" = "Linux x86_64" ] || die "this is $(uname -sm): the guest kernel is built on Linux x86_64 only"
[ -f "$configuration" ] || die "no kernel configuration at $configuration"

mkdir -p "$build"
# One build at a time in one tree.
need flock util-linux
exec 9>"$build/lock"
flock 9

if [ -n "${MATCHLOCK_KERNEL_SOURCE_DEB:-}" ]; then
	deb=$(realpath -- "$MATCHLOCK_KERNEL_SOURCE_DEB")
	[ -f "$deb" ] || die "MATCHLOCK_KERNEL_SOURCE_DEB: no such file: $deb"
else
	if [ -n "${MATCHLOCK_KERNEL_REFRESH:-}" ] || ! [ -f "$kernels/source-package" ] || ! [ -f "$kernels/$(<"$kernels/source-package")" ]; then
		fetch_source
	fi
	deb=$kernels/$(<"$kernels/source-package")
fi

need cc gcc
stamp="$(basename -- "$deb" .deb) $(sha256 "$root/scripts/kernel.sh") $(sha256 "$configuration") $(cc --version | head -n 1)"
if ! $again && holds "$own/stamp" "$stamp" && [ -f "$own/vmlinux" ]; then
	say "kernel: $(<"$own/release") is up to date"
	exit 0
fi
install_requirements
if $again; then
	rebuild "$deb"
	exit 0
fi

tree=$build/$(basename -- "$deb" .deb)
[ -d "$tree" ] || unpack "$deb" "$tree"
say "kernel: building (10 minutes on two free CPUs; what the compiler says is in ${build#"$root"/}/build.log)"
rm -rf -- "$build/out"
compile "$tree" "$build/out"
printf '%s=%s\n' "$(dpkg-deb -f "$deb" Package)" "$(dpkg-deb -f "$deb" Version)" >"$build/out/package"
printf '%s\n' "$stamp" >"$build/out/stamp"
rm -rf -- "$own"
mv -T -- "$build/out" "$own"
say "kernel: built $(<"$own/release")"
