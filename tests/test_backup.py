# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Backup and restore: increments, points in time, thin and new images."""

import json
import os
import re
import subprocess

import nbd
import pytest
import rbd
from conftest import (
    GIB,
    MIB,
    OBJECT,
    Image,
    assert_same,
    data_extents,
    extents,
    recipe,
    refused,
    run_script,
    unique,
    wait_until,
)

DATA, HOLE, ZERO = 0, 1, 3


@pytest.fixture
def week(image):
    """An image of 64 MiB with the snapshots monday and tuesday, and changes after both."""
    image.write(b"m" * 4 * OBJECT, 0)
    image.write(b"m" * OBJECT, 8 * OBJECT)
    image.snap("monday")
    image.write(b"t" * 8192, OBJECT)
    image.write(b"t", 12 * OBJECT + 5000)
    with image.open() as opened:
        opened.discard(8 * OBJECT, OBJECT)
        opened.write_zeroes(2 * OBJECT + 4096, 8192)
    image.snap("tuesday")
    image.write(b"w" * OBJECT, 15 * OBJECT)
    return image


# ---- increments --------------------------------------------------------------


def test_an_increment_tells_changed_zeroed_and_unchanged_apart(servers, week):
    by_parameter = servers(week, **{"snapshot": "tuesday", "from-snapshot": "monday"})
    by_name = servers(f"{week.spec}@monday..tuesday")
    for server in by_parameter, by_name:
        client = server.start().connect()
        assert client.is_read_only()
        told = {start: (size, kind) for start, size, kind in extents(client, 0, 64 * MIB)}
        assert told[0] == (OBJECT, HOLE)
        assert told[OBJECT] == (8192, DATA)
        assert told[8 * OBJECT] == (OBJECT, ZERO)
        assert told[12 * OBJECT] == (8192, DATA)
        assert told[12 * OBJECT + 8192][1] == HOLE
        kind_at = [kind for start, (_, kind) in told.items() if start <= 2 * OBJECT + 4096][-1]
        assert kind_at in (DATA, ZERO)
        assert 15 * OBJECT not in told  # wednesday's
        # Who ignores the map still reads tuesday.
        assert_same(client.pread(32 * MIB, 0), week.read(0, 32 * MIB, "tuesday"))
        assert_same(client.pread(32 * MIB, 32 * MIB), week.read(32 * MIB, 32 * MIB, "tuesday"))


def test_an_increment_up_to_now_follows_the_image(servers, week):
    client = servers(week, **{"from-snapshot": "tuesday"}).start().connect()
    assert client.is_read_only()
    assert data_extents(client, 0, 64 * MIB) == [(15 * OBJECT, OBJECT)]
    week.write(b"n" * OBJECT, 0)
    assert data_extents(client, 0, 64 * MIB) == [(0, OBJECT), (15 * OBJECT, OBJECT)]
    week.snap("wednesday")
    week.write(b"n" * OBJECT, 3 * OBJECT)
    assert (3 * OBJECT, OBJECT) in data_extents(client, 0, 64 * MIB)
    assert (0, OBJECT) in data_extents(client, 0, 64 * MIB)


@pytest.mark.parametrize("size", [32 * MIB, 96 * MIB], ids=["shrunk", "grown"])
def test_what_an_image_lost_or_grew_by_is_told(servers, week, size):
    with week.open() as opened:
        opened.resize(16 * MIB)
        opened.resize(size)
        opened.create_snap("resized")
    client = servers(f"{week.spec}@tuesday..resized").start().connect()
    assert client.get_size() == size
    told = extents(client, 0, size)
    content, before = week.read(0, size, "resized"), week.read(0, 64 * MIB, "tuesday")
    for start, length, kind in told:
        if kind == HOLE:
            assert start + length <= 64 * MIB
            assert content[start : start + length] == before[start : start + length]
        if kind == ZERO:
            assert not any(content[start : start + length])
    if size > 64 * MIB:
        assert told[-1] == (64 * MIB, size - 64 * MIB, ZERO)


