# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""What is written is what is read, at every edge and behind the export."""

import errno
import random
import subprocess

import nbd
import pytest
from conftest import GIB, MIB, OBJECT, PATIENCE, assert_same

FUA = nbd.CMD_FLAG_FUA
NO_HOLE = nbd.CMD_FLAG_NO_HOLE
FAST_ZERO = nbd.CMD_FLAG_FAST_ZERO

POLICIES = ["writearound", "writeback"]

# librbd acknowledges a write before it is safe, and keeps it as long as it can.
LAZY = {
    "ceph.rbd_cache_writethrough_until_flush": "false",
    "ceph.rbd_cache_max_dirty_age": "1000",
}


def pattern(length, seed=1):
    return random.Random(seed).randbytes(length)


# ---- reading and writing -----------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (0, 512),
        (1, 1),
        (511, 2),
        (OBJECT - 1, 1),
        (OBJECT - 1, 2),
        (OBJECT, 1),
        (OBJECT - 3, 2 * OBJECT + 7),
        (64 * MIB - 1, 1),
        (64 * MIB - 4097, 4097),
        (0, 32 * MIB + 1),
        (0, 64 * MIB),
    ],
)
def test_what_is_written_is_read_by_both_sides(server, image, offset, length):
    data = pattern(length)
    client = server.start().connect()
    client.pwrite(data, offset)
    assert_same(client.pread(length, offset), data)
    client.flush()
    assert_same(image.read(offset, length), data)
    whole = image.read(0, 64 * MIB)
    assert_same(whole[offset : offset + length], data)
    assert not any(whole[:offset])
    assert not any(whole[offset + length :])


def test_what_librbd_writes_is_read_through_the_export(server, image, cluster, tmp_path):
    data = pattern(64 * MIB)
    source = tmp_path / "source"
    source.write_bytes(data)
    image.write(data[: OBJECT + 3], 0)
    client = server.start().connect()
    assert_same(client.pread(OBJECT + 3, 0), data[: OBJECT + 3])
    image.write(data[OBJECT + 3 :], OBJECT + 3)
    assert_same(client.pread(64 * MIB, 0), data)


def test_what_is_written_is_in_rbd_export(server, image, cluster):
    data = pattern(64 * MIB)
    client = server.start().connect()
    client.pwrite(data, 0)
    client.flush()
    assert_same(cluster.rbd("export", "--no-progress", image.spec, "-"), data)


def test_nbdcopy_copies_in_and_out(server, image, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    data = bytearray(64 * MIB)
    for place in range(0, 64 * MIB, 7 * MIB):
        data[place : place + 100_000] = pattern(100_000, place)
    source.write_bytes(data)
    server.start()
    uri = f"nbd+unix://?socket={server.socket}"
    subprocess.run(["nbdcopy", "--flush", source, uri], check=True)
    subprocess.run(["nbdcopy", uri, target], check=True)
    assert_same(target.read_bytes(), data)
    assert_same(image.read(0, 64 * MIB), data)


@pytest.mark.parametrize("command", ["pread", "pwrite", "trim", "zero"])
def test_a_request_past_the_end_fails_and_changes_nothing(server, image, command):
    image.write(b"e" * 4096, 64 * MIB - 4096)
    client = server.start().connect()
    requests = {
        "pread": lambda: client.pread(4096, 64 * MIB - 4095),
        "pwrite": lambda: client.pwrite(b"x" * 4096, 64 * MIB - 4095),
        "trim": lambda: client.trim(65536, 64 * MIB - 65535),
        "zero": lambda: client.zero(4096, 64 * MIB - 4095),
    }
    with pytest.raises(nbd.Error) as failure:
        requests[command]()
    # The NBD specification lets a server answer either for a write past the end.
    assert failure.value.errnum in (errno.EINVAL, errno.ENOSPC)
    assert_same(client.pread(4096, 64 * MIB - 4096), b"e" * 4096)


def test_a_read_beyond_a_shrunk_image_fails_and_the_rest_goes_on(server, image):
    client = server.start().connect()
    # The owner of the exclusive lock has heard of a resize when it returns.
    client.pwrite(b"r" * 4096, 0)
    assert_same(client.pread(4096, 48 * MIB), bytes(4096))
    with image.open() as opened:
        opened.resize(32 * MIB)
    for offset in (48 * MIB, 32 * MIB - 2048):
        with pytest.raises(nbd.Error) as failure:
            client.pread(4096, offset)
        assert failure.value.errnum == errno.EIO
    with pytest.raises(nbd.Error) as failure:
        client.pwrite(b"x" * 4096, 48 * MIB)
    assert failure.value.errnum == errno.EIO
    assert_same(client.pread(4096, 0), b"r" * 4096)


# ---- stable storage ----------------------------------------------------------


def change_pwrite(client, flags):
    client.pwrite(b"n" * 200_000, OBJECT - 100_000, flags)


def change_trim(client, flags):
    client.trim(2 * OBJECT, 0, flags)


def change_zero(client, flags):
    client.zero(200_001, OBJECT - 100_000, flags)


def change_thick_zero(client, flags):
    client.zero(200_001, OBJECT - 100_000, flags | NO_HOLE)


CHANGES = [change_pwrite, change_trim, change_zero, change_thick_zero]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[7:])
@pytest.mark.parametrize("promise", ["fua", "flush"])
def test_what_was_promised_survives_sigkill(servers, image, policy, change, promise):
    """The reply is the promise: nothing that nbdkit still does counts."""
    image.write(b"o" * 2 * OBJECT, 0)
    server = servers(image, **{"ceph.rbd_cache_policy": policy}, **LAZY).start()
    client = server.connect()
    change(client, FUA if promise == "fua" else 0)
    if promise == "flush":
        client.flush()
    server.kill()
    expected = bytearray(b"o" * 2 * OBJECT)
    if change is change_pwrite:
        expected[OBJECT - 100_000 : OBJECT + 100_000] = b"n" * 200_000
    elif change is change_trim:
        expected[:] = bytes(2 * OBJECT)
    else:
        expected[OBJECT - 100_000 : OBJECT + 100_001] = bytes(200_001)
    assert_same(image.read(0, 2 * OBJECT), expected)


