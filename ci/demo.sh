#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Show what rbd_export does, on this machine, with nothing prepared: install
# what is missing, start a throwaway Ceph cluster, export an image, let NBD
# clients use it, and take everything away again.
#
#   ci/demo.sh          do that
#   ci/demo.sh --keep   leave cluster and export running at the end
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(id -u)" = 0 ] || exec sudo ci/demo.sh "$@"

keep=no
case "$*" in
  "") ;;
  --keep) keep=yes ;;
  *) sed -n 's/^#   //p' "$0" >&2; exit 2 ;;
esac

say() { printf '\n==> %s\n' "$*"; }
run() { printf '    $ %s\n' "$*"; "$@"; }

say "Installing the Debian packages that are missing"
ci/install-deps.sh

dir=$(mktemp -d /tmp/rbd-export-demo.XXXXXX)
conf=$dir/ceph/ceph.conf
socket=$dir/nbd.sock
uri="nbd+unix://?socket=$socket"

finish() {
  # Whatever has failed, the cluster must go.
  for pidfile in "$dir"/*.pid; do
    [ -f "$pidfile" ] || continue
    pid=$(cat "$pidfile")
    if kill "$pid"; then
      timeout 10 tail --pid="$pid" -s 0.1 -f /dev/null || true
    fi
  done
  ci/start-ceph.sh stop "$dir/ceph"
  rm -rf "$dir"
}
trap 'echo "ci/demo.sh: failed; cleaning up" >&2; finish' EXIT

say "Starting a throwaway Ceph cluster: monitor, manager and one OSD (about 10 s)"
ci/start-ceph.sh start "$dir/ceph" >/dev/null
run rbd --conf "$conf" --id rw create --size 256M rbd/vm1

say "Exporting the image rbd/vm1 over NBD"
run nbdkit --unix="$socket" --pidfile="$dir/nbdkit.pid" \
  python rbd_export.py conf="$conf" id=rw image=rbd/vm1

say "What an NBD client sees"
run nbdinfo "$uri"

say "Making an ext4 file system with this repository in it, and copying it into the image"
mkdir "$dir/tree" "$dir/out"
cp -r README.md LICENSE rbd_export.py ci config tests "$dir/tree"
truncate --size 256M "$dir/disk"
run mkfs.ext4 -q -d "$dir/tree" "$dir/disk"
run nbdcopy --flush "$dir/disk" "$uri"

say "Copying it out again: the copy must be the same, byte for byte"
run nbdcopy "$uri" "$dir/copy"
run cmp "$dir/disk" "$dir/copy"

say "The same bytes, read by Ceph's own tool without the export"
rbd --conf "$conf" --id rw export --no-progress rbd/vm1 - | cmp - "$dir/disk"
echo "    identical"

say "The file system in the copy is sound, and holds the files"
run e2fsck -fn "$dir/copy"
debugfs -R "rdump / $dir/out" "$dir/copy" 2>/dev/null
rm -rf "$dir/out/lost+found"
run diff -r "$dir/tree" "$dir/out"

say "What takes space in the image, and what does not (qemu-img map)"
run qemu-img map --output=human "$uri"

say "Serving every image of the pool whose name begins with vm, and their snapshots"
rbd --conf "$conf" --id rw create --size 1G rbd/vm2
rbd --conf "$conf" --id rw create --size 1G rbd/secret
rbd --conf "$conf" --id rw snap create --no-progress rbd/vm1@monday
run nbdkit --unix="$dir/pool.sock" --pidfile="$dir/pool.pid" \
  python rbd_export.py conf="$conf" id=rw pool=rbd exports='vm*' exports='vm*@*'
run nbdinfo --list "nbd+unix://?socket=$dir/pool.sock"
run nbdcopy "nbd+unix:///vm1@monday?socket=$dir/pool.sock" "$dir/monday"
run cmp "$dir/disk" "$dir/monday"

if [ "$keep" = yes ]; then
  trap - EXIT
  say "Left running"
  echo "    NBD URI:    $uri"
  echo "    the pool:   nbd+unix:///vm1?socket=$dir/pool.sock   (or vm2, vm1@monday)"
  echo "    ceph.conf:  $conf   (rbd --conf $conf --id rw ls)"
  echo "    to stop:    kill \$(cat $dir/*.pid); sleep 2; $PWD/ci/start-ceph.sh stop $dir/ceph; rm -rf $dir"
else
  say "Stopping the export and the cluster"
  finish
  trap - EXIT
  say "Done: everything worked, and nothing is left"
fi