def test_what_grew_out_of_the_middle_of_a_block_is_told_with_the_whole_block(servers, images):
    image = images.create(OBJECT + 1000)
    image.write(b"m" * 1000, OBJECT)
    image.snap("monday")
    with image.open() as opened:
        opened.resize(2 * OBJECT)
    image.snap("tuesday")
    client = servers(f"{image.spec}@monday..tuesday").start().connect()
    # What begins in a sector counts for all of it to qemu-img.
    assert extents(client, 0, OBJECT + 8192) == [
        (0, OBJECT, HOLE),
        (OBJECT, 4096, DATA),
        (OBJECT + 4096, 4096, ZERO),
    ]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"snapshot": "monday", "from-snapshot": "tuesday"}, "'tuesday' is not older than"),
        ({"snapshot": "monday", "from-snapshot": "monday"}, "'monday' is not older than"),
        ({"from-snapshot": "sunday"}, "from-snapshot 'sunday' not found in image"),
        ({"snapshot": "sunday", "from-snapshot": "monday"}, "snapshot 'sunday' not found in image"),
    ],
)
def test_an_increment_that_cannot_be_is_refused_at_the_start(servers, week, parameters, message):
    assert message in refused(servers(week, **parameters))


def test_a_gateway_gives_an_increment_to_who_may_have_both_ends(servers, week, cluster):
    def gateway(*exports):
        return servers(None, pool=cluster.pool, exports=list(exports)).start()

    both = gateway("*@*")
    for name in "monday..tuesday", "monday..":
        spec = f"{week.name}@{name}"
        if name.endswith("y"):
            assert both.connect(spec).get_size() == 64 * MIB
        else:
            with pytest.raises(nbd.Error):
                both.connect(spec)  # the image as it is now is not exported
    assert gateway("*", "*@*").connect(f"{week.name}@monday..").get_size() == 64 * MIB
    for one in gateway("*@monday"), gateway("*@tuesday"), gateway("*", "*@*", "!*@monday"):
        with pytest.raises(nbd.Error):
            one.connect(f"{week.name}@monday..tuesday")


def test_what_a_clone_lost_of_its_parent_is_told(servers, images):
    """It leaves no trace in the object maps: librbd's fast diff has nothing of it."""
    parent = images.create()
    parent.write(b"p" * 64 * MIB, 0)
    parent.snap("s", protect=True)
    clone = images.clone(parent, "s")
    clone.snap("a")
    with clone.open() as opened:
        opened.resize(32 * MIB)
        opened.create_snap("in between")
        opened.resize(64 * MIB)
    clone.snap("b")
    client = servers(f"{clone.spec}@a..b").start().connect()
    assert not any(client.pread(32 * MIB, 32 * MIB))
    assert extents(client, 0, 64 * MIB) == [(0, 32 * MIB, HOLE), (32 * MIB, 32 * MIB, ZERO)]


def test_a_change_before_a_snapshot_whose_object_map_is_missing_is_told(servers, image, cluster):
    """librbd's fast diff goes on without a map that is missing in between."""
    image.write(b"1" * OBJECT, 0)
    image.snap("first")
    image.write(b"2" * OBJECT, 0)
    image.snap("second")
    image.snap("third")
    with image.open(read_only=True) as opened:
        number = opened.snap_get_id("second")
        cluster.ioctx.remove_object(f"rbd_object_map.{opened.id()}.{number:016x}")
    client = servers(f"{image.spec}@first..third").start().connect()
    assert data_extents(client, 0, 64 * MIB) == [(0, OBJECT)]


def test_the_base_of_an_increment_that_is_removed_fails_it(servers, week):
    client = servers(f"{week.spec}@monday..tuesday").start().connect()
    assert (OBJECT, 8192) in data_extents(client, 0, 64 * MIB)
    with week.open() as opened:
        opened.remove_snap("monday")
    with pytest.raises(nbd.Error):
        client.block_status(64 * MIB, 0, lambda *_: None)
    with pytest.raises(nbd.Error):
        client.pread(1, 0)