def test_an_unflushed_write_may_die_with_nbdkit(servers, image):
    """Shows that the test above can fail: without a promise, writeback loses data."""
    server = servers(image, **{"ceph.rbd_cache_policy": "writeback"}, **LAZY).start()
    client = server.connect()
    client.pwrite(b"n" * 4096, 0)
    server.kill()
    assert_same(image.read(0, 4096), bytes(4096))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_flush_covers_the_writes_of_every_connection(servers, image, policy):
    server = servers(image, **{"ceph.rbd_cache_policy": policy}, **LAZY).start()
    a, b, c = (server.connect() for _ in range(3))
    for block in range(100):
        a.pwrite(bytes([block]) * 4096, block * 100_000)
    assert c.pread(4096, 50 * 100_000) == bytes([50]) * 4096
    b.flush()
    server.kill()
    for block in range(100):
        assert_same(image.read(block * 100_000, 4096), bytes([block]) * 4096)


# ---- trim and zero -----------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (1, 511),
        (4095, 2),
        (OBJECT - 1, 2),
        (3, OBJECT),
        (OBJECT, OBJECT),
        (5, 20 * MIB + 9),
    ],
)
@pytest.mark.parametrize("flags", [0, NO_HOLE], ids=["thin", "thick"])
def test_zero_zeroes_exactly_its_range(server, image, offset, length, flags):
    data = bytearray(pattern(32 * MIB))
    image.write(bytes(data), 0)
    client = server.start().connect()
    client.zero(length, offset, flags)
    data[offset : offset + length] = bytes(length)
    assert_same(client.pread(32 * MIB, 0), data)
    client.flush()
    assert_same(image.read(0, 32 * MIB), data)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (1, 65536), (OBJECT, OBJECT), (5, 20 * MIB + 9)]
)
def test_trim_leaves_old_data_or_zeroes_and_nothing_outside(server, image, offset, length):
    data = pattern(32 * MIB)
    image.write(data, 0)
    client = server.start().connect()
    client.trim(length, offset)
    after = client.pread(32 * MIB, 0)
    assert_same(after[:offset], data[:offset])
    assert_same(after[offset + length :], data[offset + length :])
    block = 4096
    for start in range(offset, offset + length, block):
        piece = after[start : min(start + block, offset + length)]
        original = data[start : start + len(piece)]
        assert all(new in (0, old) for new, old in zip(piece, original, strict=True))


def test_trim_frees_space(server, image):
    image.write(pattern(32 * MIB), 0)
    client = server.start().connect()
    client.trim(16 * MIB, 0)
    client.flush()
    assert image.used() == 16 * MIB


def test_zero_frees_space_unless_the_client_forbids_holes(servers, images):
    for flags, used in (0, 16 * MIB), (NO_HOLE, 32 * MIB):
        image = images.create()
        image.write(pattern(32 * MIB), 0)
        client = servers(image).start().connect()
        client.zero(16 * MIB, 0, flags)
        client.flush()
        assert image.used() == used


def test_thick_zeroes_allocate_space_that_was_free(server, image):
    client = server.start().connect()
    client.zero(16 * MIB, 0, NO_HOLE)
    client.flush()
    assert image.used() == 16 * MIB


