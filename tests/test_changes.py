# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Somebody changes an image that is open: right data or a clear error, and no crash.

What happens to images that are open read-only, and to parents, is in test_gateway.py and
test_extents.py, too.
"""

import errno

import nbd
import pytest
import rbd
from conftest import CACHES, MIB, OBJECT, data_extents, failure, wait_until

MODES = pytest.mark.parametrize("options", [[], ["-r"]], ids=["writable", "read-only"])


@pytest.fixture(params=CACHES)
def opened(request, servers, image):
    """A writable export with something written through it, and its client."""
    server = servers(image, **CACHES[request.param])
    client = server.start().connect()
    client.pwrite(b"o" * OBJECT, 0)
    client.flush()
    client.pwrite(b"o" * OBJECT, 32 * MIB)
    return client


def test_a_writer_does_not_lose_what_it_wrote_to_a_rollback(opened, image, cluster):
    opened.flush()
    image.snap("s")
    opened.pwrite(b"n" * 4096, 0)
    with pytest.raises(AssertionError, match="Read-only file system"):
        cluster.rbd("snap", "rollback", "--no-progress", f"{image.spec}@s")
    assert opened.pread(OBJECT, 0) == b"n" * 4096 + b"o" * (OBJECT - 4096)


def test_after_a_rollback_a_reader_has_what_the_snapshot_had(server, image, cluster):
    image.write(b"o" * OBJECT, 0)
    image.snap("s")
    image.write(b"n" * 4096, 0)
    image.write(b"n" * 4096, 48 * MIB)
    server.options = ["-r"]
    client = server.start().connect()
    assert client.pread(4096, 0) == b"n" * 4096
    assert data_extents(client, 48 * MIB, 4096) == [(48 * MIB, 4096)]
    cluster.rbd("snap", "rollback", "--no-progress", f"{image.spec}@s")
    assert client.pread(OBJECT, 0) == b"o" * OBJECT
    assert client.pread(4096, 48 * MIB) == bytes(4096)
    assert (0, OBJECT) in data_extents(client, 0, 64 * MIB)


@pytest.mark.parametrize("opened", ["no write cache", "writeback"], indirect=True)
def test_a_shrunk_image_fails_behind_its_end_and_goes_on_before_it(opened, image, cluster):
    cluster.rbd("resize", "--no-progress", "--allow-shrink", "--size=16M", image.spec)
    opened.pwrite(b"still", 16 * MIB - 5)
    assert opened.pread(5, 16 * MIB - 5) == b"still"
    for beyond in (
        lambda: opened.pread(4096, 32 * MIB),
        lambda: opened.pread(10, 16 * MIB - 5),
        lambda: opened.pwrite(b"x" * 4096, 32 * MIB),
        lambda: opened.zero(4096, 32 * MIB),
    ):
        with pytest.raises(nbd.Error) as raised:
            beyond()
        assert raised.value.errnum in (errno.EIO, errno.ENOSPC)
    opened.flush()
    # What was beyond is gone, though the image grows again.
    cluster.rbd("resize", "--no-progress", "--size=64M", image.spec)
    assert opened.pread(4096, 32 * MIB) == bytes(4096)
    opened.pwrite(b"x" * 4096, 32 * MIB)
    assert opened.pread(4096, 32 * MIB) == b"x" * 4096


@pytest.mark.parametrize("opened", ["write cache"], indirect=True)
@pytest.mark.parametrize(
    ("told", "where"),
    [
        ("flush", 32 * MIB),
        ("pread", 32 * MIB),
        ("zero", 32 * MIB),
        ("flush", 16 * MIB - 2048),
        ("pread", 16 * MIB - 2048),
    ],
)
def test_an_early_write_behind_the_end_of_a_shrunk_image_fails_a_flush_and_is_given_up(
    opened, image, cluster, told, where
):
    opened.flush()
    cluster.rbd("resize", "--no-progress", "--allow-shrink", "--size=16M", image.spec)
    opened.pwrite(b"x" * 4096, where)  # answered early
    tell = {
        "flush": opened.flush,
        "pread": lambda: opened.pread(4096, where),
        "zero": lambda: opened.zero(4096, where),
    }
    assert failure(tell[told]) in (errno.EIO, errno.ENOSPC)
    if told != "flush":
        assert failure(opened.flush) == errno.EIO
    opened.flush()
    opened.pwrite(b"still", 16 * MIB - 5)
    opened.flush()
    cluster.rbd("resize", "--no-progress", "--size=64M", image.spec)
    assert opened.pread(4096, 32 * MIB) == bytes(4096)
    opened.pwrite(b"x" * 4096, 32 * MIB)
    opened.flush()
    assert image.read(32 * MIB, 4096) == b"x" * 4096
    assert image.read(16 * MIB - 5, 5) == b"still"


def test_a_grown_image_goes_on_and_has_its_new_size_for_new_clients(opened, image, cluster):
    cluster.rbd("resize", "--no-progress", "--size=128M", image.spec)
    assert opened.get_size() == 64 * MIB
    opened.pwrite(b"goes on", 0)
    opened.flush()
    assert image.read(0, 7) == b"goes on"


@pytest.mark.parametrize(
    "change",
    [
        "disable fast-diff",
        "disable object-map fast-diff",
        "disable exclusive-lock object-map fast-diff",
        "enable journaling",
    ],
)
def test_features_may_change_while_the_image_is_open(opened, image, cluster, change):
    action, *features = change.split()
    cluster.rbd("feature", action, image.spec, *features)
    opened.pwrite(b"n" * OBJECT, 8 * MIB)
    opened.flush()
    assert opened.pread(OBJECT, 0) == b"o" * OBJECT
    assert image.read(8 * MIB, OBJECT) == b"n" * OBJECT
    data = [(0, OBJECT), (8 * MIB, OBJECT), (32 * MIB, OBJECT)]
    assert data_extents(opened, 0, 64 * MIB) == data


def test_a_clone_may_be_flattened_while_it_is_written(servers, images):
    parent = images.create()
    parent.write(b"p" * 64 * MIB, 0)
    parent.snap("s", protect=True)
    clone = images.clone(parent, "s")
    client = servers(clone).start().connect()
    client.pwrite(b"c", 0)
    with clone.open() as opened:
        opened.flatten()
    images.remove(parent)
    assert client.pread(64 * MIB, 0) == b"c" + b"p" * (64 * MIB - 1)
    client.pwrite(b"c", 40 * MIB)
    assert client.pread(OBJECT, 40 * MIB) == b"c" + b"p" * (OBJECT - 1)
    assert data_extents(client, 0, 64 * MIB) == [(0, 64 * MIB)]


@MODES
def test_an_image_that_is_encrypted_while_open_is_what_it_is_in_the_cluster(
    server, image, cluster, tmp_path, options
):
    image.write(b"plain", 0)
    server.options = options
    client = server.start().connect()
    assert client.pread(5, 0) == b"plain"
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("secret")
    cluster.rbd("encryption", "format", image.spec, "luks1", passphrase)
    # Without the passphrase it is LUKS and noise.
    assert client.pread(4, 0) == b"LUKS"
    assert client.pread(MIB, 0) == image.read(0, MIB)


def test_an_image_that_migrates_is_right_or_an_error(servers, images, image, cluster):
    image.write(b"m" * OBJECT, 0)
    server = servers(image)
    server.options = ["-r"]
    client = server.start().connect()
    assert client.pread(4096, 0) == b"m" * 4096
    target = f"{cluster.pool}/{image.name}-migrated"

    def is_right():
        try:
            content = client.pread(2 * OBJECT, 0)
            data = data_extents(client, 0, 64 * MIB)
        except nbd.Error as error:
            return error.errnum == errno.EIO
        return content == b"m" * OBJECT + bytes(OBJECT) and (0, OBJECT) in data

    cluster.rbd("migration", "prepare", image.spec, target)
    try:
        assert is_right()
        migrated = servers(target)
        reader = migrated.start().connect()
        assert reader.pread(2 * OBJECT, 0) == b"m" * OBJECT + bytes(OBJECT)
        assert (0, OBJECT) in [
            (low, min(n, OBJECT)) for low, n in data_extents(reader, 0, 64 * MIB)
        ]
        migrated.stop()
        cluster.rbd("migration", "execute", "--no-progress", target)
        assert is_right()
        cluster.rbd("migration", "commit", "--no-progress", target)
        assert is_right()
        server.stop()
    finally:
        server.stop()
        with cluster.rados.open_ioctx(cluster.pool) as ioctx:
            names = rbd.RBD().list(ioctx)
        if target.split("/")[1] in names:
            cluster.rbd("mv", target, image.spec)


def test_an_image_that_is_open_for_writing_does_not_migrate(opened, image, cluster):
    with pytest.raises(AssertionError, match=r"in use|watchers|[Bb]usy"):
        cluster.rbd("migration", "prepare", image.spec, f"{image.spec}-migrated")
    opened.pwrite(b"goes on", 0)
    assert opened.pread(7, 0) == b"goes on"
    wait_until(lambda: image.watchers())
