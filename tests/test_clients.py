# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Clients that break off, say nothing, or say what the protocol forbids: nobody else notices."""

import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading

import nbd
import pytest
from conftest import MIB, PATIENCE, wait_until


@pytest.fixture
def gateway(servers, cluster):
    return servers(None, pool=cluster.pool, exports="*")


@contextlib.contextmanager
def bystander(server, image):
    """A client of another image, which reads and writes all the time and must not notice."""
    client, stop, failures, count = server.connect(image.name), threading.Event(), [], [0]

    def work():
        try:
            while not stop.is_set():
                data = bytes([count[0] % 251]) * 4096
                client.pwrite(data, 4096 * (count[0] % 100))
                assert client.pread(4096, 4096 * (count[0] % 100)) == data
                count[0] += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
        reached = count[0] + 10
        wait_until(lambda: count[0] > reached or failures)
    finally:
        stop.set()
        thread.join()
    assert not failures
    client.shutdown()


@contextlib.contextmanager
def leaving_nothing(server, *exports):
    """Threads and descriptors come back to what they were with no client."""
    for export in exports:
        server.connect(export).shutdown()
    before = server.threads(), server.descriptors()
    yield
    wait_until(lambda: server.threads() <= before[0] and server.descriptors() <= before[1])


def raw(server, export=""):
    """A connection without a library in between, in transmission."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(server.socket))
    assert connection.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
    connection.sendall(struct.pack(">I", 3))
    name = export.encode()
    connection.sendall(b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
    assert len(connection.recv(10, socket.MSG_WAITALL)) == 10
    return connection


def request(kind, offset, length, flags=0, magic=0x25609513):
    return struct.pack(">IHHQQI", magic, flags, kind, 0, offset, length)


DIES = """
import nbd, os, sys
client = nbd.NBD()
client.set_uri_allow_local_file(True)
client.connect_uri(sys.argv[1])
data = nbd.Buffer.from_bytearray(bytearray(b"k" * (1 << 20)))
for number in range(8):
    client.aio_pread(nbd.Buffer(1 << 20), number << 20)
    client.aio_pwrite(data, number << 20)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["gateway", "image with parallel=no"])
def test_clients_that_are_killed_in_mid_request_harm_nobody(servers, gateway, images, how):
    victim = images.create()
    server = gateway if how == "gateway" else servers(victim, parallel="no")
    export = victim.name if how == "gateway" else ""
    server.start()
    uri = f"nbd+unix:///{export}?socket={server.socket}"
    other = images.create() if how == "gateway" else victim
    at_side = bystander(server, other) if how == "gateway" else contextlib.nullcontext()
    with leaving_nothing(server, export), at_side:
        for _ in range(10):
            dying = [
                subprocess.Popen([sys.executable, "-c", DIES, uri], stderr=subprocess.DEVNULL)
                for _ in range(4)
            ]
            assert [process.wait() for process in dying] == [-9] * 4
    assert server.process.poll() is None
    client = server.connect(export)
    client.pwrite(b"alive", 0)
    assert client.pread(5, 0) == b"alive"


@pytest.mark.parametrize("kind", ["image", "gateway"])
@pytest.mark.parametrize("parallel", ["auto", "yes", "no"])
def test_requests_are_served_side_by_side_where_nbdkit_can(
    servers, gateway, image, affected, kind, parallel
):
    server = servers(image) if kind == "image" else gateway
    server.options = ["-v"]
    server.parameters["parallel"] = parallel
    server.start().connect("" if kind == "image" else image.name)
    side_by_side = {"yes": True, "no": False, "auto": kind == "image" or not affected}[parallel]
    expected = "processing requests with 16 threads" if side_by_side else "requests serially"
    wait_until(lambda: "processing requests" in server.log())
    assert expected in server.log()
    warned = "this nbdkit may abort" in server.log()
    assert warned == (affected and kind == "image" and parallel == "auto")


def test_a_client_that_does_not_read_its_replies_holds_up_nobody(gateway, images):
    victim, other = images.create(), images.create()
    gateway.start()
    with leaving_nothing(gateway, other.name), bystander(gateway, other):
        deaf = raw(gateway, victim.name)
        deaf.settimeout(1)
        with contextlib.suppress(TimeoutError):  # nbdkit takes no more when it cannot answer
            for _ in range(64):
                deaf.sendall(request(0, 0, 8 * MIB))
        gateway.connect(victim.name).shutdown()
        deaf.close()


