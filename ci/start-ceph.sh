#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Run a throwaway Ceph cluster (mon, mgr, one OSD) from Debian's packages,
# without containers.  Everything lies under DIR: configuration, keys, data,
# logs, pid files and sockets.  Nothing outside DIR is read or written, and
# ports are free ones on loopback, so clusters can run side by side.
#
#   ci/start-ceph.sh start  DIR [--store memstore|bluestore]
#   ci/start-ceph.sh status DIR
#   ci/start-ceph.sh stop   DIR
#
# Afterwards DIR/ceph.conf finds the keys of client.admin, client.rw (profile
# rbd) and client.ro (profile rbd-read-only); the pool "rbd" is ready for use.
# DIR itself is left in place by `stop`, for its logs.
set -euo pipefail

usage() {
  sed -n 's/^#   ci/usage: ci/p' "$0" >&2
  exit 2
}

die() {
  echo "start-ceph.sh: $*" >&2
  exit 1
}

[ $# -ge 2 ] || usage
action=$1
case $2 in -*) usage ;; esac
dir=$(realpath -m -- "$2")
shift 2
store=memstore
while [ $# -gt 0 ]; do
  case $1 in
    --store) store=${2-}; shift 2 || usage ;;
    --store=*) store=${1#*=}; shift ;;
    *) usage ;;
  esac
done
case $store in memstore | bluestore) ;; *) die "unknown store '$store'" ;; esac

conf=$dir/ceph.conf
mark=$dir/.start-ceph
# A user's own settings must not reach this cluster.
unset CEPH_CONF CEPH_ARGS CEPH_KEYRING
# Debian 12's ceph tools are Python: keep them off another python3 in PATH.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

# ---- daemons -----------------------------------------------------------------

# The pid of a daemon, if the pid file names a process that is this daemon of
# this cluster: after a crash the number may belong to somebody else.
daemon_pid() { # NAME (mon.a, mgr.a, osd.0)
  local pid
  pid=$(cat "$dir/run/$1.pid" 2>/dev/null) || return 1
  [ -n "$pid" ] || return 1
  tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" | grep -qxF -- "$conf" || return 1
  [ "$(basename "$(readlink "/proc/$pid/exe")")" = "ceph-${1%%.*}" ] || return 1
  echo "$pid"
}

# Starts a daemon, which forks itself into the background once it has come up
# far enough to know that its settings are good.
start_daemon() { # NAME
  "ceph-${1%%.*}" --conf "$conf" --id "${1#*.}" >>"$dir/log/$1.out" 2>&1 ||
    failed "$1" "ceph-${1%%.*} did not start"
}

failed() { # NAME MESSAGE
  echo "start-ceph.sh: $2; the end of its log:" >&2
  tail -n 20 "$dir/log/$1.out" "$dir/log/$1.log" >&2 2>/dev/null || true
  exit 1
}

# Stops a daemon: asks, and after 10 s insists.  Returns when it is gone.
stop_daemon() { # NAME
  local pid
  pid=$(daemon_pid "$1") || { rm -f "$dir/run/$1.pid"; return 0; }
  # A stopped (SIGSTOP) daemon would not see the signal.
  kill -CONT "$pid" 2>/dev/null || true
  kill -TERM "$pid" 2>/dev/null || true
  if ! gone "$pid" 10; then
    kill -KILL "$pid" 2>/dev/null || true
    gone "$pid" 10 || return 1
  fi
  rm -f "$dir/run/$1.pid"
}

gone() { # PID SECONDS
  timeout "$2" tail --pid="$1" -s 0.1 -f /dev/null
}

ceph_() { timeout 60 ceph --conf "$conf" --connect-timeout 30 "$@"; }

# ---- actions -----------------------------------------------------------------

write_conf() { # PORT
  cat >"$conf" <<EOT
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = v2:127.0.0.1:$1
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $dir/keyring
run dir = $dir/run
log file = $dir/log/\$type.\$id.log
pid file = $dir/run/\$type.\$id.pid
admin socket = $dir/run/\$type.\$id.asok
crash dir = $dir/crash
# One OSD has to be enough.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
# An OSD that was frozen (SIGSTOP) waits for a lease from the other OSDs of a placement
# group, of which there are none; on Ceph 18 it was seen to do so for good ("laggy").
osd pool default read lease ratio = 1000
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon warn on insecure global id reclaim allowed = false
auth allow insecure global id reclaim = false
# Each new snapshot and pool is a change of the OSD map, for which the monitor
# would wait a second, in case that more changes come.
paxos propose interval = 0.01
# Healthy on a disk that is nearly full, too.
mon data avail warn = 1
mon data avail crit = 0

[client]
# A client is many processes: none of these files can be its own.
log file =
admin socket =
pid file =

[mon]
mon data = $dir/mon
mon initial members = a

[mgr]
mgr data = $dir/mgr
mgr initial modules =

[osd]
osd data = $dir/osd
osd objectstore = $store
# Debian 13's ceph-osd looks for its classes under a relative path.
osd class dir = $(dirname "$(find /usr/lib -name libcls_rbd.so -print -quit)")
memstore device bytes = 34359738368
bluestore block size = 34359738368
EOT
}

