#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Install what the tests need, start a throwaway Ceph cluster, run the tests
# against it and stop it.  Arguments go to pytest.
#
#   ci/test.sh                     all tests
#   ci/test.sh -k extents -x       some of them, until one fails
#   ci/test.sh -n 2                two at a time, which takes two thirds of the time
#   CEPH_CONF=FILE ci/test.sh      on that cluster, in pools that the tests make
#
# The cluster of CEPH_CONF must have client.rw (profile rbd) and client.ro
# (profile rbd-read-only) besides client.admin.
set -euo pipefail
[ -z "${CEPH_CONF-}" ] || CEPH_CONF=$(realpath -- "$CEPH_CONF")
cd "$(dirname "$0")/.."

# Ceph's daemons keep their files as root.
[ "$(id -u)" = 0 ] || exec sudo --preserve-env=CEPH_CONF,CI ci/test.sh "$@"

ci/install-deps.sh test

if [ -z "${CEPH_CONF-}" ]; then
  dir=$(mktemp -d /tmp/rbd-export-test.XXXXXX)
  trap 'ci/start-ceph.sh stop "$dir"; rm -rf "$dir"' EXIT
  CEPH_CONF=$(ci/start-ceph.sh start "$dir")
  export CEPH_CONF
fi

# Debian's python3 has nbd, rados and rbd; another one may come first in PATH.
/usr/bin/python3 -m pytest "$@"
