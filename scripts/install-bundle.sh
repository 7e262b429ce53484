#!/usr/bin/env bash
# install-bundle.sh CACHE: put the current guest bundle into CACHE/guest/<version>/ and point
# CACHE/guest/default at it. What is half written is never seen under its name.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# = 1 ] || die "usage: scripts/install-bundle.sh CACHE-DIRECTORY"
[ -f "$target/guest-bundle/current" ] || die "no guest bundle: run make guest"
version=$(<"$target/guest-bundle/current")
bundle=$target/guest-bundle/$version
[ -f "$bundle/manifest.json" ] || die "no guest bundle in $bundle: run make guest"

[ -d "$1" ] || (umask 077 && mkdir -p -- "$1")
guest=$1/guest
mkdir -p -- "$guest"

work=$(mktemp -d "$guest/.new.XXXXXX")
trap 'rm -rf -- "$work"' EXIT

if ! [ -d "$guest/$version" ]; then
	say "guest: installing $version into $guest"
	mkdir "$work/bundle"
	cp -- "$bundle/initramfs" "$bundle/manifest.json" "$work/bundle/"
	# A new guest program mostly comes with the kernel that is already there.
	if cmp -s -- "$bundle/kernel" "$guest/default/kernel"; then
		ln -- "$(realpath -- "$guest/default/kernel")" "$work/bundle/kernel"
	else
		cp -- "$bundle/kernel" "$work/bundle/kernel"
	fi
	# Someone else may have put the same bundle there in the meantime: as good as ours.
	mv -T -- "$work/bundle" "$guest/$version" 2>/dev/null ||
		[ -f "$guest/$version/manifest.json" ] || die "cannot install into $guest/$version"
fi

if [ "$(readlink -- "$guest/default" || true)" != "$version" ]; then
	ln -s -- "$version" "$work/default"
	mv -T -- "$work/default" "$guest/default"
fi