# ---- block status ------------------------------------------------------------


def test_an_error_of_the_parent_is_not_a_hole(servers, images, cluster):
    """librbd itself takes it for one."""
    pool = unique("rbd_export_test")
    cluster.make_pool(pool)
    try:
        parent = images.create(pool=pool)
        parent.write(b"p" * 2 * OBJECT, 0)
        parent.snap("s", protect=True)
        clone = Image(cluster, unique("clone"))
        cluster.rbd("clone", f"{parent.spec}@s", clone.spec)
        images.made.append(clone)
        known = "header", "id", "directory", "object_map", "children", "info"
        caps = [f"allow rwx pool={pool} object_prefix rbd_{kind}" for kind in known]
        osd = ", ".join([f"profile rbd pool={cluster.pool}", *caps])
        with cluster.key(mon="profile rbd", osd=osd) as login:
            client = servers(clone, **login).start().connect()
            with pytest.raises(nbd.Error):
                client.pread(1, 0)
            with pytest.raises(nbd.Error):
                client.block_status(OBJECT, 0, lambda *_: None)
        images.remove(clone)
        images.remove(parent)
    finally:
        cluster.drop_pool(pool)


def test_extents_off_calls_all_of_it_data(servers, week):
    client = servers(week, extents="off").start().connect()
    assert extents(client, 0, 64 * MIB) == [(0, 64 * MIB, DATA)]


def test_extents_objects_tells_whole_objects(servers, image):
    image.write(b"x", OBJECT + 5000)
    client = servers(image, extents="objects").start().connect()
    assert data_extents(client, 0, 64 * MIB) == [(OBJECT, OBJECT)]
    client = servers(image).start().connect()
    assert data_extents(client, 0, 64 * MIB) == [(OBJECT, 8192)]


def test_one_line_in_the_log_says_that_block_status_will_be_slow(servers, images):
    image = images.create(features=rbd.RBD_FEATURE_LAYERING)
    server = servers(image).start()
    client = server.connect()
    for _ in range(3):
        extents(client, 0, 64 * MIB)
    server.stop()
    assert server.log().count("has no fast-diff: block status has to look into each") == 1


# ---- points in time ----------------------------------------------------------


def snapshots(image):
    with image.open(read_only=True) as opened:
        return [snapshot["name"] for snapshot in opened.list_snaps()]


def test_a_point_in_time_is_taken_for_the_first_client_and_goes_with_the_last(servers, image):
    image.write(b"before", 0)
    server = servers(image, **{"point-in-time": "yes"}).start()
    assert snapshots(image) == []
    first = server.connect()
    (name,) = snapshots(image)
    assert re.fullmatch(r"rbd_export-\d{8}T\d{6}\.\d{6}Z-.+-client\d+", name)
    image.write(b"after!", 0)
    second = server.connect()
    assert snapshots(image) == [name]
    for client in first, second:
        assert client.is_read_only()
        assert client.pread(6, 0) == b"before"
    first.shutdown()
    assert second.pread(6, 0) == b"before"
    assert snapshots(image) == [name]
    second.shutdown()
    wait_until(lambda: not snapshots(image))
    assert server.connect().pread(6, 0) == b"after!"
    server.end(15)
    assert snapshots(image) == []
    assert image.watchers() == []


def test_an_increment_up_to_a_point_in_time(servers, week):
    server = servers(week, **{"point-in-time": "yes", "from-snapshot": "tuesday"}).start()
    client = server.connect()
    week.write(b"later", 0)
    assert data_extents(client, 0, 64 * MIB) == [(15 * OBJECT, OBJECT)]


