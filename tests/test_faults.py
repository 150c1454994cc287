# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""What a client is told when the cluster refuses or does not answer."""

import concurrent.futures
import contextlib
import errno
import itertools
import json
import re
import signal
import subprocess
import threading
import time

import nbd
import pytest
import rbd
from conftest import (
    CACHES,
    MIB,
    PATIENCE,
    Daemon,
    Server,
    failure,
    wait_for_answers,
    wait_until,
    wait_until_it_works,
)


def test_a_fenced_client_stays_refused_until_it_reconnects(server, image, cluster):
    client = server.start().connect()
    other = server.connect()
    client.pwrite(b"before", 0)
    client.flush()
    (watcher,) = image.watchers()
    with cluster.blocklisted(watcher["addr"]):
        assert failure(client.pwrite, b"zombie", 0) == errno.ESHUTDOWN
        image.write(b"takeover", 0)
    # The fence is gone; the client still does not know who wrote since.
    assert failure(client.pwrite, b"zombie", 0) == errno.ESHUTDOWN
    assert failure(client.pread, 6, 0) == errno.ESHUTDOWN
    assert failure(client.flush) == errno.ESHUTDOWN
    assert failure(other.pwrite, b"zombie", 0) == errno.ESHUTDOWN
    assert image.read(0, 8) == b"takeover"
    again = server.connect()
    assert again.pread(8, 0) == b"takeover"
    again.pwrite(b"goes on!", 0)
    assert again.pread(8, 0) == b"goes on!"
    server.stop()
    assert "RBD connection was shutdown" in server.log() or "108" in server.log()


@pytest.mark.parametrize("features", [None, rbd.RBD_FEATURE_LAYERING], ids=["lock", "no lock"])
@pytest.mark.parametrize("asks", ["while it is fenced", "when the fence is gone"])
def test_what_a_fenced_client_wrote_and_did_not_flush_never_lands(
    servers, images, cluster, asks, features
):
    image = images.create(features=features)
    server = servers(image, **{"write-cache": "yes"})
    client = server.start().connect()
    other = server.connect()
    client.pwrite(b"before", 0)
    client.flush()
    (watcher,) = image.watchers()
    with cluster.blocklisted(watcher["addr"]):
        client.pwrite(b"zombie", 0)  # answered early
        image.write(b"takeover", 0)
        if asks == "while it is fenced":
            assert failure(other.flush) == errno.ESHUTDOWN
    assert failure(client.flush) == errno.ESHUTDOWN
    assert failure(client.pread, 6, 0) == errno.ESHUTDOWN
    assert failure(client.pwrite, b"zombie", 0) == errno.ESHUTDOWN
    assert failure(other.flush) == errno.ESHUTDOWN
    assert image.read(0, 8) == b"takeover"
    again = server.connect()
    assert again.pread(8, 0) == b"takeover"
    again.pwrite(b"goes on!", 0)
    assert again.pread(8, 0) == b"goes on!"
    server.stop()
    assert image.read(0, 8) == b"goes on!"


def test_a_client_that_connects_after_the_fence_works_at_once(server, image, cluster):
    client = server.start().connect()
    (watcher,) = image.watchers()
    with cluster.blocklisted(watcher["addr"]):
        assert server.connect().pread(1, 0) == b"\0"
        assert failure(client.pread, 1, 0) == errno.ESHUTDOWN
        threads = server.threads()
        client.shutdown()
        # The fenced connection to the cluster goes with its last client.
        wait_until(lambda: server.threads() < threads - 16)


def test_fenced_clients_leave_nothing_behind(server, image, cluster):
    def fenced():
        client = server.connect()
        (watcher,) = image.watchers()
        with cluster.blocklisted(watcher["addr"]):
            assert failure(client.pread, 1, 0) == errno.ESHUTDOWN
        client.shutdown()

    server.start()
    fenced()
    server.connect().shutdown()
    before = server.threads()
    for _ in range(3):
        fenced()
    server.connect().shutdown()
    wait_until(lambda: server.threads() <= before)


@contextlib.contextmanager
def full_pool(cluster):
    def full():
        pools = json.loads(cluster.ceph("osd", "pool", "ls", "detail", "--format", "json"))
        (flags,) = [p["flags_names"] for p in pools if p["pool_name"] == cluster.pool]
        return "full" in flags

    cluster.ceph("osd", "pool", "set-quota", cluster.pool, "max_objects", "1")
    try:
        wait_until(full)
        yield
    finally:
        cluster.ceph("osd", "pool", "set-quota", cluster.pool, "max_objects", "0")
        wait_until(lambda: not full())


