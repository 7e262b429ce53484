#!/usr/bin/env bash
# busybox-image.sh OUT.tar: make a small image (the archive format of `docker save`) from the
# host's static busybox. The same busybox gives the same bytes.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Modes of the files made here must not depend on the caller.
umask 022

[ $# = 1 ] || die "usage: scripts/busybox-image.sh OUT.tar"
out=$1
need busybox busybox-static
need tar tar
busybox=$(realpath -- "$(command -v busybox)")
is_static "$busybox" || die "$busybox is not static: $(how_to_get busybox-static)"

stamp="$(sha256 "$busybox") $(sha256 "$root/scripts/busybox-image.sh")"
if [ -f "$out" ] && holds "$out.stamp" "$stamp"; then
	say "image: ${out##*/} is up to date"
	exit 0
fi
say "image: making ${out##*/} from $busybox"

mkdir -p -- "$(dirname -- "$out")"
work=$(mktemp -d "$out.work.XXXXXX")
trap 'rm -rf -- "$work"' EXIT
fs=$work/rootfs
archive=$work/archive
mkdir -p "$archive"

banner=$("$busybox" | head -n 1 || true)
version=$(sed -n 's/^BusyBox v\([0-9.]*\).*/\1/p' <<<"$banner")
[ -n "$version" ] || die "$busybox does not tell its version"

mkdir -p "$fs"/{bin,dev,etc,home/user,proc,root,run,sbin,sys,tmp,usr/{bin,sbin},var/{log,tmp}}
chmod 0700 "$fs/root"
chmod 1777 "$fs/tmp" "$fs/var/tmp"
install -m 0755 -- "$busybox" "$fs/bin/busybox"
while read -r applet; do
	case $applet in
	bin/busybox) continue ;;
	bin/* | sbin/* | usr/bin/* | usr/sbin/*) ;;
	*) continue ;;
	esac
	case $applet in
	bin/*) link=busybox ;;
	sbin/*) link=../bin/busybox ;;
	*) link=../../bin/busybox ;;
	esac
	ln -s -- "$link" "$fs/$applet"
done < <("$busybox" --list-full)
[ -e "$fs/bin/sh" ] || die "$busybox has no sh"

cat >"$fs/etc/passwd" <<'TEXT'
root:x:0:0:root:/root:/bin/sh
user:x:1000:1000:user:/home/user:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
TEXT
cat >"$fs/etc/group" <<'TEXT'
root:x:0:
user:x:1000:
nogroup:x:65534:
TEXT
cat >"$fs/etc/os-release" <<TEXT
NAME="Matchlock busybox"
PRETTY_NAME="Matchlock busybox $version"
ID=busybox
VERSION_ID=$version
TEXT

# pack DIRECTORY OUT OWNER TAR-OPTION...: the same files give the same archive.
pack() {
	local directory=$1 file=$2 owner=$3
	shift 3
	tar -C "$directory" -f "$file" --format=gnu --sort=name --mtime=@0 --numeric-owner \
		--owner="$owner" --group="$owner" "$@" .
}

layer=$work/layer.tar
pack "$fs" "$layer" 0 -c --exclude=./home/user
# The one directory that is not root's is added at the end.
tar -C "$fs" -f "$layer" -r --format=gnu --mtime=@0 --numeric-owner \
	--owner=1000 --group=1000 ./home/user

diff_id=$(sha256 "$layer")
mkdir "$archive/$diff_id"
mv -- "$layer" "$archive/$diff_id/layer.tar"

config=$work/config.json
cat >"$config" <<JSON
{
  "architecture": "amd64",
  "os": "linux",
  "created": "1970-01-01T00:00:00Z",
  "config": {
    "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
    "Cmd": ["sh"]
  },
  "rootfs": {"type": "layers", "diff_ids": ["sha256:$diff_id"]},
  "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "scripts/busybox-image.sh"}]
}
JSON
id=$(sha256 "$config")
mv -- "$config" "$archive/$id.json"
cat >"$archive/manifest.json" <<JSON
[{"Config": "$id.json", "RepoTags": ["busybox:latest"], "Layers": ["$diff_id/layer.tar"]}]
JSON
find "$archive" -type f -exec chmod 0644 {} +

tar -C "$archive" -c -f "$work/image.tar" --format=gnu --sort=name --mtime=@0 --numeric-owner \
	--owner=0 --group=0 manifest.json "$id.json" "$diff_id"
rm -f -- "$out.stamp"
mv -f -- "$work/image.tar" "$out"
put "$out.stamp" <<<"$stamp"
