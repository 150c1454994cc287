# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""What it costs to serve many images: one nbdkit beside one qemu-nbd for each.

    bench/run.sh gateway

Both serve the same images of the same cluster, one after the other in the same
run, each image to one client that reads 4 KiB.  Then nbdkit alone: a thousand
connections that come and go, and the list of a pool of ten thousand images.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import time

import nbd
import psutil
import rbd
from tabulate import tabulate

from bench.common import MIB, PLUGIN, ceph, new_pool, versions, wait_until


@contextlib.contextmanager
def pool_of(count, data=b""):
    """A pool with this many images of 64 MiB; gives its name, theirs and an ioctx."""
    names = [f"image-{number:05}" for number in range(count)]

    def create(name):
        rbd.RBD().create(ioctx, name, 64 * MIB, old_format=False)
        if data:
            with rbd.Image(ioctx, name) as image:
                image.write(data, 0)

    with new_pool() as (pool, ioctx):
        with concurrent.futures.ThreadPoolExecutor(8) as workers:
            list(workers.map(create, names))
        yield pool, names, ioctx


@contextlib.contextmanager
def running(commands):
    processes = [subprocess.Popen(command) for command in commands]
    try:
        yield [psutil.Process(process.pid) for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def nbdkit(pool, socket, *options):
    return [
        *("nbdkit", "--foreground", f"--unix={socket}", f"--pidfile={socket}.pid", *options),
        *("python", str(PLUGIN), "id=rw", f"pool={pool}", "exports=*"),
    ]


def qemu_nbd(pool, image, socket):
    return [
        *(
            "qemu-nbd",
            "--persistent",
            f"--socket={socket}",
            "--format=raw",
            f"--export-name={image}",
        ),
        f"rbd:{pool}/{image}:id=rw:conf={os.environ['CEPH_CONF']}",
    ]


def connect(socket, export):
    client = nbd.NBD()
    client.set_export_name(export)
    client.connect_unix(str(socket))
    return client


def first_read(socket, export):
    """Connect as soon as the server listens, and return what 4 KiB say."""
    client = None

    def connected():
        nonlocal client
        with contextlib.suppress(nbd.Error):
            client = connect(socket, export)
        return client

    wait_until(connected)
    assert client.pread(4096, 0) == b"x" * 4096
    return client


def sessions():
    """How many clients the monitor knows, but for the one that asks."""
    (monitor,) = json.loads(ceph("mon", "dump", "--format", "json"))["mons"]
    known = json.loads(ceph("tell", f"mon.{monitor['name']}", "sessions"))
    return sum(session["entity_name"] == "client.rw" for session in known)


def threads(processes):
    """All threads, and those that are not nbdkit's own: it names none of its own."""
    names = [
        pathlib.Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text().strip()
        for process in processes
        for thread in process.threads()
    ]
    return len(names), sum(name != "nbdkit" for name in names)


def cost(commands, targets):
    """Start servers; return what they cost when each (socket, export) has been read from."""
    before = sessions()
    with concurrent.futures.ThreadPoolExecutor(len(targets)) as workers:
        begin = time.monotonic()
        with running(commands) as processes:
            clients = list(workers.map(first_read, *zip(*targets, strict=True)))
            seconds = time.monotonic() - begin
            total, outside = threads(processes)
            memory = [process.memory_full_info() for process in processes]
            result = {
                "processes": len(processes),
                "seconds until all were read": round(seconds, 2),
                "threads": total,
                "threads but for nbdkit's workers": outside,
                "memory, MiB (proportional set size)": sum(m.pss for m in memory) // MIB,
                "memory, MiB (unique to the processes)": sum(m.uss for m in memory) // MIB,
                "cluster sessions": sessions() - before,
            }
            for client in clients:
                client.shutdown()
    return result


def watchers(ioctx, names):
    count = 0
    for name in names:
        with rbd.Image(ioctx, name, read_only=True) as image:
            count += len(list(image.watchers_list()))
    return count


def come_and_go(pool, names, ioctx, directory, rounds):
    socket = directory / "come-and-go"
    rows = []
    with running([nbdkit(pool, socket)]) as (server,):
        wait_until(pathlib.Path(f"{socket}.pid").exists)

        def connections(count):
            for number in range(count):
                client = connect(socket, names[number % len(names)])
                assert client.pread(4096, 0) == b"x" * 4096
                client.shutdown()
            wait_until(lambda: watchers(ioctx, names) == 0)
            wait_until(lambda: server.num_threads() <= (rows[0][1] if rows else 1000))

        for what, count in (("100", 100), *[(f"{rounds} more", rounds)] * 3):
            connections(count)
            memory = server.memory_info().rss / MIB
            rows.append(
                (what, server.num_threads(), server.num_fds(), watchers(ioctx, names), memory)
            )
    return rows


def seconds(command, **options):
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return time.monotonic() - begin


def listing(directory, count):
    socket = directory / "list"
    with pool_of(count) as (pool, _, _), running([nbdkit(pool, socket)]):
        wait_until(pathlib.Path(f"{socket}.pid").exists)
        client = nbd.NBD()
        client.set_opt_mode(True)
        client.connect_unix(str(socket))
        begin = time.monotonic()
        listed = client.opt_list(lambda name, description: None)
        took = time.monotonic() - begin
        assert listed == count
        rbd_ls = ["rbd", "--id", "rw", "ls", pool]
        return [
            ("NBD_OPT_LIST, with size and parent", took),
            ("rbd ls, names only", seconds(rbd_ls)),
            ("rbd ls --long, which opens each image", seconds([*rbd_ls, "--long"])),
        ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="images open at once")
    parser.add_argument("--connects", type=int, default=1000, help="connections that come and go")
    parser.add_argument("--list", type=int, default=10000, help="images in the pool to be listed")
    arguments = parser.parse_args()
    found = versions("nbdkit", "qemu-nbd", "ceph")
    print(", ".join(f"{name} {version}" for name, version in found.items()), end=", ")
    print(f"{os.cpu_count()} CPUs")

    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        with pool_of(arguments.images, b"x" * 4096) as (pool, names, ioctx):
            ours, lean = (
                cost(
                    [nbdkit(pool, directory / f"nbdkit{option}", option)],
                    [(directory / f"nbdkit{option}", name) for name in names],
                )
                for option in ("--threads=16", "--threads=1")
            )
            theirs = cost(
                [qemu_nbd(pool, name, directory / name) for name in names],
                [(directory / name, name) for name in names],
            )
            print(f"\n{arguments.images} images, one client each\n")
            rows = [
                (key, ours[key], lean[key], theirs[key], ours[key] / theirs[key]) for key in ours
            ]
            headers = ["", "one nbdkit", "nbdkit -t 1", "qemu-nbd each", "first / last"]
            print(tabulate(rows, headers, floatfmt=("", "g", "g", "g", ".3f")))
            print("\nnbdkit after connections that came and went\n")
            rows = come_and_go(pool, names, ioctx, directory, arguments.connects)
            headers = ["connections", "threads", "descriptors", "watchers", "resident MiB"]
            print(tabulate(rows, headers, floatfmt=".1f"))
        if arguments.list:
            print(f"\nlist of {arguments.list} images\n")
            print(tabulate(listing(directory, arguments.list), ["", "seconds"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