# A free TCP port below the range from which the kernel takes ports for others.
free_port() {
  /usr/bin/python3 - <<'EOT'
import random
import socket

while True:
    with socket.socket() as s:
        port = random.randint(10000, 32000)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            continue
        print(port)
        break
EOT
}

start() {
  local port uuid
  [ "$(id -u)" = 0 ] || die "must run as root"
  command -v ceph-mon ceph-mgr ceph-osd ceph rbd >/dev/null ||
    die "Ceph is not installed: run ci/install-deps.sh"
  daemon_pid mon.a >/dev/null && die "a cluster runs in $dir already"
  if [ -e "$mark" ]; then
    rm -rf "${dir:?}"/{mon,mgr,osd,run,log,crash,keyring,ceph.conf,monmap}
  elif [ -n "$(ls -A "$dir" 2>/dev/null)" ]; then
    die "$dir is not empty, and not from here"
  fi
  mkdir -p "$dir"/{mon,mgr,osd,run,log,crash}
  touch "$mark"
  # Until it is up, a failure leaves no daemon.
  trap 'stop >/dev/null' EXIT

  port=$(free_port)
  write_conf "$port"

  # All keys are known to the monitor from its first moment.
  (umask 077 && ceph-authtool -C "$dir/keyring" \
    --gen-key --name=mon. --cap mon 'allow *' \
    >/dev/null)
  key() { ceph-authtool "$dir/keyring" --gen-key --name="$1" "${@:2}" >/dev/null; }
  key client.admin --cap mon 'allow *' --cap mgr 'allow *' --cap osd 'allow *'
  key client.rw --cap mon 'profile rbd' --cap mgr 'profile rbd' --cap osd 'profile rbd'
  key client.ro --cap mon 'profile rbd' --cap osd 'profile rbd-read-only'
  key mgr.a --cap mon 'profile mgr' --cap osd 'allow *'
  key osd.0 --cap mon 'allow profile osd' --cap mgr 'allow profile osd' --cap osd 'allow *'

  monmaptool --create --addv a "[v2:127.0.0.1:$port]" \
    --fsid "$(sed -n 's/^fsid = //p' "$conf")" "$dir/monmap" >"$dir/log/mon.a.out" 2>&1
  ceph-mon --conf "$conf" --id a --mkfs --monmap "$dir/monmap" --keyring "$dir/keyring" \
    >>"$dir/log/mon.a.out" 2>&1 || failed mon.a "ceph-mon --mkfs failed"
  start_daemon mon.a
  start_daemon mgr.a

  # The manager's Python modules do not load on Debian 13 (PyO3 refuses
  # subinterpreters).  None of them is needed here.
  ceph_ health mute MGR_MODULE_DEPENDENCY --sticky >>"$dir/log/mon.a.out" 2>&1 ||
    failed mon.a "the monitor does not answer"

  uuid=$(cat /proc/sys/kernel/random/uuid)
  ceph_ osd new "$uuid" 0 >>"$dir/log/osd.0.out" 2>&1 || failed mon.a "cannot register an OSD"
  ceph-osd --conf "$conf" --id 0 --mkfs --osd-uuid "$uuid" >>"$dir/log/osd.0.out" 2>&1 ||
    failed osd.0 "ceph-osd --mkfs failed"
  start_daemon osd.0

  ceph_ osd pool create rbd >>"$dir/log/osd.0.out" 2>&1 || failed mon.a "cannot create a pool"
  # Returns when the pool's placement groups serve I/O.
  timeout 60 rbd --conf "$conf" pool init rbd >>"$dir/log/osd.0.out" 2>&1 ||
    failed osd.0 "the OSD does not serve the pool 'rbd'"
  if [ "$store" = memstore ]; then
    # memstore adds up what it holds without a lock: an OSD that is all but empty may
    # come to less than nothing, which is 16 EiB, and be full.
    head -c 100M /dev/zero | timeout 60 rados --conf "$conf" --pool rbd put ballast - \
      >>"$dir/log/osd.0.out" 2>&1 || failed osd.0 "cannot write to the pool 'rbd'"
  fi
  # What must hold before the health is good is the manager's first report.
  timeout 60 bash -c "until ceph --conf '$conf' health | grep -q HEALTH_OK; do sleep 0.2; done" ||
    failed mgr.a "the cluster does not become healthy: $(ceph_ health detail)"
  trap - EXIT
  echo "$conf"
}

stop() {
  local name
  for name in osd.0 mgr.a mon.a; do
    stop_daemon "$name" || left="${left-} $name"
  done
  [ -z "${left-}" ] || die "still running:$left"
}

status() {
  local name pid down=0
  for name in mon.a mgr.a osd.0; do
    if pid=$(daemon_pid "$name"); then
      echo "$name running (pid $pid)"
    else
      echo "$name not running"
      down=1
    fi
  done
  [ $down = 0 ] || exit 1
  ceph_ health
}

case $action in
  start) start ;;
  stop) stop ;;
  status) status ;;
  *) usage ;;
esac
