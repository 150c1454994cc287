# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""How long it takes to copy a sparse image out, in, and its increment, beside the peers.

bench/run.sh copy
"""

import argparse
import contextlib
import pathlib
import subprocess
import tempfile

import rbd

from bench.common import GIB, MIB, image_of, measure, new_pool, ours, qemu_nbd, qemu_rbd, show


def run(*command):
    subprocess.run(command, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    size = 10 * GIB
    with (
        tempfile.TemporaryDirectory() as directory,
        new_pool() as (pool, ioctx),
    ):
        place = pathlib.Path(directory)
        # Each tenth 4 MiB: 1 GiB in all.
        image_of(ioctx, "image", size, [(n * 40 * MIB, 4 * MIB) for n in range(256)])
        image, target = f"{pool}/image", str(place / "out")
        snap = ("rbd", "--id=rw", "snap", "create", "--no-progress")
        run(*snap, f"{image}@monday")
        with rbd.Image(ioctx, "image") as opened:
            for n in range(50):
                opened.write(bytes([n + 1]) * MIB, n * 200 * MIB)
        run(*snap, f"{image}@tuesday")
        convert = ("qemu-img", "convert", "-O", "raw")

        def fresh(_name):
            pathlib.Path(target).unlink(missing_ok=True)

        with ours(place, image=f"{image}@monday") as mine, qemu_nbd(place, image) as theirs:
            out = {
                "nbdcopy from rbd_export": ["nbdcopy", mine, target],
                "nbdcopy from qemu-nbd": ["nbdcopy", theirs, target],
                "qemu-img convert from rbd_export": [*convert, mine, target],
                "qemu-img convert rbd:": [
                    *convert,
                    "-f",
                    "raw",
                    qemu_rbd(f"{image}@monday"),
                    target,
                ],
                "rbd export": [
                    "rbd",
                    "--id=rw",
                    "export",
                    "--no-progress",
                    f"{image}@monday",
                    target,
                ],
            }
            show("10 GiB with 1 GiB of data, out", measure(options.rounds, out, fresh))
            run("nbdcopy", mine, str(place / "in"))

        source = str(place / "in")
        with contextlib.ExitStack() as stack:
            names = ["mine", "theirs", "converted", "imported"]
            for name in names[:3]:
                rbd.RBD().create(ioctx, name, size, old_format=False)
            mine = stack.enter_context(ours(place, image=f"{pool}/mine"))
            theirs = stack.enter_context(qemu_nbd(place, f"{pool}/theirs"))
            nbdcopy = ["nbdcopy", "--destination-is-zero", "--flush", source]
            into = {
                "nbdcopy to rbd_export": [*nbdcopy, mine],
                "nbdcopy to qemu-nbd": [*nbdcopy, theirs],
                "qemu-img convert to rbd:": [
                    *("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "--target-is-zero"),
                    *(source, qemu_rbd(f"{pool}/converted")),
                ],
                "rbd import": [
                    *("rbd", "--id=rw", "import", "--no-progress"),
                    *(source, f"{pool}/imported"),
                ],
            }

            def empty(name):
                if name == "rbd import":
                    with contextlib.suppress(rbd.ImageNotFound):
                        rbd.RBD().remove(ioctx, "imported")
                    return
                which = dict(zip(into, names, strict=True))[name]
                with rbd.Image(ioctx, which) as opened:
                    for start in range(0, size, GIB):
                        opened.discard(start, GIB)

            show("the same, into an empty image", measure(options.rounds, into, empty))

        qcow2 = ["qemu-img", "convert", "-O", "qcow2"]
        run(*qcow2, "-f", "raw", source, str(place / "monday.qcow2"))
        backing = ["-B", str(place / "monday.qcow2"), "-F", "qcow2"]
        with (
            ours(place, image=f"{image}@tuesday") as whole,
            ours(place, image=f"{image}@monday..tuesday") as increment,
        ):
            copies = {
                "full copy to qcow2": [*qcow2, whole, target],
                "increment of 50 MiB to qcow2": [*qcow2, *backing, increment, target],
            }
            show("an increment", measure(options.rounds, copies, fresh))


main()
