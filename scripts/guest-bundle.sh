#!/usr/bin/env bash
# Make target/guest-bundle/<version>/{kernel,initramfs,manifest.json}: one with Debian's kernel, named in
# target/guest-bundle/current-stock, and where `make kernel` has built our own, one with that, named in
# current-own. `current` names the one of them that KERNEL says (chosen_kernel in lib.sh).
#
# The stock kernel is Debian's cloud kernel, fetched once as a package and unpacked to an ELF that
# QEMU and Firecracker start directly (PVH); the modules that it needs are in the initramfs. Our own has
# everything built in, and its initramfs holds nothing but /init. Overrides:
#   KERNEL                stock or own; without it our own where it is built
#   MATCHLOCK_GUEST_BIN   the static program to put in as /init
#   MATCHLOCK_KERNEL_DEB  a linux-image-*-cloud-amd64 package to use instead of fetching one
#   MATCHLOCK_KERNEL_REFRESH=1  look for a newer kernel package
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Modes of the files made here must not depend on the caller.
umask 022

# Modules the guest needs; what they depend on is found out from the package itself.
modules=(virtio_mmio virtio_blk virtio_console virtio_net erofs overlay)

kernels=$target/guest-kernel
bundles=$target/guest-bundle
work=

# shellcheck disable=SC2317 # called by the trap
clean_up() {
	if [ -n "$work" ]; then
		rm -rf -- "$work"
	fi
}
trap clean_up EXIT

# ---- the kernel package -------------------------------------------------------------------

kernel_package() {
	apt-cache depends --important linux-image-cloud-amd64 2>/dev/null |
		sed -n 's/^ *Depends: \(linux-image-[0-9].*-cloud-amd64\)$/\1/p' | head -n 1
}

# Download the current kernel package into $kernels and name it in $kernels/package.
fetch_package() {
	is_debian || die "the guest kernel comes from Debian's package linux-image-cloud-amd64 and this is not Debian: download that package's linux-image-*-cloud-amd64_*.deb and set MATCHLOCK_KERNEL_DEB to its path"
	local name file attempt
	for attempt in 1 2; do
		name=$(kernel_package || true)
		if [ -n "$name" ]; then
			say "guest: downloading $name"
			rm -rf -- "$kernels/download"
			mkdir -p "$kernels/download"
			if (cd "$kernels/download" && apt_get download "$name"); then
				file=$(find "$kernels/download" -name '*.deb')
				mv -f -- "$file" "$kernels/"
				rmdir "$kernels/download"
				put "$kernels/package" <<<"${file##*/}"
				return
			fi
		fi
		# No package lists, or lists that name a package which is gone: only root can renew them.
		if [ "$attempt" = 1 ]; then
			is_root || break
			say "guest: renewing the package lists"
			apt_get update || die "apt-get update failed: the package lists for linux-image-cloud-amd64 cannot be fetched"
		fi
	done
	if [ -z "$name" ]; then
		die "the package lists do not have linux-image-cloud-amd64: run apt-get update as root, or set MATCHLOCK_KERNEL_DEB to a linux-image-*-cloud-amd64_*.deb"
	fi
	die "cannot download $name: run apt-get update as root, or set MATCHLOCK_KERNEL_DEB to a linux-image-*-cloud-amd64_*.deb"
}

# ---- the kernel ---------------------------------------------------------------------------

# number FILE OFFSET SIZE: a little-endian number.
number() { od -An -v -t "u$3" -j "$2" -N "$3" -- "$1" | tr -d ' '; }

# cut_out FILE OFFSET LENGTH
cut_out() {
	dd if="$1" iflag=skip_bytes,count_bytes skip="$2" count="$3" bs=1M status=none
}

