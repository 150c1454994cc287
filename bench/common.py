# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmarks share: a pool of their own, servers, and rounds of commands."""

import contextlib
import os
import pathlib
import platform
import re
import shlex
import statistics
import subprocess
import time
import uuid

import rados
import rbd
import tenacity
from tabulate import tabulate

PLUGIN = pathlib.Path(__file__).resolve().parent.parent / "rbd_export.py"
MIB = 1 << 20
GIB = 1 << 30

# The peers as commands, but for what they serve.
NBDKIT = "nbdkit --foreground --unix={socket} python {plugin} id=rw"
QEMU_NBD = "qemu-nbd --persistent --socket={socket} --format=raw --shared=16 --discard=unmap"


def wait_until(condition):
    tenacity.Retrying(
        retry=tenacity.retry_if_not_result(bool),
        wait=tenacity.wait_fixed(0.01),
        stop=tenacity.stop_after_delay(300),
    )(condition)


def ceph(*words):
    return subprocess.run(["ceph", *words], check=True, capture_output=True, text=True).stdout


def versions(*tools):
    """{tool: its version}, and those of the plugin and of Debian's Python, which nbdkit runs."""
    found = {"rbd_export": re.search(r'(?m)^__version__ = "(.*)"', PLUGIN.read_text())[1]}
    for tool in tools:
        told = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True)
        found[tool] = re.search(r"[0-9]+(\.[0-9]+)+", told.stdout)[0]
    return {**found, "Python": platform.python_version()}


def machine():
    model = re.search(r"(?m)^model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
    }


@contextlib.contextmanager
def new_pool():
    """A pool for RBD; gives its name and an ioctx."""
    pool = f"rbd_export_bench-{uuid.uuid4().hex[:8]}"
    ceph("osd", "pool", "create", pool, "8")
    subprocess.run(["rbd", "pool", "init", pool], check=True)
    try:
        with (
            rados.Rados(conffile=os.environ["CEPH_CONF"], rados_id="rw") as cluster,
            cluster.open_ioctx(pool) as ioctx,
        ):
            yield pool, ioctx
    finally:
        ceph("osd", "pool", "rm", pool, pool, "--yes-i-really-really-mean-it")


def image_of(ioctx, name, size, writes):
    """Make an image and write bytes at places: [(place, count)]."""
    rbd.RBD().create(ioctx, name, size, old_format=False)
    with rbd.Image(ioctx, name) as image:
        for place, count in writes:
            image.write(os.urandom(count), place)


@contextlib.contextmanager
def serving_process(command, socket, **options):
    """Run a server; gives its process as soon as it listens."""
    process = subprocess.Popen(command, **options)
    try:
        wait_until(lambda: socket.exists() or process.poll() is not None)
        if process.returncode is not None:
            raise SystemExit(f"the server ended: {shlex.join(command)}")
        yield process
    finally:
        process.terminate()
        process.wait()
        socket.unlink(missing_ok=True)


def uri_of(socket):
    return f"nbd+unix:///?socket={socket}"


@contextlib.contextmanager
def serving(command, socket):
    """Run a server; gives its NBD URI as soon as it listens."""
    with serving_process(command, socket):
        yield uri_of(socket)


def ours(directory, **parameters):
    socket = directory / f"ours-{uuid.uuid4().hex[:8]}"
    settings = [f"{key.replace('_', '-')}={value}" for key, value in parameters.items()]
    command = NBDKIT.format(socket=socket, plugin=PLUGIN)
    return serving([*shlex.split(command), *settings], socket)


def qemu_nbd(directory, image):
    socket = directory / f"qemu-nbd-{uuid.uuid4().hex[:8]}"
    return serving([*shlex.split(QEMU_NBD.format(socket=socket)), qemu_rbd(image)], socket)


def qemu_rbd(image):
    return f"rbd:{image}:id=rw:conf={os.environ['CEPH_CONF']}"


def measure(rounds, commands, prepare=lambda name: None):
    """Run each command once in each round; return the median of its seconds."""
    seconds = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            prepare(name)
            begin = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - begin)
            print(f"round {number + 1}: {name}: {seconds[name][-1]:.2f} s", flush=True)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def show(title, medians):
    """Print seconds, and how many times as long as the first one the others took."""
    first = next(iter(medians.values()))
    rows = [(name, value, value / first) for name, value in medians.items()]
    headers = ["", "seconds", "times as long"]
    print(f"\n{title}\n\n{tabulate(rows, headers, floatfmt='.2f')}")
