# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Writes that are answered before the cluster has them, and what waits for them.

While the OSD is stopped, what is answered was answered early.  What becomes of such
writes when the cluster refuses them is in test_faults.py, too.
"""

import concurrent.futures
import contextlib
import errno
import random
import re
import signal

import nbd
import pytest
from conftest import (
    MIB,
    OBJECT,
    Images,
    assert_same,
    data_extents,
    failure,
    wait_for_answers,
    wait_until,
    wait_until_it_works,
)

FUA = nbd.CMD_FLAG_FUA

# Time enough for an answer that must not come.
MOMENT = 1000


def write(client, data, offset, flags=0):
    return client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, flags=flags)


def status(client, offset, length):
    return client.aio_block_status(length, offset, lambda *_: 0)


def read(client, offset, length):
    return client.aio_pread(nbd.Buffer(length), offset)


# What waits for an early write to the same bytes, and how to ask for it.
WAITING = {
    "read": lambda client, offset: read(client, offset, 4096),
    "read of half": lambda client, offset: read(client, offset + 2048, 4096),
    "block status": lambda client, offset: status(client, offset, 4096),
    "write with FUA": lambda client, offset: write(client, b"f" * 4096, offset, FUA),
    "write": lambda client, offset: write(client, b"w" * 4096, offset + 2048),
    "trim": lambda client, offset: client.aio_trim(64 << 10, offset),
    "zero": lambda client, offset: client.aio_zero(4096, offset),
    "flush": lambda client, _: client.aio_flush(),
}


def unanswered(client):
    """Tell whether nothing is answered although there was time enough."""
    waiting = client.aio_in_flight()
    client.poll(MOMENT)
    return waiting and client.aio_in_flight() == waiting


def assert_a_write_waits(server, client, flags=0):
    """It is answered when the OSD goes on, and not before."""
    server.osd.stop()
    write(client, b"n" * 4096, 0, flags)
    assert unanswered(client)
    server.osd.resume()
    wait_for_answers(client)


@pytest.fixture
def server(server):
    server.parameters["write-cache"] = "yes"
    return server


@pytest.fixture
def stoppable(stoppable):
    stoppable.parameters["write-cache"] = "yes"
    return stoppable


@pytest.fixture
def flushed(stoppable):
    """Two clients of an image with an object at 0, after a flush."""
    first, second = stoppable.start().connect(), stoppable.connect()
    first.pwrite(b"o" * OBJECT, 0)
    first.flush()
    return first, second


# ---- what is answered when ---------------------------------------------------


def test_before_the_first_flush_a_write_waits_for_the_cluster(stoppable):
    client = stoppable.start().connect()
    client.pwrite(b"o" * 4096, 0)
    assert_a_write_waits(stoppable, client)


def test_after_a_flush_of_any_client_writes_are_answered_before_the_cluster_has_them(
    stoppable, flushed
):
    stoppable.osd.stop()
    for number, client in enumerate(flushed):
        client.pwrite(b"n" * 4096, number * MIB)
    stoppable.osd.resume()
    flushed[0].flush()
    stoppable.kill()
    for number in range(2):
        assert stoppable.image.read(number * MIB, 4096) == b"n" * 4096


@pytest.mark.parametrize("what", WAITING)
@pytest.mark.parametrize("whose", ["same connection", "another"])
def test_what_meets_an_early_write_waits_for_it(stoppable, flushed, what, whose):
    writer, other = flushed
    stoppable.osd.stop()
    writer.pwrite(b"n" * 4096, MIB)
    asker = writer if whose == "same connection" else other
    WAITING[what](asker, MIB)
    assert unanswered(asker)
    stoppable.osd.resume()
    wait_for_answers(asker)


def test_a_write_with_fua_waits_for_the_cluster(stoppable, flushed):
    assert_a_write_waits(stoppable, flushed[0], FUA)
    stoppable.kill()
    assert stoppable.image.read(0, 4096) == b"n" * 4096


def test_a_read_elsewhere_does_not_wait_for_an_early_write(stoppable, flushed):
    writer, other = flushed
    # What does not exist is known to the object map without the OSD.
    assert other.pread(4096, 32 * MIB) == bytes(4096)
    stoppable.osd.stop()
    writer.pwrite(b"n" * 4096, 0)
    assert other.pread(4096, 32 * MIB) == bytes(4096)
    stoppable.osd.resume()


def test_a_flush_without_changes_does_not_wait_for_the_cluster(stoppable, flushed):
    first, second = flushed
    stoppable.osd.stop()
    first.flush()
    second.flush()
    first.pwrite(b"n", 0)
    first.aio_flush()
    second.aio_flush()
    assert unanswered(first)
    assert unanswered(second)
    stoppable.osd.resume()
    wait_for_answers(first)
    wait_for_answers(second)
    stoppable.osd.stop()
    first.flush()


def test_no_more_than_8_mib_are_under_way(stoppable, flushed):
    client, _ = flushed
    client.set_strict_mode(0)
    stoppable.osd.stop()
    cookies = [write(client, bytes([number]) * MIB, number * MIB) for number in range(1, 33)]

    def answered():
        while client.poll(MOMENT):
            pass
        return len(cookies) - client.aio_in_flight()

    assert 8 <= answered() <= 9
    stoppable.osd.resume()
    wait_for_answers(client)
    client.flush()
    stoppable.kill()
    for number in range(1, 33):
        assert_same(stoppable.image.read(number * MIB, MIB), bytes([number]) * MIB)


# ---- what is there afterwards ------------------------------------------------


def resumed(server, client, ask):
    """Ask while the OSD is stopped, and let it go on."""
    cookie = ask()
    client.poll(0)
    server.osd.resume()
    wait_for_answers(client)
    assert client.aio_command_completed(cookie)


@pytest.mark.parametrize("reader", [0, 1], ids=["same connection", "another"])
def test_a_read_returns_what_was_written_early(stoppable, flushed, reader):
    buffer = nbd.Buffer(8192)
    stoppable.osd.stop()
    flushed[0].pwrite(b"n" * 4096, MIB)
    client = flushed[reader]
    resumed(stoppable, client, lambda: client.aio_pread(buffer, MIB + 2048))
    assert buffer.to_bytearray() == b"n" * 2048 + b"o" * 6144


def test_the_last_of_several_early_writes_over_each_other_counts(server, image):
    writer, reader = server.start().connect(), server.connect()
    writer.flush()
    expected = bytearray(64 << 10)
    for round in range(40):
        for number in range(8):
            data, offset = bytes([round * 6 + number + 1]) * 8192, number * 5000
            writer.pwrite(data, offset)
            expected[offset : offset + 8192] = data
        assert_same(reader.pread(30_000, 100), expected[100:30_100])
    assert_same(reader.pread(64 << 10, 0), expected)
    reader.flush()
    server.kill()
    assert_same(image.read(0, 64 << 10), expected)


def test_where_a_hole_was_written_early_block_status_says_data(server):
    writer, other = server.start().connect(), server.connect()
    writer.flush()
    for number in range(1, 15):
        assert data_extents(other, number * OBJECT, OBJECT) == []
        writer.pwrite(b"n" * 4096, number * OBJECT)
        assert data_extents(other, number * OBJECT, 4096) == [(number * OBJECT, 4096)]


@pytest.mark.parametrize("command", ["trim", "zero"])
def test_trim_and_zero_come_after_an_early_write(server, image, command):
    writer, other = server.start().connect(), server.connect()
    writer.pwrite(b"o" * OBJECT, 0)
    writer.flush()
    for number in range(32):
        offset = number * 128 << 10
        writer.pwrite(b"n" * (64 << 10), offset)
        getattr(other, command)(64 << 10, offset)
    assert other.pread(64 << 10, 0) == bytes(64 << 10)
    writer.flush()
    server.kill()
    expected = (bytes(64 << 10) + b"o" * (64 << 10)) * 32
    assert_same(image.read(0, OBJECT), expected)


def test_a_flush_covers_the_early_writes_of_every_connection(server, image):
    clients = [server.start().connect(), *(server.connect() for _ in range(3))]
    clients[0].flush()
    for round in range(10):
        for number, client in enumerate(clients[1:]):
            for block in range(20):
                data = bytes([round * 3 + number + 1]) * 4096
                client.pwrite(data, (number * 20 + block) * 100_000)
        clients[0].flush()
    server.kill()
    for number in range(3):
        for block in range(20):
            offset = (number * 20 + block) * 100_000
            assert_same(image.read(offset, 4096), bytes([27 + number + 1]) * 4096)


@pytest.mark.parametrize("options", [{}, {"ceph.rbd_cache_policy": "writeback"}], ids=str)
def test_each_flush_covers_what_was_changed_since_the_last_one(servers, image, options):
    server = servers(image, **{"write-cache": "yes"}, **options)
    client = server.start().connect()
    for round in range(3):
        client.pwrite(bytes([round + 1]) * 8192, round * MIB)
        client.zero(4096, round * MIB)
        client.flush()
    server.kill()
    for round in range(3):
        assert image.read(round * MIB, 8192) == bytes(4096) + bytes([round + 1]) * 4096


def test_flushes_at_the_same_time_all_hold_their_promise(stoppable, flushed):
    """What is written while a flush runs is not covered by it, but by the writer's own."""
    early, late = flushed
    stoppable.osd.stop()
    early.pwrite(b"1" * 4096, 0)
    early.aio_flush()
    assert unanswered(early)
    late.pwrite(b"2" * 4096, MIB)
    late.aio_flush()
    assert unanswered(late)
    stoppable.osd.resume()
    wait_for_answers(late)
    stoppable.kill()
    assert stoppable.image.read(0, 4096) == b"1" * 4096
    assert stoppable.image.read(MIB, 4096) == b"2" * 4096