def test_a_full_pool_is_enospc_and_reads_go_on(servers, images, cluster):
    image = images.create()
    image.write(b"r" * 4096, 0)
    client = servers(image).start().connect()
    client.flush()  # from here on librbd could acknowledge writes early
    with full_pool(cluster):
        assert failure(client.pwrite, b"x" * 4096, 32 * MIB) == errno.ENOSPC
        assert client.pread(4096, 0) == b"r" * 4096
    client.pwrite(b"x" * 4096, 32 * MIB)


def test_a_flush_to_a_full_pool_is_enospc_until_there_is_space(server, image, cluster):
    image.write(b"r" * 4096, 0)
    server.parameters["write-cache"] = "yes"
    client, other = server.start().connect(), server.connect()
    client.flush()
    with full_pool(cluster):
        client.pwrite(b"x" * 4096, 32 * MIB)  # answered early
        for meets in [
            client.flush,
            other.flush,
            client.flush,
            lambda: client.pread(4096, 32 * MIB),
            lambda: other.pread(4096, 32 * MIB + 2048),
            lambda: other.pread(4096, 32 * MIB - 2048),
            lambda: other.block_status(4096, 32 * MIB, lambda *_: None),
            lambda: other.pwrite(b"y", 32 * MIB + 4095),
            lambda: other.pwrite(b"y", 32 * MIB, FUA),
            lambda: other.zero(4096, 32 * MIB),
            lambda: other.trim(64 << 10, 32 * MIB),
        ]:
            assert failure(meets) == errno.ENOSPC
        assert client.pread(4096, 0) == b"r" * 4096
    client.flush()
    server.kill()
    assert image.read(32 * MIB, 4096) == b"x" * 4096


def test_a_key_that_may_not_write_data_is_eperm(servers, image, cluster):
    image.write(b"old", 0)
    where = f"pool={cluster.pool} object_prefix rbd_"
    caps = f"allow rx pool={cluster.pool}, allow rwx {where}header, allow rwx {where}object_map"
    with cluster.key(mon="profile rbd", osd=caps) as login:
        client = servers(image, **login, **{"ceph.rbd_cache": "false"}).start().connect()
        assert client.pread(3, 0) == b"old"
        assert failure(client.pwrite, b"new", 0) == errno.EPERM
        assert client.pread(3, 0) == b"old"


def test_io_timeout_ends_a_request_that_the_cluster_does_not_answer(stoppable):
    stoppable.parameters["io-timeout"] = 2
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    stoppable.osd.stop()
    begin = time.monotonic()
    assert failure(client.pread, 4096, 0) == errno.EIO
    assert 1.5 < time.monotonic() - begin < 10
    stoppable.osd.resume()
    assert client.pread(4096, 0) == b"x" * 4096


def test_io_timeout_does_not_add_up_for_requests_at_once(stoppable):
    stoppable.image.snap("s")
    stoppable.parameters |= {"io-timeout": 2, "snapshot": "s"}
    client = stoppable.start().connect()
    assert client.pread(4096, 0) == bytes(4096)
    stoppable.osd.stop()
    begin = time.monotonic()
    buffers = [nbd.Buffer(4096) for _ in range(8)]
    reads = [client.aio_pread(buffer, number * 4096) for number, buffer in enumerate(buffers)]
    wait_for_answers(client)
    assert time.monotonic() - begin < 10
    assert [failure(client.aio_command_completed, read) for read in reads] == [errno.EIO] * 8


def test_without_io_timeout_a_request_waits_for_the_cluster(stoppable):
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    stoppable.osd.stop()
    buffer = nbd.Buffer(4096)
    cookie = client.aio_pread(buffer, 0)
    assert client.poll(3000) == 0 or not client.aio_command_completed(cookie)
    stoppable.osd.resume()
    wait_for_answers(client)
    assert client.aio_command_completed(cookie)
    assert buffer.to_bytearray() == b"x" * 4096


def test_the_probe_tells_of_osds_that_do_not_answer(stoppable):
    from conftest import refused

    stoppable.parameters["connect-timeout"] = 2
    stoppable.osd.stop()
    begin = time.monotonic()
    assert "no OSD has answered within 2 s (connect-timeout)" in refused(stoppable)
    assert time.monotonic() - begin < 10


FUA = nbd.CMD_FLAG_FUA


