# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Kill nbdkit, the OSD, or both while clients write, and look for what was promised.

tests/stress/run.sh [ROUNDS]

Each writer logs, outside of what is killed, what each of its blocks may hold: after a
write what it has been since the last flush, after a flush or a write with FUA just what
was written last.  An independent reader (librbd) then looks at every block.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import nbd
from conftest import CACHES, MIB, Cluster, Daemon, Images, Server, wait_until
from tabulate import tabulate

BLOCK = 4096
BLOCKS = 4 * MIB // BLOCK  # of a writer, in an object of its own
GRANULE = 16  # blocks: what librbd discards
WRITERS = 4
FUA = nbd.CMD_FLAG_FUA


def block(value):
    return struct.pack("<Q", value) * (BLOCK // 8)


class Writer:
    """A client that writes to blocks of its own, and knows what they may hold."""

    def __init__(self, number, rng):
        self.offset = number * BLOCKS * BLOCK
        self.rng = rng
        self.value = 0
        self.current = [{0} for _ in range(BLOCKS)]  # as clients read it now
        self.allowed = [{0} for _ in range(BLOCKS)]  # after a crash
        self.acknowledged = 0
        self.longest = 0.0
        self.client = None
        self.error = None

    def run(self, stop):
        self.error = None
        try:
            while not stop.is_set():
                self.step()
        except nbd.Error as error:
            self.error = error

    def step(self):
        begin = time.monotonic()
        self.rng.choices([self.write, self.zero, self.trim, self.flush], [8, 2, 1, 2])[0]()
        self.acknowledged += 1
        self.longest = max(self.longest, time.monotonic() - begin)

    def some_blocks(self, unit=1):
        first = self.rng.randrange(BLOCKS // unit) * unit
        count = self.rng.randint(1, 16) * unit
        return range(first, min(first + count, BLOCKS))

    def send(self, value, blocks, command):
        """Change blocks: until it is answered, each may hold the old or the new."""
        fua = self.rng.choice([0, FUA])
        for number in blocks:
            self.allowed[number].add(value)
        command(self.offset + blocks.start * BLOCK, fua)
        for number in blocks:
            self.current[number] = {value}
            if fua:
                self.allowed[number] = {value}

    def write(self):
        self.value += 1
        blocks = self.some_blocks()
        data = block(self.value) * len(blocks)
        self.send(self.value, blocks, lambda at, fua: self.client.pwrite(data, at, fua))

    def zero(self):
        blocks, hole = self.some_blocks(), self.rng.choice([0, nbd.CMD_FLAG_NO_HOLE])
        length = len(blocks) * BLOCK
        self.send(0, blocks, lambda at, fua: self.client.zero(length, at, fua | hole))

    def trim(self):
        # What it does not free keeps what it had.
        blocks = self.some_blocks(GRANULE)
        for number in blocks:
            self.allowed[number].add(0)
        self.client.trim(len(blocks) * BLOCK, self.offset + blocks.start * BLOCK)
        for number in blocks:
            self.current[number] = self.current[number] | {0}

    def flush(self):
        self.client.flush()
        self.allowed = [set(values) for values in self.current]

    def lost(self, image):
        """Count the blocks that hold what they must not; from here on, all is what it is."""
        content = image.read(self.offset, BLOCKS * BLOCK)
        lost = 0
        for number, allowed in enumerate(self.allowed):
            found = content[number * BLOCK : (number + 1) * BLOCK]
            values = [value for value in allowed if block(value) == found]
            lost += not values
            self.current[number] = self.allowed[number] = set(values) or {0}
        return lost


class Bench:
    """A cluster that survives crashes, an image, its server and its writers."""

    def __init__(self, cluster, directory, seed):
        self.cluster = cluster
        self.directory = pathlib.Path(directory)
        self.rng = random.Random(seed)
        self.images = Images(cluster)
        self.image = self.images.create()
        # Who takes over from a killed client waits until that has lost its lock.
        cluster.ceph("config", "set", "osd", "osd_client_watch_timeout", "5")
        self.server = Server(self.directory, conf=cluster.conf, id="rw", image=self.image.spec)
        self.parameters = self.server.parameters
        self.caches = itertools.cycle(CACHES.values())
        self.writers = [Writer(n, random.Random(self.rng.random())) for n in range(WRITERS)]

    def close(self):
        self.server.stop()
        self.images.close()

    def connect(self):
        # By turns.
        self.server.parameters = self.parameters | next(self.caches)
        self.server.start()
        for writer in self.writers:
            writer.client = self.server.connect()

    @contextlib.contextmanager
    def writing(self):
        stop = threading.Event()
        threads = [threading.Thread(target=writer.run, args=[stop]) for writer in self.writers]
        for thread in threads:
            thread.start()
        try:
            time.sleep(self.rng.uniform(0.1, 1))
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def osd(self):
        return Daemon(self.cluster.directory / "run/osd.0.pid")

    def kill_osd(self):
        self.osd().kill()

    def start_osd(self):
        with (self.cluster.directory / "log/osd.0.out").open("a") as log:
            command = ["ceph-osd", "--conf", self.cluster.conf, "--id", "0"]
            subprocess.run(command, check=True, stdout=log, stderr=log)

    def go_on(self):
        """Each writer gets something done: tell whether all could."""
        with self.writing():
            before = [writer.acknowledged for writer in self.writers]
            wait_until(
                lambda: all(
                    writer.error or writer.acknowledged > was + 5
                    for writer, was in zip(self.writers, before, strict=True)
                )
            )
        return not any(writer.error for writer in self.writers)

    # Each fault leaves the cluster up, and nbdkit with its writers connected.

    def nbdkit_killed(self):
        with self.writing():
            self.server.kill()
        lost = self.lost()
        self.connect()
        return lost

    def osd_killed(self):
        with self.writing():
            self.kill_osd()
            time.sleep(self.rng.uniform(0, 1))
            self.start_osd()
        for writer in self.writers:
            writer.flush()
        return self.lost()

    def both_killed(self):
        with self.writing():
            first, second = self.rng.sample([self.server.kill, self.kill_osd], 2)
            first()
            second()
        self.start_osd()
        lost = self.lost()
        self.connect()
        return lost

    def osd_frozen(self):
        osd = self.osd()
        with self.writing():
            osd.stop()
            time.sleep(self.rng.uniform(0.1, 3))
            osd.resume()
        for writer in self.writers:
            writer.flush()
        return self.lost()

    def lost(self):
        with self.image.open() as image:
            return sum(writer.lost(image) for writer in self.writers)

    def play(self, fault, rounds):
        """Return a line of the table."""
        if self.server.process is None or self.server.process.poll() is not None:
            self.connect()
        before = sum(writer.acknowledged for writer in self.writers)
        for writer in self.writers:
            writer.longest = 0.0
        lost, recovered = 0, True
        for _ in range(rounds):
            lost += FAULTS[fault](self)
            recovered = self.go_on() and recovered
        acknowledged = sum(writer.acknowledged for writer in self.writers) - before
        longest = max(writer.longest for writer in self.writers)
        return fault, rounds, acknowledged, lost, longest, "yes" if recovered else "NO"


FAULTS = {
    "nbdkit killed": Bench.nbdkit_killed,
    "OSD killed": Bench.osd_killed,
    "nbdkit and OSD killed": Bench.both_killed,
    "OSD frozen for up to 3 s": Bench.osd_frozen,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=100, help="for each fault")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    cluster = Cluster(os.environ["CEPH_CONF"])
    cluster.directory = pathlib.Path(cluster.conf).parent
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(cluster, directory, options.seed)
        try:
            for fault in FAULTS:
                rows.append(bench.play(fault, options.rounds))
                print(*rows[-1], flush=True)
        finally:
            bench.close()
            cluster.close()
    headers = ["fault", "rounds", "acknowledged", "lost", "longest wait, s", "recovered"]
    print("\n" + tabulate(rows, headers, floatfmt=".1f"))
    return any(lost or recovered != "yes" for *_, lost, _, recovered in rows)


if __name__ == "__main__":
    sys.exit(main())
