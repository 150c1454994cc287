# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""What a client is told when it connects, and what a connection holds."""

import contextlib
import errno
import os
import subprocess

import nbd
import pytest
import rbd
from conftest import (
    GIB,
    MIB,
    PLUGIN,
    Server,
    refused,
    unique,
    wait_for_answers,
    wait_until,
)


def test_a_writable_image_offers_every_command(server, image):
    client = server.start().connect()
    assert client.get_size() == 64 * MIB
    assert not client.is_read_only()
    assert client.can_flush()
    assert client.can_fua()
    assert client.can_trim()
    assert client.can_zero()
    assert client.can_fast_zero()
    assert client.can_multi_conn()
    assert client.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    assert not client.is_rotational()


def test_the_export_describes_itself(servers, image):
    server = servers(image).start()
    shown = subprocess.run(
        ["nbdinfo", f"nbd+unix://?socket={server.socket}"], capture_output=True, text=True
    ).stdout
    assert f"description: RBD image {image.spec}\n" in shown


@pytest.mark.parametrize(
    ("policy", "cached"), [("writearound", False), ("writeback", True), ("writethrough", True)]
)
def test_cache_is_offered_where_librbd_keeps_what_is_read(servers, image, policy, cached):
    client = servers(image, **{"ceph.rbd_cache_policy": policy}).start().connect()
    assert client.can_cache() == cached


def test_cache_is_not_offered_without_librbds_cache(servers, image):
    parameters = {"ceph.rbd_cache_policy": "writeback", "ceph.rbd_cache": "false"}
    assert not servers(image, **parameters).start().connect().can_cache()


def test_the_cache_policy_of_the_image_itself_counts(servers, image, cluster):
    cluster.rbd("config", "image", "set", image.spec, "rbd_cache_policy", "writeback")
    assert servers(image).start().connect().can_cache()


@pytest.mark.parametrize(
    ("order", "stripe_unit", "preferred"),
    [(22, 0, 4 * MIB), (25, 0, 32 * MIB), (12, 0, 4096), (22, 65536, 65536), (22, 1024, 4096)],
)
def test_a_reader_prefers_what_lies_in_one_object_and_a_writer_4_kib(
    servers, images, order, stripe_unit, preferred
):
    image = images.create(
        order=order, stripe_unit=stripe_unit, stripe_count=4 if stripe_unit else 0
    )
    server, writable = servers(image), servers(image)
    server.options = ["-r"]
    for export, best in (server, preferred), (writable, 4096):
        client = export.start().connect()
        assert client.get_block_size(nbd.SIZE_MINIMUM) == 1
        # nbdcopy would write out whole blocks of zeroes if it was more.
        assert client.get_block_size(nbd.SIZE_PREFERRED) == best
        assert client.get_block_size(nbd.SIZE_MAXIMUM) == 64 * MIB


@pytest.mark.parametrize("size", [0, 1, 511, 4 * MIB + 1, 16 * GIB + 3])
def test_any_size_is_served_exactly(servers, images, size):
    image = images.create(size)
    client = servers(image).start().connect()
    assert client.get_size() == size
    if size:
        client.pwrite(b"z", size - 1)
        assert client.pread(1, size - 1) == b"z"


# ---- read-only ---------------------------------------------------------------


def assert_read_only(client):
    assert client.is_read_only()
    assert client.pread(3, 0) == b"old"
    for change in (
        lambda: client.pwrite(b"new", 0),
        lambda: client.zero(3, 0),
        lambda: client.trim(65536, 0),
    ):
        with pytest.raises(nbd.Error) as refusal:
            change()
        assert refusal.value.errnum == errno.EPERM
    assert client.pread(3, 0) == b"old"


def test_option_r_makes_the_export_read_only(server, image):
    image.write(b"old", 0)
    server.options = ["-r"]
    assert_read_only(server.start().connect())
    assert image.watchers() == []


def test_a_snapshot_is_read_only(servers, image):
    image.write(b"old", 0)
    image.snap("s")
    assert_read_only(servers(image, snapshot="s").start().connect())
    assert image.watchers() == []


def test_a_non_primary_mirror_is_read_only(servers, images, cluster):
    cluster.rbd("mirror", "pool", "enable", cluster.pool, "image", id="admin")
    image = images.create()
    image.write(b"old", 0)
    cluster.rbd("mirror", "image", "enable", image.spec, "snapshot", id="admin")
    client = servers(image).start().connect()
    assert not client.is_read_only()
    client.shutdown()
    wait_until(lambda: not image.watchers())
    cluster.rbd("mirror", "image", "demote", image.spec, id="admin")
    try:
        assert_read_only(servers(image).start().connect())
        assert image.watchers() == []
    finally:
        cluster.rbd("mirror", "image", "promote", "--force", image.spec, id="admin")
        cluster.rbd("mirror", "image", "disable", image.spec, id="admin")