def test_a_promise_is_not_answered_before_the_cluster_has_answered(stoppable):
    stoppable.parameters |= {
        "ceph.rbd_cache_policy": "writeback",
        "ceph.rbd_cache_writethrough_until_flush": "false",
    }
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0, FUA)
    stoppable.osd.stop()
    client.pwrite(b"y" * 4096, MIB)  # no promise: answered at once
    data = nbd.Buffer.from_bytearray(bytearray(b"z" * 4096))
    promises = [
        client.aio_pwrite(data, 2 * MIB, flags=FUA),
        client.aio_zero(4096, 3 * MIB, flags=FUA),
        client.aio_trim(8 * MIB, 8 * MIB, flags=FUA),
        client.aio_flush(),
    ]
    # Time enough for a wrong answer; a right one cannot come.
    assert client.poll(2000) == 0
    stoppable.osd.resume()
    wait_for_answers(client)
    assert all(client.aio_command_completed(cookie) for cookie in promises)


def test_by_default_no_write_is_answered_before_the_cluster_has_answered(stoppable):
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    client.flush()  # from here on librbd could acknowledge writes early
    stoppable.osd.stop()
    cookie = client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"y" * 4096)), 0)
    assert client.poll(2000) == 0
    stoppable.osd.resume()
    wait_for_answers(client)
    assert client.aio_command_completed(cookie)


@pytest.mark.parametrize("cache", ["write cache", "writeback"])
def test_a_flush_fails_until_what_was_acknowledged_is_safe(stoppable, cache):
    stoppable.parameters |= {"io-timeout": 2, **CACHES[cache]}
    a, b = stoppable.start().connect(), stoppable.connect()
    for client in (a, b):
        client.pwrite(b"x" * 4096, 0)
        client.flush()
    stoppable.osd.stop()
    a.pwrite(b"a" * 4096, 0)  # acknowledged early
    b.pwrite(b"b" * 4096, 8192)
    assert [failure(a.flush), failure(b.flush), failure(a.flush)] == [errno.EIO] * 3
    stoppable.osd.resume()
    wait_until_it_works(a.flush)
    stoppable.kill()
    assert stoppable.image.read(0, 4096) == b"a" * 4096
    assert stoppable.image.read(8192, 4096) == b"b" * 4096


def test_a_request_never_fails_with_einval_for_a_fault_of_the_cluster(stoppable):
    stoppable.parameters["io-timeout"] = 1
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    stoppable.osd.stop()
    calls = [
        lambda: client.pread(4096, 0),
        lambda: client.pwrite(b"x", 0, FUA),
        lambda: client.zero(4096, 0, FUA),
        lambda: client.trim(8 * MIB, 0, FUA),
        lambda: client.block_status(64 * MIB, 0, lambda *_: None),
    ]
    assert [failure(call) for call in calls] == [errno.EIO] * len(calls)


@pytest.mark.parametrize("option", [["--filter=retry"], ["--filter", "retry"]], ids="".join)
def test_under_a_filter_that_retries_a_flush_is_answered_when_the_data_is_safe(
    server, image, cluster, option
):
    server.options = option
    server.parameters["write-cache"] = "yes"
    server.extra = ["retries=60", "retry-delay=1", "retry-exponential=no"]
    image.write(b"r" * 4096, 0)
    client = server.start().connect()
    client.flush()
    with full_pool(cluster):
        data = nbd.Buffer.from_bytearray(bytearray(b"x" * 4096))
        cookies = [client.aio_pwrite(data, 32 * MIB), client.aio_flush()]
        wait_until(lambda: "pwrite: error" in server.log())
    wait_for_answers(client)
    assert all(client.aio_command_completed(cookie) for cookie in cookies)
    client.flush()
    server.kill()
    assert image.read(32 * MIB, 4096) == b"x" * 4096


@pytest.mark.parametrize("cut", [[], ["-t", "1"]], ids=["threads", "one thread"])
def test_a_filter_that_retries_writes_nothing_for_a_fenced_client(server, image, cluster, cut):
    server.options = ["--filter=retry", *cut]
    server.extra = ["retries=1", "retry-delay=1"]
    client = server.start().connect()
    client.pwrite(b"before", 0)
    (watcher,) = image.watchers()
    with cluster.blocklisted(watcher["addr"]):
        image.write(b"takeover", 0)
        assert failure(client.pwrite, b"zombie", 0) == errno.ESHUTDOWN
    assert failure(client.pwrite, b"zombie", 0) == errno.ESHUTDOWN
    assert failure(client.flush) == errno.ESHUTDOWN
    assert image.read(0, 8) == b"takeover"
    assert "must reconnect" in server.log()
    again = server.connect()
    again.pwrite(b"goes on!", 0)
    assert again.pread(8, 0) == b"goes on!"