def test_what_a_crash_left_is_removed_by_the_next_start_and_nothing_else_is(
    servers, images, image, cluster
):
    bystander = images.create()
    others = [
        "monday",
        "rbd_export-",
        "rbd_export-mine",
        "x-rbd_export-20260101T000000.000000Z-h-client1",
    ]
    for name in others:
        image.snap(name)
    parameters = {"point-in-time": "yes"}
    crashed, crashed_elsewhere = servers(image, **parameters), servers(bystander, **parameters)
    for server in crashed, crashed_elsewhere:
        server.start().connect()
    dead = [watcher["addr"] for watcher in (*image.watchers(), *bystander.watchers())]
    alive = servers(image, **parameters).start()
    alive_client = alive.connect()
    assert len(snapshots(image)) == len(others) + 2
    for server in crashed, crashed_elsewhere:
        server.kill()
    # Its watch would last half a minute.
    for address in dead:
        cluster.ceph("osd", "blocklist", "add", address)
    try:
        wait_until(lambda: len(image.watchers()) == 1)
        in_use = snapshots(image)[-1]
        servers(image, **parameters).start()
        assert snapshots(image) == [*others, in_use]
        assert len(snapshots(bystander)) == 1
        assert alive_client.pread(1, 0) == b"\0"
    finally:
        for address in dead:
            cluster.ceph("osd", "blocklist", "rm", address)


# ---- targets -----------------------------------------------------------------


def test_a_copied_sparse_file_takes_no_more_than_rbd_import(servers, images, cluster, tmp_path):
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(200 * MIB)
        for place in (0, 30 * MIB + 4096, 31 * MIB, 77 * MIB + 5, 150 * MIB):
            file.seek(place)
            file.write(os.urandom(70_000))
    imported = Image(cluster, unique("imported"))
    cluster.rbd("import", str(sparse), imported.spec)
    images.made.append(imported)
    name = unique("copied")
    server = servers(f"{cluster.pool}/{name}", create="200m").start()
    copied = Image(cluster, name)
    images.made.append(copied)
    subprocess.run(
        [
            "nbdcopy",
            "--destination-is-zero",
            "--flush",
            sparse,
            f"nbd+unix:///?socket={server.socket}",
        ],
        check=True,
    )
    assert_same(copied.read(0, 200 * MIB), sparse.read_bytes())
    assert copied.used() <= imported.used()


def info(cluster, spec):
    return json.loads(cluster.rbd("info", spec, "--format", "json"))


def test_create_makes_what_is_missing_and_uses_what_is_there(servers, images, cluster):
    name = unique("restored")
    server = servers(f"{cluster.pool}/{name}", create="10M").start()
    images.made.append(Image(cluster, name))
    client = server.connect()
    assert client.get_size() == 10 * MIB
    client.pwrite(b"kept", 0)
    client.shutdown()
    again = servers(f"{cluster.pool}/{name}", create="10M").start()
    assert again.connect().pread(4, 0) == b"kept"
    message = refused(servers(f"{cluster.pool}/{name}", create="11M"))
    assert (
        f"image '{cluster.pool}/{name}' exists with {10 * MIB} bytes, not the {11 * MIB}" in message
    )
    assert images.made[-1].read(0, 4) == b"kept"