@pytest.mark.parametrize(
    ("option", "parameters"),
    [
        (["-r"], {}),
        (["--readonly"], {}),
        (["-rv"], {}),
        (["-vr"], {}),
        ([], {"snapshot": "s"}),
        ([], {"access": "*/*:ro"}),
    ],
)
def test_a_read_only_key_is_enough_for_reading(servers, image, option, parameters):
    image.write(b"old", 0)
    image.snap("s")
    server = servers(image, id="ro", **parameters)
    server.options = option
    client = server.start().connect()
    assert_read_only(client)
    assert client.block_status(64 * MIB, 0, lambda *_: None) is None


def test_a_read_only_key_without_option_r_is_refused_with_a_hint(servers, image):
    message = refused(servers(image, id="ro"))
    assert f"no permission to open image '{image.spec}'" in message
    assert "if the key is read-only, start nbdkit with -r" in message
    server = servers(image, id="ro", probe="no").start()
    with pytest.raises(nbd.Error):
        server.connect()
    server.stop()
    assert "no permission to open image" in server.log()
    assert "start nbdkit with -r" in server.log()


# ---- what connections share --------------------------------------------------


def test_all_connections_share_one_open_image(server, image):
    server.start()
    clients = [server.connect() for _ in range(5)]
    assert len(image.watchers()) == 1
    for client in clients[1:]:
        client.shutdown()
    clients[0].pwrite(b"still here", 0)
    assert len(image.watchers()) == 1


def test_the_last_connection_closes_the_image(server, image):
    server.start()
    clients = [server.connect() for _ in range(3)]
    for client in clients:
        client.shutdown()
    wait_until(lambda: not image.watchers())
    assert server.connect().pread(1, 0) == b"\0"


@pytest.mark.parametrize("options", [[], ["-r"]], ids=["writable", "read-only"])
def test_a_resize_is_seen_by_the_next_connection(server, image, options):
    server.options = options
    first = server.start().connect()
    with image.open() as opened:
        opened.resize(96 * MIB + 5)
    second = server.connect()
    assert first.get_size() == 64 * MIB
    assert second.get_size() == 96 * MIB + 5
    assert second.pread(1, 96 * MIB + 4) == b"\0"


@pytest.mark.parametrize("options", [[], ["-r"]], ids=["writable", "read-only"])
def test_a_name_that_passed_to_another_image_is_that_image(server, images, image, cluster, options):
    image.write(b"first", 0)
    server.options = options
    old = server.start().connect()
    assert old.pread(5, 0) == b"first"
    rbd.RBD().rename(cluster.ioctx, image.name, moved := unique("moved"))
    other = images.create(name=image.name)
    other.write(b"other", 0)
    image.name = moved
    assert server.connect().pread(5, 0) == b"other"
    assert old.pread(5, 0) == b"first"


def test_a_snapshot_made_again_under_its_name_is_the_new_one(servers, image):
    server = servers(image, snapshot="s")
    image.write(b"first", 0)
    image.snap("s")
    server.start().connect()
    with image.open() as opened:
        opened.remove_snap("s")
    image.write(b"other", 0)
    image.snap("s")
    assert server.connect().pread(5, 0) == b"other"


def test_what_one_connection_left_unflushed_the_next_one_reads(servers, image):
    server = servers(image, **{"ceph.rbd_cache_policy": "writeback"}).start()
    for round in range(20):
        writer = server.connect()
        writer.flush()  # from now on librbd acknowledges writes early
        for block in range(50):
            writer.pwrite(bytes([round]) * 4096, block * 65536)
        writer.shutdown()
        reader = server.connect()
        for block in range(50):
            assert reader.pread(4096, block * 65536) == bytes([round]) * 4096
        reader.shutdown()


# ---- failures to open --------------------------------------------------------


def test_a_failed_open_tells_the_client_no_path_host_or_key(servers, image, cluster, tmp_path):
    server = servers(f"{cluster.pool}/{unique('missing')}", probe="no")
    server.options = ["--verbose"]
    server.start()
    shown = subprocess.run(
        ["nbdinfo", f"nbd+unix://?socket={server.socket}"], capture_output=True, text=True
    )
    assert shown.returncode != 0
    said = shown.stderr.replace(str(server.socket), "")
    for secret in ("/work", "rbd_export.py", "127.0.0.1", "keyring", ".conf", "/"):
        assert secret not in said.replace(f"{cluster.pool}/", ""), said
    server.stop()
    assert "image '" in server.log()


def test_the_log_names_the_cause_of_a_failed_open_once(servers, cluster):
    name = unique("missing")
    server = servers(f"{cluster.pool}/{name}", probe="no").start()
    with pytest.raises(nbd.Error):
        server.connect()
    server.stop()
    assert server.log().count("not found") == 1
    assert f"image '{cluster.pool}/{name}' not found" in server.log()
    # nbdkit since 1.42 sends the client this very line.
    assert str(PLUGIN) not in server.log()