def test_a_filter_that_retries_gets_over_a_fault_that_passes(stoppable):
    stoppable.options = ["--filter=retry"]
    stoppable.extra = ["retries=20", "retry-delay=1", "retry-exponential=no"]
    stoppable.parameters |= {"io-timeout": 1}
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    stoppable.osd.stop()
    cookie = client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"y" * 4096)), 0)
    wait_until(lambda: "pwrite: error" in stoppable.log())
    stoppable.osd.resume()
    wait_for_answers(client)
    assert client.aio_command_completed(cookie)
    assert client.pread(4096, 0) == b"y" * 4096


def refusal(server):
    client = nbd.NBD()
    with pytest.raises(nbd.Error):
        client.connect_unix(str(server.socket))


def test_a_client_is_refused_in_time_while_no_osd_answers(stoppable):
    stoppable.parameters["connect-timeout"] = 2
    stoppable.start().connect().shutdown()
    stoppable.osd.stop()
    threads = stoppable.threads()
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        refusals = [pool.submit(refusal, stoppable) for _ in range(10)]
        if concurrent.futures.wait(refusals, 15).not_done:
            stoppable.osd.resume()  # or the clients would wait for ever
        for done in refusals:
            done.result()
    assert time.monotonic() - begin < 15
    wait_until(lambda: stoppable.log().count("no answer within 2 s (connect-timeout)") == 10)
    # Clients that come again do not pile up.
    refusal(stoppable)
    wait_until(lambda: stoppable.threads() <= threads + 10)
    stoppable.osd.resume()
    client = stoppable.connect()
    client.pwrite(b"again", 0)
    client.shutdown()
    wait_until(lambda: not stoppable.image.watchers())


def test_the_list_of_exports_is_refused_in_time_while_no_osd_answers(stoppable):
    del stoppable.parameters["image"]
    stoppable.parameters |= {"connect-timeout": 2, "exports": "*", "pool": stoppable.image.pool}
    stoppable.start().connect(stoppable.image.name).shutdown()
    stoppable.osd.stop()
    begin = time.monotonic()
    refused = subprocess.run(
        ["nbdinfo", "--list", f"nbd+unix://?socket={stoppable.socket}"], capture_output=True
    )
    assert refused.returncode
    assert time.monotonic() - begin < 15
    stoppable.osd.resume()


@pytest.mark.parametrize("waiting", ["a read", "a write", "a client that connects", "the close"])
def test_sigterm_ends_nbdkit_while_the_cluster_does_not_answer(stoppable, waiting):
    if waiting == "the close":
        stoppable.parameters["ceph.rbd_cache_policy"] = "writeback"
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    stoppable.osd.stop()
    connecting = threading.Thread(target=refusal, args=[stoppable])
    if waiting == "a read":
        client.aio_pread(nbd.Buffer(4096), 0)
    elif waiting == "a client that connects":
        before = stoppable.descriptors()
        connecting.start()
        wait_until(lambda: stoppable.descriptors() > before)
    else:
        client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), 0)
        if waiting == "the close":
            wait_for_answers(client)
    begin = time.monotonic()
    stoppable.end(signal.SIGTERM)
    assert time.monotonic() - begin < 6
    assert "ends although the cluster has not answered" in stoppable.log()
    if connecting.is_alive():
        connecting.join()


@pytest.fixture
def quick_watches(private_cluster):
    """Clients that do not answer lose their watch, and with it the lock, after 5 s."""

    def timeout(*words):
        private_cluster.ceph("tell", "osd.0", "config", *words)

    timeout("set", "osd_client_watch_timeout", "5")
    yield
    timeout("unset", "osd_client_watch_timeout")


