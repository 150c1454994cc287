# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Block status: data is never called a hole, and what is free is called one."""

import nbd
import pytest
from conftest import GIB, MIB, OBJECT, data_extents, extents, in_blocks

HOLE_AND_ZERO = 3


def test_an_empty_image_is_one_hole(server):
    client = server.start().connect()
    assert extents(client, 0, 64 * MIB) == [(0, 64 * MIB, HOLE_AND_ZERO)]


def test_a_full_image_is_one_piece_of_data(server, image):
    image.write(b"x" * 64 * MIB, 0)
    client = server.start().connect()
    assert extents(client, 0, 64 * MIB) == [(0, 64 * MIB, 0)]


@pytest.mark.parametrize(
    "features",
    [1, 1 | 4, 1 | 4 | 8, 1 | 4 | 8 | 16],
    ids=["layering", "exclusive-lock", "object-map", "fast-diff"],
)
@pytest.mark.parametrize("stripes", [1, 3])
@pytest.mark.parametrize("mode", ["writable", "read-only", "snapshot"])
def test_extents_are_those_of_rbd_diff(servers, images, features, stripes, mode):
    striping = {"stripe_unit": 65536, "stripe_count": stripes} if stripes > 1 else {}
    image = images.create(200 * MIB + 1000, features=features, **striping)
    for offset, length in [
        (0, 1),
        (5 * OBJECT - 3, 7),
        (9 * OBJECT + 4096, 8192),
        (20 * OBJECT, 3 * OBJECT),
        (200 * MIB, 1000),
    ]:
        image.write(b"x" * length, offset)
    with image.open() as opened:
        opened.discard(21 * OBJECT, OBJECT)
    truth = in_blocks(image.diff(), 200 * MIB + 1000)
    image.snap("s")
    if mode == "snapshot":
        image.write(b"y" * OBJECT, 30 * OBJECT)
    server = servers(image, snapshot="s" if mode == "snapshot" else None)
    server.options = ["-r"] if mode == "read-only" else []
    client = server.start().connect()
    size = client.get_size()
    assert data_extents(client, 0, size) == truth
    # However the range is cut.
    for start, length in [(0, 1), (3, size - 3), (5 * OBJECT - 1, 2), (size - 1, 1)]:
        expected = [
            (max(low, start), min(low + count, start + length) - max(low, start))
            for low, count in truth
            if low < start + length and low + count > start
        ]
        assert data_extents(client, start, length) == expected


@pytest.mark.parametrize("mode", ["writable", "read-only", "snapshot"])
def test_the_order_of_the_questions_does_not_matter(servers, image, mode):
    places = [0, 5 * OBJECT, 12 * OBJECT]
    for place in places:
        image.write(b"o" * OBJECT, place)
    image.snap("s")
    server = servers(image, snapshot="s" if mode == "snapshot" else None)
    server.options = ["-r"] if mode == "read-only" else []
    client = server.start().connect()
    for place in [*reversed(places), *places]:
        assert extents(client, place, OBJECT) == [(place, OBJECT, 0)]


@pytest.mark.parametrize("options", [[], ["-r"]], ids=["writable", "read-only"])
def test_what_another_writer_adds_is_data_at_the_next_question(server, image, options):
    server.options = options
    client = server.start().connect()
    assert data_extents(client, 0, 64 * MIB) == []
    for place in 3 * OBJECT, 0, 9 * OBJECT:
        image.write(b"n" * OBJECT, place)
        assert extents(client, place, OBJECT) == [(place, OBJECT, 0)]


def test_every_answer_covers_just_what_was_asked(server, image):
    image.write(b"x" * 100, OBJECT + 1)
    client = server.start().connect()
    for start, length in [(0, 64 * MIB), (1, 1), (OBJECT, OBJECT), (64 * MIB - 1, 1)]:
        found = extents(client, start, length)
        assert found[0][0] == start
        assert sum(size for _, size, _ in found) == length


