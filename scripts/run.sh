#!/usr/bin/env bash
# run.sh MATCHLOCK BUSYBOX.tar: install the guest bundle, import the busybox image where it is
# not there yet, and run a first command in a microVM.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# = 2 ] || die "usage: scripts/run.sh MATCHLOCK BUSYBOX.tar"
matchlock=$1
image=$2
[ -x "$matchlock" ] || die "no program at $matchlock: run make build"
[ -f "$image" ] || die "no image at $image: run make image"

cache=${MATCHLOCK_CACHE:-${HOME:?HOME is not set}/.cache/matchlock}
"$root/scripts/install-bundle.sh" "$cache"

# Is the tag there, and is it what we last imported into this cache?
imported() {
	local images
	holds "$stamp" "$wanted" || return 1
	images=$("$matchlock" image ls </dev/null) || return 1
	awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^busybox(:latest)?$/) found = 1 } END { exit !found }' <<<"$images"
}

stamp=$target/.busybox-imported
wanted="$(sha256 "$image") $cache ${HOME:-}"
if imported; then
	say "image: busybox is imported"
else
	say "image: importing busybox"
	"$matchlock" image import busybox <"$image"
	put "$stamp" <<<"$wanted"
fi

# shellcheck disable=SC2016 # for the shell in the microVM
command='uname -a; cat /etc/os-release; echo "hello from $(hostname)"'
say "running: ${matchlock#"$root/"} run --image busybox -- sh -c '$command'"
exec "$matchlock" run --image busybox -- sh -c "$command"