@pytest.mark.timeout(150)
@pytest.mark.parametrize("filters", [[], ["--filter=retry"]], ids=["plain", "retry filter"])
def test_a_gateway_that_was_frozen_writes_nothing_after_another_took_over(
    stoppable, private_cluster, tmp_path, quick_watches, filters
):
    image, place = stoppable.image, tmp_path / "second"
    place.mkdir()
    stoppable.options = filters
    stoppable.extra = ["retries=1", "retry-delay=1"] if filters else []
    frozen_client = stoppable.start().connect()
    frozen_client.pwrite(b"a" * MIB, 0)
    second = Server(place, conf=private_cluster.conf, id="rw", image=image.spec)
    frozen = Daemon(stoppable.pidfile)
    try:
        data = nbd.Buffer.from_bytearray(bytearray(b"z" * 524288))
        writes = [frozen_client.aio_pwrite(data, number * 524288) for number in range(8)]
        frozen.stop()
        client = second.start().connect()
        for number in range(64):
            client.pwrite(b"b" * 65536, number * 65536)
        client.flush()
        frozen.resume()
        wait_for_answers(frozen_client)
        results = set()
        for write in writes:
            try:
                frozen_client.aio_command_completed(write)
                results.add(0)
            except nbd.Error as error:
                results.add(error.errnum)
        assert errno.ESHUTDOWN in results
        assert results <= {0, errno.ESHUTDOWN}
        for _ in range(3):
            assert failure(frozen_client.pwrite, b"zombie", 0) == errno.ESHUTDOWN
        assert client.pread(4 * MIB, 0) == b"b" * 4 * MIB
        assert image.read(0, 4 * MIB) == b"b" * 4 * MIB
        # Who reconnects is served again, and takes the lock from the second gateway.
        again = stoppable.connect()
        again.pwrite(b"again", 0)
        assert client.pread(5, 0) == b"again"
    finally:
        frozen.resume()
        second.stop()


class Network:
    """The way to the daemons of a cluster, which a test cuts for a while."""

    def __init__(self, cluster):
        osd = json.loads(cluster.ceph("osd", "find", "0", "--format", "json"))
        addresses = [entry["addr"] for entry in osd["addrs"]["addrvec"]]
        addresses.append(cluster.rados.conf_get("mon_host"))
        self.ports = [re.search(r":(\d+)", address)[1] for address in addresses]
        self.is_cut = False

    def change(self, action):
        rule = ["-p", "tcp", "-m", "multiport", "--ports", ",".join(self.ports), "-j", "DROP"]
        subprocess.run(["iptables", "--wait", action, "INPUT", *rule], check=True)

    def stop(self):
        self.is_cut = True
        self.change("-I")

    def resume(self):
        if self.is_cut:
            self.change("-D")
        self.is_cut = False


@pytest.fixture
def faults(stoppable, private_cluster):
    """What a test may stop and resume, by name."""
    pids = private_cluster.directory / "run"
    faults = {
        "OSD stopped": stoppable.osd,
        "monitor stopped": Daemon(pids / "mon.a.pid"),
        "network cut": Network(private_cluster),
    }
    yield faults
    for fault in faults.values():
        fault.resume()


COMMANDS = {
    "read": lambda client: client.pread(4096, 0),
    "write": lambda client: client.pwrite(b"w" * 4096, 0),
    "write with FUA": lambda client: client.pwrite(b"w" * 4096, 0, FUA),
    # What librbd knows not to exist needs no answer: all are about an object that does.
    "zero": lambda client: client.zero(4096, 0, FUA),
    "trim": lambda client: client.trim(MIB, 0, FUA),
    "block status": lambda client: client.block_status(64 * MIB, 0, lambda *_: None),
}


def assert_each_fails_in_time(client, commands):
    for name, command in commands.items():
        begin = time.monotonic()
        assert failure(command, client) == errno.EIO, name
        assert time.monotonic() - begin < 20, name


@pytest.mark.parametrize("cut", ["OSD stopped", "network cut"])
def test_every_command_fails_in_time_and_works_again_afterwards(stoppable, faults, cut):
    stoppable.parameters["io-timeout"] = 1
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    faults[cut].stop()
    assert_each_fails_in_time(client, COMMANDS)
    faults[cut].resume()

    def works():
        for command in COMMANDS.values():
            command(client)
        client.flush()

    wait_until_it_works(works)
    client.pwrite(b"again", 0)
    client.flush()
    assert stoppable.image.read(0, 5) == b"again"


@pytest.mark.parametrize("cut", ["OSD stopped", "network cut"])
def test_what_meets_an_early_write_fails_in_time_and_works_again_afterwards(stoppable, faults, cut):
    stoppable.parameters |= {"io-timeout": 1, "write-cache": "yes"}
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    faults[cut].stop()
    client.pwrite(b"early", 0)
    flushes = dict.fromkeys(["flush", "flush again"], nbd.NBD.flush)
    assert_each_fails_in_time(client, COMMANDS | flushes)
    faults[cut].resume()
    wait_until_it_works(client.flush)
    stoppable.kill()
    assert stoppable.image.read(0, 6) == b"earlyx"