def test_create_takes_object_size_data_pool_and_features(servers, images, cluster):
    pool = unique("rbd_export_test")
    cluster.make_pool(pool)
    name = unique("restored")
    image = Image(cluster, name)
    try:
        parameters = {
            "create": "10M",
            "object-size": "64k",
            "data-pool": pool,
            "features": "layering,exclusive-lock",
        }
        servers(image.spec, **parameters).start().connect().pwrite(b"x", 0)
        images.made.append(image)
        facts = info(cluster, image.spec)
        assert facts["object_size"] == 65536
        assert facts["data_pool"] == pool
        assert set(facts["features"]) == {"layering", "exclusive-lock", "data-pool"}
    finally:
        images.close()
        cluster.drop_pool(pool)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"create": "ten"}, "parameter 'create': 'ten' is not a size above 0"),
        ({"create": "0"}, "parameter 'create': '0' is not a size above 0"),
        ({"create": "-1"}, "parameter 'create': '-1' is not a size above 0"),
        ({"create": "8E"}, "parameter 'create': '8E' is not a size above 0"),
        ({"create": "1M", "snapshot": "s"}, "'snapshot' and 'create' exclude each other"),
        ({"create": "1M", "probe": "no"}, "'create' needs the probe"),
        ({"create": "1M", "object-size": "5k"}, "'5k' is not a power of two from 4k to 32M"),
        ({"create": "1M", "object-size": "64M"}, "'64M' is not a power of two from 4k to 32M"),
        ({"create": "1M", "features": "speed"}, "parameter 'features': Ceph refuses 'speed'"),
        ({"create": "1M", "data-pool": "no-pool"}, "pool 'no-pool' (data-pool) not found"),
        ({"data-pool": "rbd"}, "'data-pool' needs 'create'"),
        ({"extents": "some"}, "'some' is neither 'exact' nor 'objects' nor 'off'"),
        ({"point-in-time": "yes", "snapshot": "s"}, "'snapshot' and 'point-in-time' exclude"),
        ({"point-in-time": "maybe"}, "'maybe' is neither 'yes' nor 'no'"),
        ({"image": None, "exports": "*", "create": "1M"}, "'create' needs 'image'"),
        ({"image": None, "exports": "*", "from-snapshot": "s"}, "'from-snapshot' needs 'image'"),
        ({"image": None, "exports": "vm@a..b"}, "has two snapshots"),
        ({"image": "vm@a..b..c"}, "image 'vm@a..b..c' is malformed"),
        ({"image": "vm@..b"}, "image 'vm@..b' is malformed"),
    ],
)
def test_a_mistake_is_named(servers, parameters, message):
    assert message in refused(servers(f"rbd/{unique('none')}", **parameters))


def test_a_read_only_export_makes_no_image(servers, cluster):
    server = servers(f"{cluster.pool}/{unique('none')}", create="1M")
    server.options = ["-r"]
    assert "'create' and nbdkit's -r exclude each other: leave one out" in refused(server)


# ---- the README --------------------------------------------------------------


def test_the_recipes_of_the_readme_work_as_printed(cluster, images, tmp_path):
    size = GIB  # create=1G
    image = images.create(size)
    image.write(os.urandom(6 * MIB), MIB)
    restored = Image(cluster, unique("restored"))
    images.made.append(restored)
    changes = iter([(0, b"t" * 5000), (20 * MIB, b"w" * 70000)])

    def change(_match):
        place, data = next(changes)
        return f"change {place} {data[:1].decode()} {len(data)}; {_match[0]}"

    names = {"rbd/vm1-restored": restored.spec, "rbd/vm1": image.spec, "/backup/": f"{tmp_path}/"}
    commands = recipe("Back up and restore", names)
    # The guest writes before each snapshot but the first.
    commands = re.sub(r"rbd snap create \S+@(tuesday|wednesday)", change, commands)
    script = f"""
change() {{
  /usr/bin/python3 - "$@" <<'END'
import sys, rados, rbd
place, letter, count = sys.argv[1:]
with rados.Rados(conffile="{cluster.conf}", rados_id="rw") as c, c.open_ioctx("{image.pool}") as io:
    with rbd.Image(io, "{image.name}") as i:
        i.write(letter.encode() * int(count), int(place))
        i.discard(4 << 20, 4 << 20)
END
}}
{commands}
"""
    run_script(script, cluster, tmp_path)
    for place in range(0, size, 64 * MIB):
        assert_same(restored.read(place, 64 * MIB), image.read(place, 64 * MIB, "wednesday"))
    assert restored.read(0, 5000) == b"t" * 5000
    assert_same((tmp_path / "vm1.raw").read_bytes()[: 64 * MIB], image.read(0, 64 * MIB))
    # Only what has changed is in an increment.
    assert (tmp_path / "tuesday.qcow2").stat().st_size < 6 * MIB