@pytest.mark.parametrize("command", ["trim", "zero"])
@pytest.mark.parametrize("length", [3 * GIB, 4 * GIB - 1])
def test_trim_and_zero_of_gigabytes_in_one_request(servers, images, command, length):
    image = images.create(6 * GIB)
    marks = list(range(0, 6 * GIB, GIB // 2))
    for place in marks:
        image.write(b"m" * OBJECT, place)
    client = servers(image).start().connect()
    getattr(client, command)(length, 100, FUA)
    for place in marks:
        expected = bytearray(b"m" * OBJECT)
        low, high = max(100 - place, 0), min(100 + length - place, OBJECT)
        if high > low:
            expected[low:high] = bytes(high - low)
        actual = image.read(place, OBJECT)
        if command == "trim" and 0 < low < OBJECT:
            # What is less than a discard granule stays.
            assert_same(actual[65536:], expected[65536:])
        elif command == "trim" and 0 < high < OBJECT:
            granule = max(0, high - 65536)
            assert_same(actual[:granule], expected[:granule])
        else:
            assert_same(actual, expected)


def test_a_thick_zero_of_more_than_a_gigabyte_in_one_request(servers, images):
    image = images.create(2 * GIB)
    image.write(b"m" * OBJECT, GIB - OBJECT // 2)
    image.write(b"m" * 8192, GIB + 16 * MIB - 4096)
    client = servers(image).start().connect()
    client.zero(GIB + 16 * MIB, 0, NO_HOLE | FUA)
    assert_same(image.read(GIB - OBJECT // 2, OBJECT), bytes(OBJECT))
    assert_same(image.read(GIB + 16 * MIB - 4096, 8192), bytes(4096) + b"m" * 4096)
    assert image.used() == GIB + 16 * MIB + 4096


def test_fast_zero_is_refused_where_zeroes_would_be_written(server, image):
    image.write(b"o" * OBJECT, 0)
    client = server.start().connect()
    client.zero(OBJECT // 2, 0, FAST_ZERO)
    assert_same(client.pread(OBJECT // 2, 0), bytes(OBJECT // 2))
    with pytest.raises(nbd.Error) as refusal:
        client.zero(OBJECT // 2, OBJECT // 2, FAST_ZERO | NO_HOLE)
    assert refusal.value.errnum == errno.ENOTSUP
    assert_same(client.pread(OBJECT // 2, OBJECT // 2), b"o" * (OBJECT // 2))
    server.stop()
    assert "error" not in server.log()


# ---- clones ------------------------------------------------------------------


@pytest.fixture
def clone(images):
    """A clone whose parent has data in [0, 16 MiB), and whose own is in [4, 5 MiB)."""
    parent = images.create(32 * MIB)
    parent.write(pattern(16 * MIB), 0)
    parent.snap("s", protect=True)
    clone = images.clone(parent, "s")
    clone.write(b"c" * MIB, 4 * MIB)
    clone.content = bytearray(pattern(16 * MIB) + bytes(16 * MIB))
    clone.content[4 * MIB : 5 * MIB] = b"c" * MIB
    return clone


@pytest.mark.parametrize("flags", [0, NO_HOLE], ids=["thin", "thick"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 4 * MIB), (1, 5), (3 * MIB, 2 * MIB), (7, 14 * MIB), (15 * MIB, 8 * MIB), (0, 32 * MIB)],
)
def test_zero_on_a_clone_hides_the_parent(servers, clone, offset, length, flags):
    client = servers(clone).start().connect()
    assert_same(client.pread(32 * MIB, 0), clone.content)
    client.zero(length, offset, flags | FUA)
    clone.content[offset : offset + length] = bytes(length)
    assert_same(client.pread(32 * MIB, 0), clone.content)
    assert_same(clone.read(0, 32 * MIB), clone.content)


def test_trim_on_a_clone_never_brings_the_parent_back(servers, clone):
    client = servers(clone).start().connect()
    client.zero(8 * MIB, 0)
    client.trim(12 * MIB, 0)
    assert_same(client.pread(8 * MIB, 0), bytes(8 * MIB))
    assert_same(clone.read(16 * MIB, 16 * MIB), bytes(16 * MIB))


def test_a_write_to_a_clone_keeps_the_parent_around_it(servers, clone):
    client = servers(clone).start().connect()
    client.pwrite(b"w" * 1000, 8 * MIB + 5)
    clone.content[8 * MIB + 5 : 8 * MIB + 1005] = b"w" * 1000
    assert_same(client.pread(32 * MIB, 0), clone.content)


# ---- the end -----------------------------------------------------------------


@pytest.mark.parametrize("clients", [0, 1, 3])
def test_sigterm_ends_nbdkit_and_keeps_what_was_acknowledged(servers, image, clients):
    server = servers(image, **{"ceph.rbd_cache_policy": "writeback"}, **LAZY).start()
    connected = [server.connect() for _ in range(clients)]
    for number, client in enumerate(connected):
        client.pwrite(bytes([number + 1]) * 4096, number * MIB)
    server.process.terminate()
    # The promise is 2 s; the machine may be busy.
    assert server.process.wait(10) == 0
    assert image.watchers() == []
    for number in range(clients):
        assert_same(image.read(number * MIB, 4096), bytes([number + 1]) * 4096)


def test_sigterm_answers_the_requests_that_are_under_way(server, image):
    client = server.start().connect()
    buffers = [nbd.Buffer(MIB) for _ in range(8)]
    cookies = [client.aio_pread(buffer, 0) for buffer in buffers]
    while client.aio_in_flight() and not client.aio_peek_command_completed():
        client.poll(-1)
    server.process.terminate()
    while client.aio_in_flight():
        client.poll(PATIENCE * 1000)
    assert any(client.aio_command_completed(cookie) for cookie in cookies)
    assert server.process.wait(10) == 0
