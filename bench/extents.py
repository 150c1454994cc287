# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""How long the whole map of a large sparse image takes, beside the peers.

bench/run.sh extents
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

from bench.common import GIB, image_of, measure, new_pool, ours, qemu_nbd, qemu_rbd, show


def data(command):
    """Bytes that a map calls data."""
    entries = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return sum(entry["length"] for entry in entries if entry.get("data", entry.get("type") == 0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, help="GiB")
    parser.add_argument("--objects", type=int, default=300, help="that are written")
    options = parser.parse_args()
    step = options.size * GIB // options.objects
    # A new object is as long as what was written into it reaches.
    writes = [(n * step // 4096 * 4096, 4096) for n in range(options.objects)]
    with (
        tempfile.TemporaryDirectory() as directory,
        new_pool() as (pool, ioctx),
    ):
        image_of(ioctx, "image", options.size * GIB, writes)
        image, place = f"{pool}/image", pathlib.Path(directory)
        subprocess.run(
            ["rbd", "--id=rw", "snap", "create", "--no-progress", f"{image}@s"], check=True
        )
        with (
            ours(place, image=image) as live,
            ours(place, image=f"{image}@s") as snapshot,
            qemu_nbd(place, image) as theirs,
        ):
            commands = {
                "nbdinfo --map, qemu-nbd": ["nbdinfo", "--map", theirs],
                "nbdinfo --map, rbd_export": ["nbdinfo", "--map", live],
                "nbdinfo --map, rbd_export, snapshot": ["nbdinfo", "--map", snapshot],
                "qemu-img map, qemu-nbd": ["qemu-img", "map", "--output=json", theirs],
                "qemu-img map, rbd_export": ["qemu-img", "map", "--output=json", live],
                "qemu-img map, rbd:": [
                    "qemu-img",
                    "map",
                    "--output=json",
                    "-f",
                    "raw",
                    qemu_rbd(image),
                ],
                "rbd diff": ["rbd", "--id=rw", "diff", image],
                "rbd du": ["rbd", "--id=rw", "du", image],
            }
            medians = measure(options.rounds, commands)
            told = {
                "rbd_export": data(["nbdinfo", "--map", "--json", live]),
                "qemu-nbd": data(["nbdinfo", "--map", "--json", theirs]),
            }
    show(f"the map of {options.size} GiB with {options.objects} written objects", medians)
    for name, size in told.items():
        print(f"{name} calls {size / 1e6:.0f} MB data")


main()