def test_a_flush_is_not_answered_with_one_that_was_under_way(stoppable, flushed, private_cluster):
    """What the second one covers fails: where the image ended since, nothing can be written."""
    first, second = flushed
    shrink = ["resize", "--no-progress", "--allow-shrink", "--size=16M"]
    private_cluster.rbd(*shrink, stoppable.image.spec)
    stoppable.osd.stop()
    first.pwrite(b"1" * 4096, 0)
    flushes = [first.aio_flush()]
    assert unanswered(first)
    second.pwrite(b"2" * 4096, 32 * MIB)
    flushes.append(second.aio_flush())
    assert unanswered(second)
    stoppable.osd.resume()
    wait_for_answers(first)
    wait_for_answers(second)
    assert first.aio_command_completed(flushes[0])
    assert failure(second.aio_command_completed, flushes[1]) == errno.EIO


def test_writers_that_flush_at_the_same_time_all_hold_their_promise(server, image):
    count = 8
    server.start()
    server.connect().flush()
    promised = [0] * count
    enough = 400

    def use(number):
        client = server.connect()
        with contextlib.suppress(nbd.Error):  # killed
            for value in range(1, 100_000):
                client.pwrite(value.to_bytes(8, "big") * 512, number * MIB)
                client.flush()
                promised[number] = value

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        users = [pool.submit(use, number) for number in range(count)]
        try:
            wait_until(lambda: sum(promised) > enough or any(user.done() for user in users))
        finally:
            server.kill()
        for user in users:
            user.result()
    assert min(promised)
    for number in range(count):
        found = image.read(number * MIB, 4096)
        assert int.from_bytes(found[:8], "big") >= promised[number]


