#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Make the initramfs of the tests' guests: busybox, nbd-client, and the modules
# for virtio and nbd of an unpacked kernel package.  The guest runs the commands
# that it reads from its serial console.
#
#   tests/initramfs.sh KERNEL OUT
set -euo pipefail
[ $# = 2 ] || { sed -n 's/^#   //p' "$0" >&2; exit 2; }
kernel=$1
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

mkdir "$root"/{bin,dev,etc,mnt,proc,sbin,sys,usr} "$root"/usr/{bin,sbin}
cp /bin/busybox "$root/bin"
cp /sbin/nbd-client "$root/sbin"
ldd /sbin/nbd-client | grep -o '/[^ ]*' | xargs cp --parents --dereference --target-directory="$root"
# 10.0.2.100 is where qemu forwards NBD connections to the host.
echo '10.0.2.100 gateway' >"$root/etc/hosts"
echo 'hosts: files' >"$root/etc/nsswitch.conf"

image=$(echo "$kernel"/boot/vmlinuz-*)
release=${image#*vmlinuz-}
modules=$root/lib/modules/$release
mkdir -p "$modules"
for module in virtio_pci virtio_blk virtio_net nbd; do
  modprobe --dirname "$kernel" --set-version "$release" --show-depends "$module"
done | awk '$1 == "insmod" { print $2 }' | sort -u | xargs cp --target-directory="$modules"
find "$modules" -name '*.xz' -exec xz --decompress {} +
busybox depmod -b "$root" "$release"

cat >"$root/init" <<'EOT'
#!/bin/busybox sh
/bin/busybox --install -s
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
modprobe -a virtio_pci virtio_blk virtio_net
if [ -e /sys/class/net/eth0 ]; then
  ip address add 10.0.2.15/24 dev eth0
  ip link set eth0 up
fi
stty -echo
echo the guest is up
PS1= PS2= sh
EOT
chmod +x "$root/init"
(cd "$root" && find . | cpio --quiet --create --format=newc --owner=0:0) | gzip -1 >"$2"
