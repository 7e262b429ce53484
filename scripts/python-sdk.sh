#!/usr/bin/env bash
# python-sdk.sh DIR: a Python environment in DIR with the published SDK (PyPI `matchlock`), for the
# tests. Skipped when it is there.
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

version=0.2.17

[ $# = 1 ] || die "usage: scripts/python-sdk.sh DIR"
holds "$1/.version" "$version" && exit 0
need python3 "python3 python3-venv"
say "python: matchlock $version from PyPI"
rm -rf -- "$1"
python3 -m venv "$1" || die "no Python environment could be made: $(how_to_get python3-venv)"
"$1/bin/pip" install --quiet --disable-pip-version-check --no-deps "matchlock==$version" ||
	die "the SDK could not be installed from PyPI; check the network"
put "$1/.version" <<<"$version"
