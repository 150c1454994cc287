#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Install what the benchmarks need, start a throwaway Ceph cluster, run one of
# them against it and stop it.  Arguments after the name go to the benchmark.
#
#   bench/run.sh compare    reads and writes of all sorts, and a chart of them
#   bench/run.sh gateway    what it costs to serve 100 images
#   bench/run.sh extents    the map of a large sparse image
#   bench/run.sh copy       copies out, in, and an increment
#   bench/run.sh --store bluestore compare    on disk rather than in memory
#   CEPH_CONF=FILE bench/run.sh gateway    on that cluster, in a pool of its own
set -euo pipefail
[ -z "${CEPH_CONF-}" ] || CEPH_CONF=$(realpath -- "$CEPH_CONF")
cd "$(dirname "$0")/.."
usage() { sed -n 's/^#   //p' "$0" >&2; exit 2; }

arguments=("$@")
store=()
if [ "${1-}" = --store ]; then
  [ $# -gt 2 ] || usage
  store=(--store "$2")
  shift 2
  [ -z "${CEPH_CONF-}" ] || { echo "run.sh: --store is for a new cluster, not CEPH_CONF's" >&2; exit 2; }
fi
[ -f "bench/${1-}.py" ] || usage

# Ceph's daemons keep their files as root.
[ "$(id -u)" = 0 ] || exec sudo --preserve-env=CEPH_CONF bench/run.sh "${arguments[@]}"

ci/install-deps.sh bench

if [ -z "${CEPH_CONF-}" ]; then
  # Not /tmp, which may be in memory.
  dir=$(mktemp -d /var/tmp/rbd-export-bench.XXXXXX)
  trap 'ci/start-ceph.sh stop "$dir"; rm -rf "$dir"' EXIT
  CEPH_CONF=$(ci/start-ceph.sh start "$dir" "${store[@]}")
  export CEPH_CONF
fi

# As modules: the name of one is that of a module of the standard library.
/usr/bin/python3 -m "bench.$1" "${@:2}"
