# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""The exclusive lock: handed over to who asks, or kept."""

import errno
import subprocess

import nbd
import pytest
import rbd
from conftest import MIB, refused, wait_until


def holders(image):
    with image.open() as opened:
        found = opened.list_lockers()
    return [address for _, _, address in found["lockers"]] if found else []


@pytest.fixture
def second(servers, image):
    """Another gateway for the same image."""
    return servers(image)


def test_by_default_two_writers_go_on_by_turns(server, second, image):
    a, b = server.start().connect(), second.start().connect()
    for number in range(5):
        for client, place in ((a, 0), (b, MIB)):
            client.pwrite(b"%d" % number, place)
    assert (a.pread(1, MIB), b.pread(1, 0)) == (b"4", b"4")


@pytest.fixture
def locked(servers, image):
    """A server that has locked the image, and its client."""
    server = servers(image, lock="exclusive")
    client = server.start().connect()
    (address,) = holders(image)
    yield client
    # It still has the lock, and can write.
    client.pwrite(b"owner", 0)
    assert holders(image) == [address]
    assert image.read(0, 5) == b"owner"


def test_a_second_writer_is_refused_and_told_who_has_the_lock(locked, second, image):
    (owner,) = holders(image)
    client = second.start().connect()
    for refuse in (
        lambda: client.pwrite(b"second", MIB),
        lambda: client.zero(4096, MIB),
        lambda: client.trim(4 * MIB, 4 * MIB),
    ):
        with pytest.raises(nbd.Error) as raised:
            refuse()
        assert raised.value.errnum == errno.EPERM
    assert f"image '{image.spec}' is locked by {owner}" in second.log()
    assert client.pread(6, MIB) == bytes(6)


def test_a_second_gateway_that_wants_the_lock_does_not_start(locked, servers, image):
    (owner,) = holders(image)
    message = refused(servers(image, lock="exclusive"))
    assert f"lock=exclusive: image '{image.spec}' is locked by {owner}" in message


def test_a_client_is_refused_while_somebody_else_has_the_lock(servers, cluster, image):
    server = servers(None, pool=cluster.pool, exports="*", lock="exclusive").start()
    with image.open() as opened:
        opened.write(b"other", 0)  # would hand it over
        (owner,) = holders(image)
        with pytest.raises(nbd.Error):
            server.connect(image.name)
        wait_until(lambda: f"image '{image.spec}' is locked by {owner}" in server.log())
    server.connect(image.name).pwrite(b"now", 0)


def test_rbd_bench_and_qemu_are_refused_by_a_kept_lock(locked, cluster, image):
    bench = ["bench", "--io-type=write", "--io-size=4096", "--io-total=4096", image.spec]
    with pytest.raises(AssertionError, match="Read-only file system"):
        cluster.rbd(*bench)
    url = f"rbd:{image.spec}:id=rw:conf={cluster.conf}"
    qemu = ["qemu-io", "-f", "raw", "-c", "write -P 7 1M 4k", url]
    written = subprocess.run(qemu, capture_output=True, text=True)
    assert "Read-only file system" in written.stdout + written.stderr
    assert image.read(MIB, 4096) == bytes(4096)


def test_by_default_rbd_bench_and_qemu_get_the_lock(server, cluster, image):
    client = server.start().connect()
    client.pwrite(b"first", 8 * MIB)
    cluster.rbd("bench", "--io-type=write", "--io-size=4096", "--io-total=4096", image.spec)
    url = f"rbd:{image.spec}:id=rw:conf={cluster.conf}"
    qemu = ["qemu-io", "-f", "raw", "-c", "write -P 7 1M 4k", url]
    subprocess.run(qemu, check=True, capture_output=True)
    client.pwrite(b"again", 8 * MIB)
    assert client.pread(4096, MIB) == b"\7" * 4096


def test_rbd_lock_keeps_a_gateway_out_that_wants_the_lock(servers, cluster, image):
    cluster.rbd("lock", "add", image.spec, "mine")
    with image.open() as opened:
        ((locker, _, address),) = opened.list_lockers()["lockers"]
    message = refused(servers(image, lock="exclusive"))
    assert f"image '{image.spec}' is locked by {address}" in message
    cluster.rbd("lock", "rm", image.spec, "mine", locker)
    servers(image, lock="exclusive").start().connect().pwrite(b"mine", 0)


def test_all_connections_share_the_kept_lock_and_the_last_gives_it_back(servers, image):
    server = servers(image, lock="exclusive").start()
    clients = [server.connect() for _ in range(4)]
    for number, client in enumerate(clients):
        client.pwrite(b"%d" % number, number)
    assert len(holders(image)) == 1
    for client in clients:
        client.shutdown()
    wait_until(lambda: not holders(image))
    image.write(b"free", 0)
    server.connect().pwrite(b"back", 0)


def test_an_image_without_a_lock_cannot_be_kept(servers, images):
    image = images.create(features=rbd.RBD_FEATURE_LAYERING)
    message = refused(servers(image, lock="exclusive"))
    assert f"image '{image.spec}' has not the feature exclusive-lock" in message


def test_read_only_exports_need_no_lock(locked, servers, image):
    image.snap("s")
    assert servers(image, snapshot="s", lock="exclusive").start().connect().pread(1, 0) == b"\0"
