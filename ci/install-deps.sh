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
  test) packages+=(python3-pytest python3-pytest-timeout python3-hypothesis python3-tenacity
    python3-trustme python3-tabulate qemu-block-extra iptables cryptsetup-bin gnutls-bin
    openssl socat qemu-system-x86 perl python3-venv python3-setuptools python3-wheel) ;;
  bench) packages+=(python3-tenacity python3-tabulate python3-psutil qemu-block-extra) ;;
  lint) packages+=(shellcheck mypy python3-venv debootstrap) ;;
  *) sed -n 's/^#   //p' "$0" >&2; exit 2 ;;
esac

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
    missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

echo "installing: ${missing[*]}"
root=()
[ "$(id -u)" = 0 ] || root=(sudo)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"${root[@]}" env DEBIAN_FRONTEND=noninteractive sh -c '
  apt-get update && apt-get install -y --no-install-recommends "$@"' sh "${missing[@]}" \
  >"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