@pytest.mark.parametrize("seed", range(3))
def test_with_many_writes_under_way_each_byte_ends_as_it_was_written_last(server, image, seed):
    """Each connection has an area of its own, and sends nothing over what is not answered."""
    area, count = 2 * MIB, 6
    server.start()
    server.connect().flush()

    def use(number):
        choice = random.Random(f"{seed} {number}")
        client, start = server.connect(), number * area
        expected = bytearray(area)
        waiting = {}
        for _ in range(300):
            length = min(int(choice.paretovariate(0.4) * 50), 300_000)
            offset = choice.randrange(area - length)
            for cookie, (low, high) in list(waiting.items()):
                if low < offset + length and offset < high:
                    while not client.aio_command_completed(cookie):
                        client.poll(-1)
                    del waiting[cookie]
            kind = choice.random()
            if kind < 0.8:
                data = choice.randbytes(length)
                cookie = write(client, data, start + offset, choice.choice([0, 0, 0, FUA]))
            elif kind < 0.9:
                data = bytes(length)
                cookie = client.aio_zero(length, start + offset)
            else:
                data = client.pread(length, start + offset)
                assert_same(data, expected[offset : offset + length])
                continue
            expected[offset : offset + length] = data
            waiting[cookie] = offset, offset + length
        wait_for_answers(client)
        assert_same(client.pread(area, start), expected)
        client.flush()
        return expected

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        areas = list(pool.map(use, range(count)))
    server.kill()
    assert_same(image.read(0, count * area), b"".join(areas))