@pytest.mark.parametrize("cut", ["OSD stopped", "network cut"])
def test_without_io_timeout_every_command_waits_and_goes_on(stoppable, faults, cut):
    stoppable.start()
    clients = [stoppable.connect() for _ in COMMANDS]
    clients[0].pwrite(b"x" * 4096, 0)
    faults[cut].stop()
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        waiting = [
            pool.submit(command, client)
            for command, client in zip(COMMANDS.values(), clients, strict=True)
        ]
        try:
            assert not concurrent.futures.wait(waiting, 3).done
        finally:
            faults[cut].resume()
        for future in waiting:
            future.result(PATIENCE)


def test_a_monitor_that_is_gone_is_not_noticed_by_those_who_are_served(stoppable, faults):
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    faults["monitor stopped"].stop()
    for command in COMMANDS.values():
        command(client)
    client.flush()
    stoppable.connect().pwrite(b"late", 0)
    assert client.pread(4, 0) == b"late"


@pytest.mark.parametrize("cut", ["monitor stopped", "network cut"])
def test_sigterm_ends_nbdkit_whatever_is_gone(stoppable, faults, cut):
    client = stoppable.start().connect()
    client.pwrite(b"x" * 4096, 0)
    faults[cut].stop()
    if cut == "network cut":
        client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), 0)
    begin = time.monotonic()
    stoppable.end(signal.SIGTERM)
    assert time.monotonic() - begin < 6


@pytest.fixture
def short_tickets(private_cluster):
    """Clients ask the monitor anew what they may after 5 s at the latest."""
    private_cluster.ceph("config", "set", "mon", "auth_service_ticket_ttl", "5")
    yield
    private_cluster.ceph("config", "rm", "mon", "auth_service_ticket_ttl")


@pytest.mark.timeout(200)
def test_a_key_that_may_no_more_is_eperm_and_a_client_works_again_as_soon_as_it_may(
    stoppable, private_cluster, short_tickets
):
    pool = private_cluster.pool
    caps = {"mon": "profile rbd", "osd": f"profile rbd pool={pool}"}
    with private_cluster.key(**caps) as login:

        def may(osd):
            words = ["auth", "caps", f"client.{login['id']}", "mon", "profile rbd", "osd", osd]
            private_cluster.ceph(*words)

        stoppable.parameters |= login
        client, reader = stoppable.start().connect(), stoppable.connect()
        client.pwrite(b"may", 0)
        may("profile rbd-read-only")

        def refused():
            # The OSD asks when a client connects; it comes up again by itself.
            private_cluster.ceph("osd", "down", "0")
            wait_until(lambda: "1 up" in private_cluster.ceph("osd", "stat"))
            try:
                client.pwrite(b"may", 0)
            except nbd.Error as error:
                return error.errnum
            return None

        assert wait_until(refused) == errno.EPERM
        assert reader.pread(3, 0) == b"may"
        with pytest.raises(nbd.Error):
            stoppable.connect()
        wait_until(lambda: "no permission to open image" in stoppable.log())
        may(caps["osd"])

        def served():
            try:
                return stoppable.connect()
            except nbd.Error:
                return None

        again = wait_until(served)
        again.pwrite(b"back", 0)
        assert again.pread(4, 0) == b"back"
        stoppable.stop()


def test_a_full_osd_is_enospc_and_writes_go_on_when_there_is_space(stoppable, private_cluster):
    client = stoppable.start().connect()
    client.pwrite(b"r" * 4096, 0)

    ratios = {"nearfull": 0.85, "backfillfull": 0.9, "full": 0.95}
    try:
        for name in ratios:
            private_cluster.ceph("osd", f"set-{name}-ratio", "0.0001")
        wait_until(lambda: "full osd" in private_cluster.ceph("health", "detail"))

        # What takes no more space than before is not refused: always a new place.
        places = itertools.count(16 * MIB, 4096)

        def refused():
            try:
                client.pwrite(b"x" * 4096, next(places))
            except nbd.Error as error:
                return error.errnum
            return None

        assert wait_until(refused) == errno.ENOSPC
        assert client.pread(4096, 0) == b"r" * 4096
    finally:
        for name, ratio in reversed(ratios.items()):
            private_cluster.ceph("osd", f"set-{name}-ratio", str(ratio))
        wait_until(lambda: "full osd" not in private_cluster.ceph("health", "detail"))
    wait_until(lambda: not refused())
    assert client.pread(4096, next(places) - 4096) == b"x" * 4096
