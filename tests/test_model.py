# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Random use, compared with a model that is simply an array of bytes."""

import contextlib
import random
import threading

import nbd
import pytest
from conftest import CACHES, MIB, Images, Server, assert_same, unique
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

FUA = nbd.CMD_FLAG_FUA
NO_HOLE = nbd.CMD_FLAG_NO_HOLE


def test_sixteen_threads_of_random_reads_and_writes_match_a_model(server, image):
    """Each thread owns every sixteenth block, and reads all of them at the end."""
    threads, blocks, size = 16, 1024, 4096
    server.start()
    clients = [server.connect() for _ in range(4)]
    model = [bytes(size)] * blocks
    wrong = []

    def use(number):
        dice = random.Random(number)
        client = nbd.NBD()
        client.connect_unix(str(server.socket))
        for _ in range(300):
            block = dice.randrange(blocks // threads) * threads + number
            if dice.random() < 0.5:
                if client.pread(size, block * size) != model[block]:
                    wrong.append(block)
            else:
                data = dice.randbytes(size)
                client.pwrite(data, block * size, FUA if dice.random() < 0.1 else 0)
                model[block] = data
            if dice.random() < 0.05:
                client.flush()
        client.shutdown()

    workers = [threading.Thread(target=use, args=[number]) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert_same(clients[0].pread(blocks * size, 0), b"".join(model))
    clients[1].flush()
    assert_same(image.read(0, blocks * size), b"".join(model))


SIZE = 6 * MIB + 1234  # objects of 1 MiB, the last of them in part
offsets = st.one_of(
    st.integers(0, SIZE - 1),
    # What goes wrong goes wrong at the edges.
    st.builds(
        lambda edge, distance: max(0, min(SIZE - 1, edge + distance)),
        st.sampled_from([0, 65536, MIB, 2 * MIB, 5 * MIB, SIZE]),
        st.integers(-3, 3),
    ),
)
lengths = st.one_of(st.integers(1, 70000), st.integers(1, 3 * MIB))
connections = st.integers(0, 1)
bits = st.integers(0, 255)
fua = st.sampled_from([0, FUA])


class Export(RuleBasedStateMachine):
    """All commands over two connections of one export, against a bytearray."""

    server_factory = None
    images = None

    @initialize(cloned=st.booleans(), cache=st.sampled_from([*CACHES.values()]))
    def start(self, cloned, cache):
        self.image = self.images.create(SIZE, order=20)
        self.content = bytearray(SIZE)
        if cloned:
            parent = self.image
            data = random.Random(1).randbytes(2 * MIB)
            parent.write(data, MIB // 2)
            parent.snap("s", protect=True)
            self.image = self.images.clone(parent, "s", order=20)
            self.content[MIB // 2 : MIB // 2 + 2 * MIB] = data
        self.server = self.server_factory(self.image, **cache).start()
        self.clients = [self.server.connect(), self.server.connect()]

    @rule(which=connections, offset=offsets, length=lengths)
    def read(self, which, offset, length):
        length = min(length, SIZE - offset)
        assert_same(
            self.clients[which].pread(length, offset), self.content[offset : offset + length]
        )

    @rule(which=connections, offset=offsets, length=lengths, value=bits, flags=fua)
    def write(self, which, offset, length, value, flags):
        length = min(length, SIZE - offset)
        data = random.Random(value).randbytes(length)
        self.clients[which].pwrite(data, offset, flags)
        self.content[offset : offset + length] = data

    @rule(which=connections, offset=offsets, length=lengths, flags=fua, hole=st.booleans())
    def zero(self, which, offset, length, flags, hole):
        length = min(length, SIZE - offset)
        self.clients[which].zero(length, offset, flags | (0 if hole else NO_HOLE))
        self.content[offset : offset + length] = bytes(length)

    @rule(which=connections, offset=offsets, length=lengths, flags=fua)
    def trim(self, which, offset, length, flags):
        length = min(length, SIZE - offset)
        self.clients[which].trim(length, offset, flags)
        now = self.clients[which].pread(length, offset)
        before = self.content[offset : offset + length]
        assert all(new in (0, old) for new, old in zip(now, before, strict=True))
        self.content[offset : offset + length] = now

    @rule(which=connections)
    def flush(self, which):
        self.clients[which].flush()
        assert_same(self.image.read(0, SIZE), self.content)

    @rule(which=connections)
    def reconnect(self, which):
        self.clients[which].shutdown()
        self.clients[which] = self.server.connect()

    @rule()
    def kill_after_flush(self):
        self.clients[0].flush()
        killed = [watcher["addr"] for watcher in self.image.watchers()]
        self.server.kill()
        assert_same(self.image.read(0, SIZE), self.content)
        with contextlib.ExitStack() as stack:
            # The exclusive lock of the dead would be respected for half a minute.
            for address in killed:
                stack.enter_context(self.image.cluster.blocklisted(address))
            self.server.start()
            self.clients = [self.server.connect(), self.server.connect()]
            self.clients[0].pwrite(bytes(self.content[:1]), 0)

    @rule(which=connections, offset=offsets, length=lengths)
    def map(self, which, offset, length):
        length = min(length, SIZE - offset)

        def check(_context, start, entries, _error):
            for size, flags in zip(entries[::2], entries[1::2], strict=True):
                if flags == 3:
                    assert not any(self.content[start : start + size])
                else:
                    assert flags == 0
                start += size

        self.clients[which].block_status(length, offset, check)

    @invariant()
    def the_server_runs(self):
        assert self.server.process.poll() is None

    def teardown(self):
        if hasattr(self, "server"):
            self.server.stop()
        for image in reversed(self.images.made.copy()):
            self.images.remove(image)


@pytest.mark.timeout(600)
def test_any_sequence_of_commands_matches_a_model(cluster, tmp_path):
    directory = tmp_path

    def server_factory(image, **parameters):
        place = directory / unique("server")
        place.mkdir()
        return Server(place, conf=cluster.conf, id="rw", image=image.spec, **parameters)

    machine = type(
        "Machine",
        (Export,),
        {"server_factory": staticmethod(server_factory), "images": Images(cluster)},
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=20,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
