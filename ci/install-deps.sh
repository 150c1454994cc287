#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Install the Debian packages that are missing.
#
#   ci/install-deps.sh install what ci/install.sh and the plugin need
#   ci/install-deps.sh         what ci/demo.sh needs
#   ci/install-deps.sh test    and what ci/test.sh needs
#   ci/install-deps.sh bench   and what bench/run.sh needs
#   ci/install-deps.sh lint    and what ci/lint.sh needs
set -euo pipefail

plugin=(nbdkit nbdkit-plugin-python python3-rados python3-rbd)
packages=(
  "${plugin[@]}"
  # a throwaway cluster
  ceph-mon ceph-mgr ceph-osd ceph-common
  # clients
  libnbd-bin python3-libnbd qemu-utils e2fsprogs
)
case ${1-} in
  "") ;;
  install) packages=("${plugin[@]}" perl) ;; # pod2man
  test) packages+=(python3-pytest python3-pytest-timeout python3-pytest-xdist
    python3-hypothesis python3-tenacity
    python3-trustme python3-tabulate qemu-block-extra iptables cryptsetup-bin
    # what installs it
    perl python3-venv python3-setuptools python3-wheel
    # TLS
    gnutls-bin openssl socat
    # mounts, and what checks their examples
    fuse3 xfsprogs nbd-client systemd libvirt-clients libxml2-utils
    # guests
    qemu-system-x86 python3-pexpect netcat-openbsd busybox-static kmod xz-utils cpio
    syslinux mtools) ;;
  bench) packages+=(python3-tenacity python3-tabulate python3-psutil qemu-block-extra
    # bench/compare.py; fio comes with its engines for rbd and nbd
    fio python3-matplotlib) ;;
  lint) packages+=(shellcheck mypy python3-venv debootstrap) ;;
  *) sed -n 's/^#   //p' "$0" >&2; exit 2 ;;
esac

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
    missing+=("$package")
done
root=()
[ "$(id -u)" = 0 ] || root=(sudo)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
as_root() { # SCRIPT ARGUMENT...
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive sh -ec "$1" sh "${@:2}" >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; exit 1; }
}

if [ ${#missing[@]} -gt 0 ]; then
  echo "installing: ${missing[*]}"
  # shellcheck disable=SC2016  # for sh to expand
  as_root 'apt-get update; apt-get install -y --no-install-recommends "$@"' "${missing[@]}"
fi

# The kernel of the tests' guests.  Installed, it could be the next that this machine boots.
kernel=/var/cache/rbd_export/kernel
if [ "${1-}" = test ] && [ ! -d "$kernel" ]; then
  echo "unpacking: linux-image-cloud-amd64"
  # shellcheck disable=SC2016  # for sh to expand
  as_root '
    apt-get update
    mkdir -p "$(dirname "$1")"
    new=$(mktemp -d "$1.XXXXXX")
    trap "rm -rf $new" EXIT
    cd "$new"
    apt-get download "$(apt-cache depends linux-image-cloud-amd64 | sed -n "s/^  Depends: //p")"
    dpkg -x linux-image-*.deb tree
    [ -e tree/lib ] || ln -s usr/lib tree/lib
    image=$(echo tree/boot/vmlinuz-*)
    depmod --basedir "$PWD/tree" "${image#*vmlinuz-}"
    mv tree "$1"' "$kernel"
fi
