#!/usr/bin/env bash
# debian-image.sh OUT.tar: the files of a small Debian with apt and python3, made by debootstrap from
# a Debian mirror (MATCHLOCK_DEBIAN_MIRROR, default http://deb.debian.org/debian). Needs root. What
# is there for this script and this suite is not made again.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

umask 022

[ $# = 1 ] || die "usage: scripts/debian-image.sh OUT.tar"
out=$1
suite=bookworm
mirror=${MATCHLOCK_DEBIAN_MIRROR:-http://deb.debian.org/debian}
need debootstrap debootstrap
need tar tar
need unshare util-linux
is_root || die "debootstrap sets owners and devices: run scripts/debian-image.sh as root"

stamp="$suite $(sha256 "$root/scripts/debian-image.sh")"
if [ -f "$out" ] && holds "$out.stamp" "$stamp"; then
	say "image: ${out##*/} is up to date"
	exit 0
fi
say "image: making ${out##*/} from $mirror"

mkdir -p -- "$(dirname -- "$out")"
work=$(mktemp -d "$out.work.XXXXXX")
trap 'rm -rf -- "$work"' EXIT
# What it mounts goes with its namespace, however it ends.
unshare --mount -- debootstrap --variant=minbase --include=python3-minimal "$suite" "$work/rootfs" "$mirror" \
	>"$work/log" 2>&1 || {
	tail -n 20 "$work/log" >&2
	die "debootstrap failed; its last lines are above"
}
find "$work"/rootfs/var/{cache/apt/archives,lib/apt/lists} -type f -delete
tar -C "$work/rootfs" -c -f "$work/image.tar" --format=pax --xattrs --xattrs-include='*' \
	--sort=name --numeric-owner --one-file-system .
rm -f -- "$out.stamp"
mv -f -- "$work/image.tar" "$out"
put "$out.stamp" <<<"$stamp"
