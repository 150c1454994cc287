#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Install what the stress test needs, start a throwaway Ceph cluster that keeps
# its data on disk (bluestore), and kill nbdkit, the OSD and both while clients
# write.  Prints one table; ends with status 1 if anything acknowledged was lost.
#
#   tests/stress/run.sh               100 rounds of each fault
#   tests/stress/run.sh 5             5 of each
#   tests/stress/run.sh 5 --seed 1    the same choices again
set -euo pipefail
cd "$(dirname "$0")/../.."

# Ceph's daemons keep their files as root.
[ "$(id -u)" = 0 ] || exec sudo tests/stress/run.sh "$@"

ci/install-deps.sh test
ci/install-deps.sh bench

dir=$(mktemp -d /var/tmp/rbd-export-stress.XXXXXX)
trap 'ci/start-ceph.sh stop "$dir"; rm -rf "$dir"' EXIT
CEPH_CONF=$(ci/start-ceph.sh start "$dir" --store bluestore)
export CEPH_CONF

/usr/bin/python3 tests/stress/crash.py "$@"