def test_a_client_that_wants_one_extent_gets_one(server, image):
    image.write(b"x" * OBJECT, 2 * OBJECT)
    client = server.start().connect()
    answers = []
    client.block_status(
        64 * MIB,
        0,
        lambda _context, _offset, entries, _error: answers.append(entries),
        flags=nbd.CMD_FLAG_REQ_ONE,
    )
    assert answers == [[2 * OBJECT, HOLE_AND_ZERO]]


@pytest.mark.parametrize("policy", ["writearound", "writeback"])
def test_a_write_of_the_same_connection_is_data_at_once(servers, image, policy):
    server = servers(image, **{"ceph.rbd_cache_policy": policy})
    client = server.start().connect()
    client.flush()
    for place in range(0, 64 * MIB, 10 * MIB):
        client.pwrite(b"w" * 4096, place)
        (start, length, flags), *_ = extents(client, place, 4096)
        assert (start, length, flags) == (place, 4096, 0)


def test_data_of_another_writer_is_data_to_a_read_only_export(server, image, cluster):
    server.options = ["-r"]
    client = server.start().connect()
    assert data_extents(client, 0, 64 * MIB) == []
    # The flags of the object map change, of which a read-only image never hears.
    cluster.rbd("feature", "disable", image.spec, "fast-diff", "object-map")
    image.write(b"n" * OBJECT, 3 * OBJECT)
    cluster.rbd("feature", "enable", image.spec, "object-map", "fast-diff")
    assert data_extents(client, 0, 64 * MIB) == [(3 * OBJECT, OBJECT)]


def test_an_invalid_object_map_does_not_hide_data(servers, image, cluster):
    cluster.rbd("feature", "disable", image.spec, "fast-diff", "object-map")
    image.write(b"n" * OBJECT, 3 * OBJECT)
    cluster.rbd("feature", "enable", image.spec, "object-map", "fast-diff")
    assert "object map invalid" in cluster.rbd("info", image.spec).decode()
    client = servers(image).start().connect()
    assert data_extents(client, 0, 64 * MIB) == [(3 * OBJECT, OBJECT)]


# ---- clones ------------------------------------------------------------------


@pytest.mark.parametrize("stripes", [1, 3])
@pytest.mark.parametrize("features", [1, 1 | 4 | 8 | 16], ids=["plain", "fast-diff"])
@pytest.mark.parametrize("mode", ["writable", "read-only", "snapshot"])
def test_data_of_the_parent_is_data_of_the_clone(servers, images, stripes, features, mode):
    striping = {"stripe_unit": 65536, "stripe_count": stripes} if stripes > 1 else {}
    grandparent = images.create(64 * MIB, features=features, **striping)
    grandparent.write(b"g" * OBJECT, 0)
    grandparent.snap("s", protect=True)
    parent = images.clone(grandparent, "s", features=features, **striping)
    parent.write(b"p" * 1000, 2 * OBJECT + 5)
    parent.snap("s", protect=True)
    clone = images.clone(parent, "s", features=features, **striping)
    clone.write(b"c" * 1000, 5 * OBJECT)
    clone.snap("s")
    server = servers(clone, snapshot="s" if mode == "snapshot" else None)
    server.options = ["-r"] if mode == "read-only" else []
    client = server.start().connect()
    content = client.pread(64 * MIB, 0)
    for start, length, flags in extents(client, 0, 64 * MIB):
        if flags == HOLE_AND_ZERO:
            assert not any(content[start : start + length]), (start, length)
    assert data_extents(client, 0, 64 * MIB) == in_blocks(clone.diff(), 64 * MIB)
    assert content.count(b"g") == OBJECT
    assert content.count(b"p") == 1000