@pytest.mark.parametrize("end", ["SIGTERM", "disconnect"])
def test_at_a_clean_end_nothing_that_was_answered_is_lost(server, image, end):
    client = server.start().connect()
    client.flush()
    for number in range(200):
        client.pwrite(bytes([number + 1]) * 65536, number * 200_000)
    if end == "disconnect":
        client.shutdown()
        wait_until(lambda: not image.watchers())
        server.kill()
    else:
        server.end(signal.SIGTERM)
        assert server.process.returncode == 0
    for number in range(200):
        assert_same(image.read(number * 200_000, 65536), bytes([number + 1]) * 65536)
    assert "is lost" not in server.log()


# ---- when it goes wrong ------------------------------------------------------


def test_no_read_returns_what_was_there_before_an_early_write_that_failed(stoppable):
    stoppable.parameters["io-timeout"] = 1
    client, other = stoppable.start().connect(), stoppable.connect()
    client.pwrite(b"o" * 8192, 0)
    client.flush()
    stoppable.osd.stop()
    client.pwrite(b"n" * 4096, 0)
    assert failure(client.flush) == errno.EIO  # it has failed
    for reader in (client, other):
        assert failure(reader.pread, 4096, 2048) == errno.EIO
    stoppable.osd.resume()

    def right():
        """The new data as soon as there is an answer."""
        assert other.pread(8192, 0) == b"n" * 4096 + b"o" * 4096

    wait_until_it_works(right)


def test_flushes_at_the_same_time_all_fail_if_a_write_has_failed(stoppable):
    stoppable.parameters["io-timeout"] = 2
    clients = [stoppable.start().connect(), *(stoppable.connect() for _ in range(3))]
    clients[0].flush()
    stoppable.osd.stop()
    for number, client in enumerate(clients):
        client.pwrite(b"n" * 4096, number * MIB)
    flushes = [client.aio_flush() for client in clients]
    for client, flush in zip(clients, flushes, strict=True):
        wait_for_answers(client)
        assert failure(client.aio_command_completed, flush) == errno.EIO


def test_what_is_lost_at_the_end_is_logged(stoppable):
    stoppable.parameters["io-timeout"] = 1
    client = stoppable.start().connect()
    client.pwrite(b"o" * 4096, 0)
    client.flush()
    stoppable.osd.stop()
    client.pwrite(b"n" * 4096, 8192)
    client.shutdown()
    lost = rf"image '{re.escape(stoppable.image.spec)}': 1 writes that were not flushed are lost: "
    wait_until(lambda: re.search(f"{lost}.*timeout", stoppable.log()))


# ---- where it is off ---------------------------------------------------------


def test_without_the_write_cache_every_write_waits_for_the_cluster(stoppable):
    stoppable.parameters["write-cache"] = "no"
    client = stoppable.start().connect()
    client.pwrite(b"o" * 4096, 0)
    client.flush()
    assert_a_write_waits(stoppable, client)


def test_a_clone_of_a_clone_has_no_write_cache(stoppable, private_cluster):
    images = Images(private_cluster)
    try:
        image = stoppable.image
        for _ in range(2):
            image.snap("s", protect=True)
            image = images.clone(image, "s")
        stoppable.parameters["image"] = image.spec
        client = stoppable.start().connect()
        client.pwrite(b"o" * 4096, 0)
        client.flush()
        assert_a_write_waits(stoppable, client)
        stoppable.stop()
    finally:
        stoppable.osd.resume()
        images.close()


def test_a_read_only_export_refuses_writes_after_a_flush_too(server, image):
    server.options = ["-r"]
    client = server.start().connect()
    client.flush()
    assert failure(client.pwrite, b"n", 0) == errno.EPERM
    assert client.pread(1, 0) == b"\0"
    assert image.read(0, 1) == b"\0"
