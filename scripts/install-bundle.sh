#!/usr/bin/env bash
# install-bundle.sh CACHE: put the guest bundles that are built into CACHE/guest/<version>/ and point
# CACHE/guest/default at the one that KERNEL says (chosen_kernel in lib.sh). What is half written is never
# seen under its name. The lock is that of `matchlock guest use` and `rm` (host/src/guest_bundle).
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# = 1 ] || die "usage: scripts/install-bundle.sh CACHE-DIRECTORY"
bundles=$target/guest-bundle
[ -f "$bundles/current-stock" ] || die "no guest bundle: run make guest"
kind=$(chosen_kernel)

[ -d "$1" ] || (umask 077 && mkdir -p -- "$1")
guest=$1/guest
mkdir -p -- "$guest"
need flock util-linux
exec 8<"$guest"
flock -w 300 8 || die "another matchlock or make works on the guest bundles in $guest: try again"

work=$(mktemp -d "$guest/.new.XXXXXX")
trap 'rm -rf -- "$work"' EXIT

# install_bundle VERSION
install_bundle() {
	local version=$1 bundle=$bundles/$1
	[ -f "$bundle/manifest.json" ] || die "no guest bundle in $bundle: run make guest"
	[ ! -d "$guest/$version" ] || return 0
	say "guest: installing $version into $guest"
	mkdir "$work/bundle"
	cp -- "$bundle/initramfs" "$bundle/manifest.json" "$work/bundle/"
	# No link to one that is there already: a file's links change the time by which snapshots know it.
	cp --reflink=auto -- "$bundle/kernel" "$work/bundle/kernel"
	mv -T -- "$work/bundle" "$guest/$version"
}

for packed in stock own; do
	if [ -f "$bundles/current-$packed" ]; then
		install_bundle "$(<"$bundles/current-$packed")"
	fi
done

version=$(<"$bundles/current-$kind")
if [ "$(readlink -- "$guest/default" || true)" != "$version" ]; then
	ln -s -- "$version" "$work/default"
	mv -T -- "$work/default" "$guest/default"
fi