def test_what_a_clone_zeroed_is_no_data_of_its_parent(servers, images):
    parent = images.create(32 * MIB)
    parent.write(b"p" * 32 * MIB, 0)
    parent.snap("s", protect=True)
    clone = images.clone(parent, "s")
    client = servers(clone).start().connect()
    client.zero(4 * OBJECT, OBJECT)
    content = client.pread(32 * MIB, 0)
    assert not any(content[OBJECT : 5 * OBJECT])
    found = data_extents(client, 0, 32 * MIB)
    assert (0, OBJECT) in found or found[0][1] > OBJECT
    assert sum(length for _, length in found) >= 4 * OBJECT


@pytest.mark.parametrize("mode", ["writable", "read-only", "snapshot"])
def test_a_parent_that_loses_its_own_parent_loses_no_data_of_the_clone(servers, images, mode):
    grandparent = images.create(32 * MIB)
    grandparent.write(b"g" * 32 * MIB, 0)
    grandparent.snap("s", protect=True)
    parent = images.clone(grandparent, "s")
    parent.snap("s", protect=True)
    clone = images.clone(parent, "s")
    clone.snap("s")
    server = servers(clone, snapshot="s" if mode == "snapshot" else None)
    server.options = ["-r"] if mode == "read-only" else []
    client = server.start().connect()
    assert client.pread(10, 0) == b"g" * 10
    with parent.open() as opened:
        opened.flatten()
    images.remove(grandparent)
    if mode == "writable":
        for refused in (
            lambda: client.pread(10, 8 * MIB),
            lambda: client.pwrite(b"w", 8 * MIB),
            lambda: client.trim(OBJECT, 8 * MIB),
            lambda: client.zero(10, 8 * MIB),
            lambda: extents(client, 0, 32 * MIB),
        ):
            with pytest.raises(nbd.Error, match="Input/output error"):
                refused()
        assert f"image '{clone.spec}'" in server.log()
        client = server.connect()
        client.pwrite(b"w", 0)
        client.pwrite(b"g", 0)
    assert client.pread(32 * MIB, 0) == b"g" * 32 * MIB
    assert data_extents(client, 0, 32 * MIB) == [(0, 32 * MIB)]


# ---- size --------------------------------------------------------------------


def test_the_map_of_a_terabyte_has_every_byte_of_data(servers, images):
    image = images.create(1024 * GIB)
    places = [number * 37 * GIB + number * 4096 for number in range(27)]
    with image.open() as opened:
        for place in places:
            opened.write(b"t" * 100, place)
    client = servers(image).start().connect()
    # A new object is as long as what was written into it reaches.
    truth = in_blocks(image.diff(), 1024 * GIB)
    assert len(truth) == len(places)
    assert data_extents(client, 0, 1024 * GIB) == truth


def test_a_shrunk_image_is_never_called_a_hole_where_it_is_gone(server, image):
    client = server.start().connect()
    client.pwrite(b"x" * OBJECT, 40 * MIB)
    with image.open() as opened:
        opened.resize(32 * MIB)
    for start, length in [(0, 64 * MIB), (40 * MIB, OBJECT), (31 * MIB, 2 * MIB)]:
        for low, count, flags in extents(client, start, length):
            assert flags == 0 or low + count <= 32 * MIB


@pytest.mark.parametrize("mode", ["writable", "snapshot"])
def test_the_last_block_may_be_asked_about_in_parts(servers, images, mode):
    image = images.create(OBJECT + 1000)
    image.write(b"x", 0)
    image.snap("s")
    client = servers(image, snapshot="s" if mode == "snapshot" else None).start().connect()
    for start, length in [(1, 3), (OBJECT, 512), (OBJECT + 1, 2), (OBJECT + 999, 1)]:
        kind = 0 if start < 4096 else HOLE_AND_ZERO
        assert extents(client, start, length) == [(start, length, kind)]


def test_no_extent_ends_within_a_block_where_an_image_has_shrunk(server, image):
    client = server.start().connect()
    with image.open() as opened:
        opened.resize(5000)
    assert extents(client, 0, MIB) == [(0, 4096, HOLE_AND_ZERO), (4096, MIB - 4096, 0)]