def test_a_client_that_does_not_read_its_replies_does_not_keep_nbdkit_from_a_clean_end(
    gateway, images
):
    victim, other = images.create(), images.create()
    gateway.parameters["ceph.rbd_cache_policy"] = "writeback"
    client = gateway.start().connect(other.name)
    client.pwrite(b"x", 0)
    client.flush()
    client.pwrite(b"acknowledged early", 0)
    deaf = raw(gateway, victim.name)
    for _ in range(4):
        deaf.sendall(request(0, 0, 8 * MIB))
    assert deaf.recv(1, socket.MSG_PEEK)  # nbdkit is about to send more than it can
    gateway.end(signal.SIGTERM)
    deaf.close()
    assert gateway.process.returncode == 0
    assert other.read(0, 18) == b"acknowledged early"


def test_half_open_connections_hold_up_nobody(gateway, images):
    victim, other = images.create(), images.create()
    gateway.start()
    with leaving_nothing(gateway, other.name), bystander(gateway, other):
        silent = []
        for number in range(100):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(gateway.socket))
            if number % 2:
                connection.sendall(struct.pack(">I", 3) + b"IHAVEOPT"[: number % 8])
            silent.append(connection)
        gateway.connect(victim.name).shutdown()
        for connection in silent:
            connection.close()


GARBAGE = {
    "noise": os.urandom(4096),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown flags": struct.pack(">I", 0xFFFFFFFF),
    "a huge option": struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, 0xFFFFFFFF),
    "a long name": struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 4097) + b"x" * 4097,
    "no text": struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"\xff\xfe\0\1",
    "an unknown option": struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 99, 0),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_in_the_handshake_hurts_nobody(gateway, images, garbage):
    other = images.create()
    gateway.start()
    with leaving_nothing(gateway, other.name), bystander(gateway, other):
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(PATIENCE)
                connection.connect(str(gateway.socket))
                with contextlib.suppress(ConnectionError):
                    connection.sendall(garbage)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass


FORBIDDEN = {
    "an unknown command": (request(77, 0, 512), errno.EINVAL),
    "a read past the end": (request(0, 64 * MIB - 1, 2), errno.EINVAL),
    "a read far past the end": (request(0, (1 << 64) - 512, 1024), errno.EINVAL),
    "a read of nothing": (request(0, 0, 0), errno.EINVAL),
    "a read of too much": (request(0, 0, (64 * MIB) + 1), errno.EINVAL),
    "a read with unknown flags": (request(0, 0, 512, flags=1 << 14), errno.EINVAL),
    "a trim past the end": (request(4, 64 * MIB, 512), errno.EINVAL),
    "block status, not negotiated": (request(7, 0, 512), errno.EINVAL),
    "a flush of a range": (request(3, 512, 512), errno.EINVAL),
}


@pytest.mark.parametrize("parameters", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_a_forbidden_request_is_an_error_and_no_more(gateway, images, parameters):
    data, error = parameters
    image = images.create()
    image.write(b"as it was", 0)
    connection = raw(gateway.start(), image.name)
    connection.sendall(data)
    answer = connection.recv(16, socket.MSG_WAITALL)
    assert struct.unpack(">II", answer[:8]) == (0x67446698, error)
    # The connection goes on.
    connection.sendall(request(0, 0, 9))
    assert connection.recv(16 + 9, socket.MSG_WAITALL)[16:] == b"as it was"
    connection.close()


def test_a_request_with_a_wrong_magic_ends_the_connection(gateway, images):
    victim, other = images.create(), images.create()
    gateway.start()
    with bystander(gateway, other):
        connection = raw(gateway, victim.name)
        connection.sendall(request(0, 0, 512, magic=0x12345678))
        assert connection.recv(1) == b""
        connection.close()


def test_many_connections_one_after_another_and_at_once_leave_nothing(gateway, image):
    gateway.start()

    def connect():
        client = nbd.NBD()
        client.connect_uri(f"nbd+unix:///{image.name}?socket={gateway.socket}")
        return client

    with leaving_nothing(gateway, image.name):
        for _ in range(1000):
            connect().shutdown()
        at_once = [connect() for _ in range(100)]
        for number, client in enumerate(at_once):
            client.pwrite(b"%03d" % number, number * 4096)
        for number, client in enumerate(at_once):
            assert client.pread(3, number * 4096) == b"%03d" % number
            client.shutdown()