# unpack_kernel BZIMAGE VMLINUX: take the compressed kernel out of its boot wrapper. Where it
# is, is told by the setup header of the x86 boot protocol, version 2.08 and later.
unpack_kernel() {
	local image=$1 out=$2 sectors offset length magic wanted size expand
	[ "$(cut_out "$image" $((0x202)) 4)" = HdrS ] || die "$image is not a bzImage"
	[ "$(number "$image" $((0x206)) 2)" -ge $((0x208)) ] || die "$image: boot protocol too old"
	sectors=$(number "$image" $((0x1f1)) 1)
	[ "$sectors" != 0 ] || sectors=4
	offset=$(((sectors + 1) * 512 + $(number "$image" $((0x248)) 4)))
	length=$(number "$image" $((0x24c)) 4)
	# The payload ends in the size of what is in it. gzip has that number itself as the end of
	# its format; the kernel build appends it to the others, which do not expect it there.
	wanted=$(number "$image" $((offset + length - 4)) 4)
	magic=$(cut_out "$image" "$offset" 6 | od -An -v -t x1 | tr -d ' \n')
	case $magic in
	1f8b*) expand=gzip length=$((length + 4)) ;;
	fd377a585a00) expand=xz ;;
	28b52ffd*) expand=zstd ;;
	02214c18*) expand=lz4 ;;
	425a68*) expand=bzip2 ;;
	*) die "$image: unknown kernel compression (magic $magic)" ;;
	esac
	need "$expand" "${expand/%xz/xz-utils}"
	cut_out "$image" "$offset" $((length - 4)) | "$expand" -dc >"$out" ||
		die "$image: $expand cannot unpack the kernel"
	size=$(stat -c %s -- "$out")
	[ "$size" = "$wanted" ] || die "$image: unpacked $size bytes, expected $wanted"
	[ "$(cut_out "$out" 1 3)" = ELF ] || die "$image: what is inside is not an ELF file"
	need readelf binutils
	local notes
	notes=$(readelf -nW -- "$out" 2>/dev/null)
	[[ $notes =~ Xen[[:space:]][^$'\n']*0x0*12\) ]] || die "$image: the kernel has no PVH entry point"
}

# list_modules ROOT RELEASE: the files to load, one a line, in order; built-ins left out.
list_modules() {
	local module
	: >"$work/modprobe.conf"
	depmod -b "$1" "$2" || return 1
	# Soft dependencies are only accelerators here, and may refuse to load on a lesser CPU.
	rm -f -- "$1/lib/modules/$2/modules.softdep"
	for module in "${modules[@]}"; do
		modprobe -d "$1" -S "$2" -C "$work/modprobe.conf" --show-depends "$module" || return 1
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

# prepare_kernel DEB DIRECTORY: make DIRECTORY/{vmlinux,modules/,release,package}.
prepare_kernel() {
	local deb=$1 directory=$2 tree image release file name number=0
	need dpkg-deb dpkg
	need depmod kmod
	need modprobe kmod
	work=$(mktemp -d "$kernels/.work.XXXXXX")
	tree=$work/tree
	say "guest: unpacking ${deb##*/}"
	dpkg-deb -x "$deb" "$tree"
	[ -e "$tree/lib" ] || ln -s usr/lib "$tree/lib"
	image=$(find "$tree/boot" -name 'vmlinuz-*')
	[ -f "$image" ] || die "$deb holds no kernel"
	release=${image##*/vmlinuz-}

	mkdir -p "$work/new/modules"
	unpack_kernel "$image" "$work/new/vmlinux"
	list_modules "$tree" "$release" >"$work/list" || die "$deb: cannot work out the modules ${modules[*]}"
	: >"$work/new/modules/order"
	while read -r file; do
		name=${file##*/}
		name=$(printf '%02d-%s.ko' "$number" "${name%%.ko*}")
		case $file in
		*.ko) cat -- "$file" ;;
		*.ko.xz) xz -dc -- "$file" ;;
		*.ko.zst) zstd -qdc -- "$file" ;;
		*.ko.gz) gzip -dc -- "$file" ;;
		*) die "$file: unknown module compression" ;;
		esac >"$work/new/modules/$name"
		printf '%s\n' "$name" >>"$work/new/modules/order"
		number=$((number + 1))
	done <"$work/list"
	printf '%s\n' "$release" >"$work/new/release"
	printf '%s=%s\n' "$(dpkg-deb -f "$deb" Package)" "$(dpkg-deb -f "$deb" Version)" >"$work/new/package"
	printf '%s\n' "$script_sha256" >"$work/new/stamp"

	rm -rf -- "$directory"
	mv -T -- "$work/new" "$directory"
	rm -rf -- "$work"
	work=
}

# ---- the bundle ---------------------------------------------------------------------------

