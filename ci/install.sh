#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Install the plugin, so that `nbdkit rbd` finds it, as a command, too; its manual
# page; and the Debian packages that it needs.
#
#   sudo ci/install.sh
#   DESTDIR=FOLDER ci/install.sh   into a folder, for a package; needs no root
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 0 ] || { sed -n 's/^#   //p' "$0" >&2; exit 2; }

[ -n "${DESTDIR-}" ] || ci/install-deps.sh install

where() { nbdkit --dump-config | sed -n "s/^$1=//p"; }
plugin=$(where plugindir)/nbdkit-rbd-plugin
command=$(where bindir)/rbd_export.py
manual=$(where mandir)/man1/nbdkit-rbd-plugin.1
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' rbd_export.py)

install -D -m 755 rbd_export.py "${DESTDIR-}$plugin"
install -d "${DESTDIR-}$(dirname "$command")"
ln -sf "$plugin" "${DESTDIR-}$command"
page=$(mktemp)
trap 'rm -f "$page"' EXIT
pod2man --name=nbdkit-rbd-plugin --center=NBDKIT --release="rbd_export $version" docs/nbdkit-rbd-plugin.pod "$page"
install -D -m 644 "$page" "${DESTDIR-}$manual"
printf 'installed %s\n' "$plugin" "$command" "$manual"
