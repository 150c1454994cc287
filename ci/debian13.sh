#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Run a command in a copy of this checkout inside a fresh Debian 13, installed
# into a temporary folder and removed afterwards.  Needs root.
#
#   ci/debian13.sh ci/test.sh
#   ci/debian13.sh ci/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n 's/^#   //p' "$0" >&2; exit 2; }

# In a mount and pid namespace of its own, so that whatever happens no process
# and no mount outlives this script, and removing the folder cannot reach /dev.
if [ "$1" != --inside ]; then
  ci/install-deps.sh lint
  root=$(mktemp -d /var/tmp/debian13.XXXXXX)
  trap 'rm -rf --one-file-system "$root"' EXIT
  unshare --mount --pid --fork --kill-child ci/debian13.sh --inside "$root" "$@"
  exit
fi
root=$2
shift 2

# The mirror that this machine uses.
# shellcheck disable=SC2016  # for apt-get to expand
mirrors=$(apt-get indextargets --format '$(SITE) $(RELEASE)' \
  'Created-By: Packages' 'Component: main' 'Origin: Debian')
mirror=$(awk '$2 !~ /-/ && !seen++ { print $1 }' <<<"$mirrors")
log=$(mktemp)
debootstrap --variant=minbase trixie "$root" ${mirror:+"$mirror"} >"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  exit 1
}
rm -f "$log"
# As any root: every user may search it, and it is a mount point, which unshare(1) wants.
chmod 755 "$root"
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"

# What is committed and what is not yet, but nothing that git ignores.
mkdir "$root/rbd_export"
git ls-files -z --cached --others --exclude-standard |
  tar --create --null --files-from=- | tar --extract --directory="$root/rbd_export"

chroot "$root" /usr/bin/env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  ${CI:+CI="$CI"} sh -c 'cd /rbd_export && exec "$@"' sh "$@"