workspace_version() {
	[ -f "$root/Cargo.toml" ] || die "no Cargo.toml in $root"
	awk -F '"' '
		/^\[/ { inside = ($0 ~ /^\[(workspace\.)?package\]/) }
		inside && /^version *= *"/ { print $2; exit }
	' "$root/Cargo.toml"
}

# pack_initramfs KERNEL-DIRECTORY INIT OUT
pack_initramfs() {
	need cpio cpio
	local tree=$work/initramfs
	mkdir -p "$tree"/{dev,proc,sys,run,mnt,newroot}
	install -m 0755 -- "$2" "$tree/init"
	if [ -d "$1/modules" ]; then
		mkdir "$tree/modules"
		install -m 0644 -- "$1"/modules/* "$tree/modules/"
	fi
	find "$tree" -exec touch -h -d @0 {} +
	(
		cd "$tree"
		find . -mindepth 1 -printf '%P\n' | sort |
			cpio -o -H newc -R 0:0 --reproducible --quiet
	) >"$3"
}

# pack_bundle KIND KERNEL-DIRECTORY: make the bundle and name it in current-KIND, unless that is done.
pack_bundle() {
	local kind=$1 kernel=$2 stamp release version initramfs_sha256 kernel_sha256 hash
	stamp="$(workspace_version) $script_sha256 $(<"$kernel/package") $(<"$kernel/stamp") $(sha256 "$init")"
	if holds "$bundles/stamp-$kind" "$stamp" && [ -f "$bundles/$(<"$bundles/current-$kind")/manifest.json" ]; then
		say "guest: $(<"$bundles/current-$kind") is up to date"
		return
	fi

	work=$(mktemp -d "$bundles/.work.XXXXXX")
	mkdir "$work/new"
	pack_initramfs "$kernel" "$init" "$work/new/initramfs"
	ln -- "$kernel/vmlinux" "$work/new/kernel" 2>/dev/null || cp -- "$kernel/vmlinux" "$work/new/kernel"

	release=$(<"$kernel/release")
	initramfs_sha256=$(sha256 "$work/new/initramfs")
	kernel_sha256=$(sha256 "$work/new/kernel")
	# Two kernels of one release differ when their configuration does.
	hash=$(sha256sum <<<"$kernel_sha256 $initramfs_sha256")
	# The release of our own says whose it is.
	version=$(workspace_version)-
	[ "$kind" = own ] || version+=debian-
	version+=$release-${hash:0:8}
	say "guest: packing $version"
	cat >"$work/new/manifest.json" <<JSON
{
  "format": 1,
  "version": "$version",
  "kernel_release": "$release",
  "kernel_package": "$(<"$kernel/package")",
  "kernel_sha256": "$kernel_sha256",
  "initramfs_sha256": "$initramfs_sha256"
}
JSON

	rm -rf -- "${bundles:?}/$version"
	mv -T -- "$work/new" "$bundles/$version"
	put "$bundles/current-$kind" <<<"$version"
	put "$bundles/stamp-$kind" <<<"$stamp"
	rm -rf -- "$work"
	work=
}

mkdir -p "$kernels" "$bundles"

if [ -n "${MATCHLOCK_KERNEL_DEB:-}" ]; then
	deb=$(realpath -- "$MATCHLOCK_KERNEL_DEB")
	[ -f "$deb" ] || die "MATCHLOCK_KERNEL_DEB: no such file: $deb"
else
	if [ -n "${MATCHLOCK_KERNEL_REFRESH:-}" ] || ! [ -f "$kernels/package" ] || ! [ -f "$kernels/$(<"$kernels/package")" ]; then
		fetch_package
	fi
	deb=$kernels/$(<"$kernels/package")
fi

# How the kernel directory is made: this script and the list of modules in it.
script_sha256=$(sha256 "$root/scripts/guest-bundle.sh")
stock=$kernels/$(basename -- "$deb" .deb)
holds "$stock/stamp" "$script_sha256" || prepare_kernel "$deb" "$stock"

init=${MATCHLOCK_GUEST_BIN:-$("$root/scripts/build.sh" guest-path)}
[ -f "$init" ] || die "no guest program at $init: run make guest"
is_static "$init" || die "$init is not a static program"

[ -n "$(workspace_version)" ] || die "Cargo.toml has no workspace version"
pack_bundle stock "$stock"
if [ -f "$kernels/own/stamp" ]; then
	pack_bundle own "$kernels/own"
else
	rm -f -- "$bundles/current-own" "$bundles/stamp-own"
fi
kind=$(chosen_kernel)
put "$bundles/current" <"$bundles/current-$kind"