def test_failed_opens_leave_nothing_behind(servers, image, cluster):
    with cluster.key(mon="profile rbd", osd="profile rbd-read-only") as login:
        server = servers(image, **login, probe="no").start()

        def fail():
            with pytest.raises(nbd.Error):
                server.connect()

        fail()
        before = server.threads(), server.descriptors()
        for _ in range(20):
            fail()
        wait_until(lambda: server.threads() <= before[0] and server.descriptors() <= before[1])
        assert image.watchers() == []


def test_failed_logins_leave_nothing_behind(servers, image):
    server = servers(image, id="nobody", probe="no").start()

    def fail():
        with pytest.raises(nbd.Error):
            server.connect()

    fail()
    before = server.threads(), server.descriptors()
    for _ in range(10):
        fail()
    wait_until(lambda: server.threads() <= before[0] and server.descriptors() <= before[1])


def test_connections_come_and_go_without_a_trace(server, image):
    server.start()
    server.connect().shutdown()
    wait_until(lambda: not image.watchers())
    before = server.threads(), server.descriptors()
    for _ in range(50):
        client = server.connect()
        client.pwrite(b"x" * 4096, 0)
        client.shutdown()
    wait_until(lambda: not image.watchers())
    wait_until(lambda: server.threads() <= before[0] and server.descriptors() <= before[1])


def use_threads(client):
    """Have several threads of nbdkit serve a client at once: reads, writes and a flush."""
    data = nbd.Buffer.from_bytearray(bytearray(4096))
    for number in range(16):
        client.aio_pread(nbd.Buffer(4096), number * 8192)
        client.aio_pwrite(data, number * 8192 + 4096)
    wait_for_answers(client)
    client.flush()


@pytest.mark.timeout(150)
def test_a_thousand_connections_with_requests_leave_no_memory_behind(server):
    first = server.start().connect()  # the image stays open
    use_threads(first)

    def serve(count):
        """Return the memory in use when they have gone."""
        for _ in range(count):
            client = nbd.NBD()
            server.attach(client)
            use_threads(client)
            client.shutdown()
        wait_until(lambda: server.threads() <= threads)
        return server.memory()

    threads = server.threads()
    before = serve(200)
    # With the Python states of threads that have ended it would be 80 MB.
    assert serve(1000) < before + 16 * MIB


@pytest.mark.parametrize("clients", ["idle", "busy"])
def test_nbdkit_ends_with_status_0_while_clients_are_connected(server, clients, affected):
    if affected and clients == "busy":
        server.parameters["parallel"] = "no"
    server.start()
    connected = [server.connect() for _ in range(4)]
    for client in connected:
        use_threads(client)
    if clients == "busy":
        data = nbd.Buffer.from_bytearray(bytearray(65536))
        for client in connected:
            for number in range(16):
                client.aio_pwrite(data, number * MIB)
    server.process.terminate()
    for client in connected:
        with contextlib.suppress(nbd.Error):  # cut off
            wait_for_answers(client)
    status = server.process.wait(10)
    server.reader.join()
    assert status == 0, server.log()
    assert "rbd_export ends" in server.log()
    assert "Fatal" not in server.log()


def test_an_nbdkit_whose_only_thread_has_served_a_client_ends_with_status_0(server, tmp_path):
    command = [part for part in server.command if not part.startswith(("--unix", "--pidfile"))]
    command[1:1] = ["--single", "--threads=1"]
    status = tmp_path / "status"
    client = nbd.NBD()
    client.connect_command(["sh", "-c", f'"$@"; echo $? >{status}', "sh", *command])
    assert client.pread(512, 0) == bytes(512)
    client.shutdown()
    wait_until(lambda: status.exists() and status.read_text())
    assert status.read_text() == "0\n"


def test_servers_can_run_side_by_side_on_one_image(servers, image):
    first, second = servers(image).start().connect(), servers(image).start().connect()
    for round in range(5):
        first.pwrite(bytes([round]) * 512, 0)
        first.flush()
        assert second.pread(512, 0) == bytes([round]) * 512
        second.pwrite(bytes([round + 100]) * 512, 512)
        second.flush()
        assert first.pread(512, 512) == bytes([round + 100]) * 512


def test_nbdkit_as_in_the_readme_serves_over_tcp(image, cluster, tmp_path):
    server = Server(tmp_path, conf=cluster.conf, id="rw", image=image.spec)
    command = server.command
    command[command.index(f"--unix={server.socket}")] = "--unix=-"
    shown = subprocess.run(
        [*command, "--run", "nbdinfo --size $uri"], capture_output=True, text=True
    )
    assert shown.stdout == f"{64 * MIB}\n", shown.stderr
    assert os.listdir(tmp_path) == ["nbdkit.pid"]
