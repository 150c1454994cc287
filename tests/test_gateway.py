# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""One nbdkit that serves a whole pool: the export name picks the image."""

import concurrent.futures
import contextlib
import errno
import random
import socket
import struct
import subprocess
import threading
import time

import nbd
import pytest
import rbd
import trustme
from conftest import (
    GIB,
    MIB,
    OBJECT,
    PATIENCE,
    Image,
    data_extents,
    refused,
    unique,
    wait_for_answers,
    wait_until,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st


@pytest.fixture
def gateway(servers, cluster):
    """Make a server of these patterns, not yet started."""

    def make(*patterns, **parameters):
        return servers(None, pool=cluster.pool, exports=list(patterns), **parameters)

    return make


@pytest.fixture
def other_pool(cluster):
    pool = unique("rbd_export_test")
    cluster.make_pool(pool)
    yield pool
    cluster.drop_pool(pool)


@contextlib.contextmanager
def silence(cluster, pool, client):
    """Let a pool answer nothing, which the client sees by its own reads."""
    # With two copies demanded, a cluster of one OSD waits for another.
    for key in "size", "min_size":
        cluster.ceph("osd", "pool", "set", pool, key, "2")

    def unanswered():
        cookie = client.aio_pread(nbd.Buffer(1), client.get_size() - 1)
        client.poll(500)
        return not client.aio_command_completed(cookie)

    try:
        wait_until(unanswered)
        yield
    finally:
        cluster.ceph("osd", "pool", "set", pool, "min_size", "1")
        cluster.ceph("osd", "pool", "set", pool, "size", "1", "--yes-i-really-mean-it")


def opens(server, export):
    with contextlib.suppress(nbd.Error):
        server.connect(export).shutdown()
        return True
    return False


# ---- the policy --------------------------------------------------------------

# Names as a client would say them; P is the pool of `pool=`, Q another one.
UNIVERSE = [
    "vm1",
    "vm1@monday",
    "vm1@friday",
    "vm10",
    "VM1",
    "db[1]",
    "P/tenant/vm1",
    "P/tenant/vm1@monday",
    "P/tenant/db",
    "Q/vm1",
    "Q/vm1@monday",
    "Q/tenant/vm1",
]

POLICIES = {
    "an image": (["vm1"], ["vm1"]),
    "a pattern without @ exports no snapshot": (["*"], ["vm1", "vm10", "VM1", "db[1]"]),
    "case counts": (["vm*"], ["vm1", "vm10"]),
    "a question mark is one character": (["vm??"], ["vm10"]),
    "a set": (["[vV]?1"], ["vm1", "VM1"]),
    "a complement": (["[!v]*"], ["VM1", "db[1]"]),
    "a [ of the name itself": (["db[[]1]"], ["db[1]"]),
    "the pool that is left out may be said": (["P/vm1"], ["vm1"]),
    "another pool": (["Q/*"], ["Q/vm1"]),
    "all pools": (["*/vm1"], ["vm1", "Q/vm1"]),
    "a namespace": (["P/tenant/*"], ["P/tenant/vm1", "P/tenant/db"]),
    "* for a namespace is not the default one": (["P/*/vm1"], ["P/tenant/vm1"]),
    "all of it": (
        ["*/*", "*/*/*", "*/*@*", "*/*/*@*"],
        UNIVERSE,
    ),
    "snapshots only": (["vm1@*"], ["vm1@monday", "vm1@friday"]),
    "one snapshot": (["*/*@mon*"], ["vm1@monday", "Q/vm1@monday"]),
    "image and snapshots": (["vm1", "vm1@*"], ["vm1", "vm1@monday", "vm1@friday"]),
    "a denial": (["*", "!vm1"], ["vm10", "VM1", "db[1]"]),
    "a denial of an image is one of its snapshots": (
        ["*", "*@*", "!vm1"],
        ["vm10", "VM1", "db[1]"],
    ),
    "a denial of snapshots": (["vm1", "vm1@*", "!*@fri*"], ["vm1", "vm1@monday"]),
    "the last match decides": (["*", "!vm*", "vm1"], ["vm1", "VM1", "db[1]"]),
    "a denial before has no say": (["!vm1", "vm*"], ["vm1", "vm10"]),
    "a denial in another pool is none here": (["vm1", "!Q/*"], ["vm1"]),
    "nothing matches": (["nothing*"], []),
}


@pytest.fixture(scope="module")
def universe(cluster):
    """One image of each name; a pool of their own for `P` and `Q`."""
    pools = {letter: unique(f"rbd_export_test_{letter}") for letter in "PQ"}
    with contextlib.ExitStack() as stack:
        for pool in pools.values():
            cluster.make_pool(pool)
            stack.callback(cluster.drop_pool, pool)
            cluster.rbd("namespace", "create", f"{pool}/tenant", id="admin")
        for name in UNIVERSE:
            path, _, snapshot = name.partition("@")
            *where, image = path.split("/")
            pool, namespace = pools[where[0] if where else "P"], where[1] if where[1:] else ""
            if snapshot:
                Image(cluster, image, namespace, pool).snap(snapshot)
                continue
            with cluster.rados.open_ioctx(pool) as ioctx:
                ioctx.set_namespace(namespace)
                rbd.RBD().create(ioctx, image, MIB, old_format=False)
        yield pools


@pytest.mark.parametrize(("patterns", "allowed"), POLICIES.values(), ids=list(POLICIES))
def test_the_last_pattern_that_matches_decides(servers, universe, patterns, allowed):
    def real(text):
        for letter, pool in universe.items():
            text = text.replace(f"{letter}/", f"{pool}/")
        return text

    server = servers(
        None, pool=universe["P"], exports=[real(pattern) for pattern in patterns], probe="no"
    ).start()
    expected = {real(name) for name in allowed}
    # The cluster may have more than our two pools.
    ours = {
        name
        for name in server.list()
        if "/" not in name or name.startswith(tuple(universe.values()))
    }
    assert ours == expected
    assert {name for name in UNIVERSE if opens(server, real(name))} == set(allowed)


def test_pool_and_namespace_fill_in_what_a_name_leaves_out(servers, universe):
    server = servers(
        None, pool=universe["P"], namespace="tenant", exports=["*", "*@*"], probe="no"
    ).start()
    assert set(server.list()) == {"vm1", "vm1@monday", "db"}
    assert opens(server, "db")
    assert opens(server, f"{universe['P']}/tenant/db")
    assert not opens(server, "vm10")


ODD = st.text("vm1ab/@*?[]!.%{}\\\n \u00a0\u202eé", max_size=12)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(name=ODD)
@example(name="..")
@example(name="../vm1")
@example(name="/vm1")
@example(name="vm1/")
@example(name="vm1@")
@example(name="vm1@@")
@example(name="vm*")
@example(name="vm[1]")
@example(name="%76m1")
@example(name=" vm1")
@example(name="vm1 ")
@example(name="vm1\n")
@example(name="{dn.CN}")
@example(name="Vm1")
def test_no_other_name_opens_an_image_that_is_exported(open_to_all, name):
    if name not in ("vm1", "vm1@a", f"{open_to_all.parameters['pool']}/vm1"):
        assert not opens(open_to_all, name)


@pytest.fixture(scope="module")
def open_to_all(cluster, universe, tmp_path_factory):
    from conftest import Server

    server = Server(
        tmp_path_factory.mktemp("open"),
        conf=cluster.conf,
        id="rw",
        pool=universe["P"],
        exports=["vm?", "*@*"],
    ).start()
    assert opens(server, "vm1")
    yield server
    assert opens(server, "vm1"), "it no longer serves"
    server.stop()


# ---- what a client is told ---------------------------------------------------


def go(server, name):
    """Send NBD_OPT_GO with any bytes for a name; return type and text of the reply."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(PATIENCE)
        s.connect(str(server.socket))
        stream = s.makefile("rwb")
        assert stream.read(18)[:16] == b"NBDMAGICIHAVEOPT"
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        stream.write(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, len(data)) + data)
        stream.flush()
        _, _, kind, length = struct.unpack(">QIII", stream.read(20))
        return kind, stream.read(length)


NBD_REP_ERR_INVALID, NBD_REP_ERR_UNKNOWN = (1 << 31) + 3, (1 << 31) + 6


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        (b"n" * 4096, NBD_REP_ERR_UNKNOWN),
        (b"v" * 4097, NBD_REP_ERR_INVALID),
        (b"image\0", NBD_REP_ERR_INVALID),
        (b"image\nfatal: forged line", NBD_REP_ERR_UNKNOWN),
        (b"image\x1b[2J", NBD_REP_ERR_UNKNOWN),
        (b"\xff\xfe", NBD_REP_ERR_UNKNOWN),
        (b"image\xc3", NBD_REP_ERR_UNKNOWN),
        (b"..", NBD_REP_ERR_UNKNOWN),
        (b"%s%s%n", NBD_REP_ERR_UNKNOWN),
        (b"@", NBD_REP_ERR_UNKNOWN),
        (b"//", NBD_REP_ERR_UNKNOWN),
        (b"a/b/c/d", NBD_REP_ERR_UNKNOWN),
        (b"image@a/b", NBD_REP_ERR_UNKNOWN),
        (b"no-such-pool/image", NBD_REP_ERR_UNKNOWN),
        (b"", NBD_REP_ERR_UNKNOWN),
    ],
    ids=repr,
)
def test_an_odd_name_gets_the_ordinary_error_and_one_line_in_the_log(gateway, image, name, reply):
    server = gateway("*", "no-such-pool/*", "!denied", probe="no").start()
    kind, text = go(server, name)
    assert kind == reply
    if kind == NBD_REP_ERR_UNKNOWN:
        assert text == b""
    assert image.watchers() == []
    assert opens(server, image.name)
    server.stop()
    told = [line for line in server.lines if not line.startswith("nbdkit: info: ")]
    assert len(told) == 1, told
    assert "Traceback" not in server.log()


def test_the_id_of_an_image_in_the_trash_opens_nothing(gateway, images, cluster):
    image = images.create()
    with image.open() as opened:
        number = opened.id()
    cluster.rbd("trash", "mv", image.spec)
    try:
        server = gateway("*").start()
        assert not opens(server, number)
        assert not opens(server, image.name)
        assert image.name not in server.list()
    finally:
        cluster.rbd("trash", "restore", f"{cluster.pool}/{number}")


def test_a_client_cannot_tell_a_forbidden_image_from_a_missing_one(gateway, images):
    prefix = unique("x")
    forbidden, allowed = (images.create(name=f"{prefix}-{name}") for name in ("secret", "open"))
    server = gateway(f"{prefix}-*", f"!{forbidden.name}").start()
    assert opens(server, allowed.name)
    missing = go(server, f"{prefix}-missing".encode())
    assert go(server, forbidden.name.encode()) == missing == (NBD_REP_ERR_UNKNOWN, b"")
    assert go(server, b"elsewhere/secret") == missing
    assert set(server.list()) == {allowed.name}
    server.stop()
    # Whoever runs the server is told the difference.
    assert f"export '{forbidden.name}' refused: 'exports' does not allow it" in server.log()
    assert f"{prefix}-missing' not found" in server.log()


def test_a_forbidden_name_is_not_looked_up(gateway):
    # A monitor that takes connections and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monitor = f"v2:127.0.0.1:{silent.getsockname()[1]}"
        server = gateway("a", probe="no", **{"ceph.mon_host": monitor, "connect-timeout": 5})
        server.start()
        begin = time.monotonic()
        assert not opens(server, "b")
        refusal = time.monotonic() - begin
        assert not opens(server, "a")
        assert refusal < 2.5 < time.monotonic() - begin


def test_a_client_that_was_refused_may_ask_for_another_export(gateway, image):
    server = gateway(image.name).start()
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_unix(str(server.socket))
    client.set_export_name("forbidden")
    with pytest.raises(nbd.Error):
        client.opt_go()
    client.set_export_name(image.name)
    client.opt_go()
    assert client.get_size() == 64 * MIB
    client.shutdown()


def test_the_default_export_is_what_a_client_gets_that_names_none(gateway, image):
    server = gateway("*", **{"default-export": image.name}).start()
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.set_full_info(True)
    client.connect_unix(str(server.socket))
    client.opt_go()
    assert client.get_size() == 64 * MIB
    assert client.get_canonical_export_name() == image.name
    client.shutdown()


def test_without_a_default_export_the_empty_name_is_refused(gateway, image):
    server = gateway("*").start()
    assert not opens(server, "")
    server.stop()
    assert "export name missing: no default-export is set" in server.log()


# ---- the list ----------------------------------------------------------------


def test_the_list_tells_size_and_parent(gateway, images, cluster):
    prefix = unique("list")
    parent = images.create(5 * MIB + 1, name=f"{prefix}-parent")
    parent.snap("golden", protect=True)
    clone = images.clone(parent, "golden")
    server = gateway(f"{prefix}*", f"{prefix}*@*", clone.name).start()
    assert server.list() == {
        parent.name: "5242881 bytes",
        f"{parent.name}@golden": "5242881 bytes",
        clone.name: f"5242881 bytes, clone of {parent.spec}@golden",
    }


def test_the_parent_of_a_clone_is_named_only_to_who_may_have_it(gateway, images, family):
    _, clone = family
    assert gateway(clone.name).start().list() == {clone.name: f"{64 * MIB} bytes, clone"}


def test_a_clone_whose_parents_pool_is_gone_is_listed(other_pool, gateway, cluster):
    pool = unique("rbd_export_test")
    cluster.make_pool(pool)
    try:
        cluster.rbd("create", "--size=1M", f"{pool}/parent")
        cluster.rbd("snap", "create", "--no-progress", f"{pool}/parent@s")
        snapshot, clone = f"{pool}/parent@s", f"{other_pool}/clone"
        cluster.rbd("clone", "--rbd-default-clone-format=2", snapshot, clone)
    finally:
        cluster.drop_pool(pool)
    server = gateway("*", f"{other_pool}/*", probe="no").start()
    assert server.list() == {clone: f"{MIB} bytes, clone"}


def test_odd_names_leave_the_list_to_all_others(gateway, images, cluster, servers):
    prefix = unique("odd")
    image = images.create(name=f"{prefix}-good")
    long = "n" * 9000
    for name in ("s", long, "tab\there"):
        image.snap(name)
    namespace = unique("ns")
    cluster.rbd("namespace", "create", f"{cluster.pool}/{namespace}", id="admin")
    neighbour = f"{cluster.pool}/{namespace}/" + unique("x")
    cluster.rbd("create", "--size=1M", neighbour.encode() + b"\xff")
    try:
        server = gateway(f"{prefix}*", f"{prefix}*@*", f"{cluster.pool}/{namespace}/*").start()
        assert set(server.list()) == {image.name, f"{image.name}@s"}
        server.stop()
        assert f"'{cluster.pool}/{namespace}' is not listed: it has a name that" in server.log()
    finally:
        cluster.rbd("rm", "--no-progress", neighbour.encode() + b"\xff")


def test_a_list_that_times_out_is_refused_and_the_next_one_works(
    other_pool, gateway, images, cluster
):
    for _ in range(100):
        images.create(MIB, pool=other_pool)
    stable = images.create()
    server = gateway("*", f"{other_pool}/*", **{"io-timeout": 1}).start()
    client = server.connect(stable.name)
    probe = server.connect(images.made[0].spec)
    with silence(cluster, other_pool, probe), pytest.raises(nbd.Error):
        server.list()
    client.pwrite(b"x", 0)
    assert len(server.list()) == 101


def test_clients_show_the_list(gateway, image):
    server = gateway(image.name, **{"default-export": image.name}).start()
    uri = f"nbd+unix://?socket={server.socket}"
    for command in ["nbdinfo", "--list", uri], ["qemu-nbd", "-L", "-k", str(server.socket)]:
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert image.name in shown, shown
        assert f"description: RBD image {image.spec}" in shown or "67108864 bytes" in shown


def test_a_single_image_is_listed_under_the_empty_name(server, image):
    assert server.start().list() == {"": f"RBD image {image.spec}"}


def test_snapshots_that_have_no_name_of_their_own_are_not_listed(gateway, images, cluster):
    image = images.create()
    image.snap("trashed")
    image.snap("kept")
    clone = images.clone_of_unprotected(image, "trashed")
    with image.open() as opened:
        opened.remove_snap("trashed")  # its clone keeps it in the trash
        assert len(list(opened.list_snaps())) == 2
    assert set(gateway(f"{image.name}@*").start().list()) == {f"{image.name}@kept"}
    images.remove(clone)


def test_a_read_only_key_can_list(gateway, images, cluster):
    image = images.create()
    image.snap("s")
    server = gateway(image.name, f"{image.name}@*", id="ro")
    server.options = ["-r"]
    assert set(server.start().list()) == {image.name, f"{image.name}@s"}


def test_pools_that_the_key_may_not_read_are_left_out(other_pool, gateway, image, cluster):
    with cluster.key(mon="profile rbd", osd=f"profile rbd pool={cluster.pool}") as login:
        server = gateway(f"{image.name}", f"*/{image.name}", **login).start()
        assert set(server.list()) == {image.name}


def test_the_list_holds_while_images_come_and_go(gateway, images, cluster):
    prefix = unique("busy")
    stable = {images.create(name=f"{prefix}-stable{number}").name for number in range(3)}
    server = gateway(f"{prefix}*").start()
    busy = threading.Event()

    def come_and_go():
        while not busy.is_set():
            name = f"{prefix}-{random.randrange(1000)}"
            image = images.create(name=name)
            rbd.RBD().rename(cluster.ioctx, name, f"{name}-renamed")
            image.name = f"{name}-renamed"
            images.remove(image)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        coming = pool.submit(come_and_go)
        try:
            for _ in range(60):
                assert set(server.list()) >= stable
        finally:
            busy.set()
        coming.result()
    assert set(server.list()) == stable


def test_a_list_that_cannot_be_had_is_an_error_not_an_empty_list(gateway):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monitor = f"v2:127.0.0.1:{silent.getsockname()[1]}"
        server = gateway("*", probe="no", **{"ceph.mon_host": monitor, "connect-timeout": 1})
        server.start()
        with pytest.raises(nbd.Error):
            server.list()
        server.stop()
        assert "the exports cannot be listed: cannot connect" in server.log()


# ---- read-only ---------------------------------------------------------------


def test_access_ro_is_for_everybody_and_others_stay_writable(gateway, images):
    prefix = unique("acc")
    names = [images.create(name=f"{prefix}-{name}").name for name in ("gold", "golf", "work")]
    server = gateway(f"{prefix}*", access=[f"{prefix}-gold:ro", f"{prefix}-golf:ro"]).start()
    assert [server.connect(name).is_read_only() for name in names] == [True, True, False]


def test_access_ro_goes_for_a_single_image_too(servers, image):
    assert servers(image, access=f"{image.spec}:ro").start().connect().is_read_only()
    assert not servers(image, access=f"{image.spec}x:ro").start().connect().is_read_only()


def test_snapshots_are_read_only(gateway, image):
    image.write(b"monday", 0)
    image.snap("monday")
    image.write(b"friday", 0)
    server = gateway("*", "*@*").start()
    snapshot, live = server.connect(f"{image.name}@monday"), server.connect(image.name)
    assert snapshot.is_read_only()
    assert not live.is_read_only()
    assert snapshot.pread(6, 0) == b"monday"
    live.pwrite(b"sunday", 0)
    assert snapshot.pread(6, 0) == b"monday"
    assert live.pread(6, 0) == b"sunday"


# ---- what is removed while it is open ----------------------------------------


def failure(call, *args):
    with pytest.raises(nbd.Error) as raised:
        call(*args)
    return raised.value.errnum


def fails_from_now_on(client):
    assert failure(client.pread, 4096, 0) == errno.EIO
    assert failure(client.pread, 4096, 32 * MIB) == errno.EIO
    assert failure(data_extents, client, 0, 64 * MIB) == errno.EIO


def test_a_removed_snapshot_fails_and_does_not_read_as_something_else(gateway, images):
    image, bystander = images.create(), images.create()
    image.write(b"m" * OBJECT, 0)
    image.snap("monday")
    image.write(b"f" * OBJECT, 0)
    server = gateway("*", "*@*").start()
    snapshot, other = server.connect(f"{image.name}@monday"), server.connect(bystander.name)
    assert snapshot.pread(4096, 0) == b"m" * 4096
    with image.open() as opened:
        opened.remove_snap("monday")
    fails_from_now_on(snapshot)
    image.snap("monday")
    fails_from_now_on(snapshot)
    other.pwrite(b"x", 0)
    assert server.connect(f"{image.name}@monday").pread(4096, 0) == b"f" * 4096
    server.stop()
    assert f"image '{image.spec}@monday' has been removed while it was open" in server.log()


def test_a_snapshot_that_went_to_the_trash_fails(gateway, images):
    image = images.create()
    image.write(b"m" * OBJECT, 0)
    image.snap("monday")
    images.clone_of_unprotected(image, "monday")
    client = gateway("*", "*@*").start().connect(f"{image.name}@monday")
    with image.open() as opened:
        opened.remove_snap("monday")
    fails_from_now_on(client)


def test_an_image_that_is_removed_while_open_read_only_fails(gateway, images, cluster):
    image, bystander = images.create(), images.create()
    image.write(b"x" * OBJECT, 0)
    server = gateway("*", access="*:ro").start()
    client, other = server.connect(image.name), server.connect(bystander.name)
    assert client.pread(4096, 0) == b"x" * 4096
    rbd.RBD().remove(cluster.ioctx, image.name)
    fails_from_now_on(client)
    assert other.pread(4096, 0) == bytes(4096)
    assert not opens(server, image.name)
    assert opens(server, bystander.name)


def test_an_image_that_goes_to_the_trash_while_open_read_only_fails(gateway, images, cluster):
    image = images.create()
    server = gateway("*", access="*:ro").start()
    client = server.connect(image.name)
    with image.open(read_only=True) as opened:
        number = opened.id()
    cluster.rbd("trash", "mv", image.spec)
    try:
        fails_from_now_on(client)
        assert not opens(server, image.name)
    finally:
        cluster.rbd("trash", "restore", f"{cluster.pool}/{number}")
    assert client.pread(4096, 0) == bytes(4096)


def test_an_image_that_is_open_for_writing_cannot_be_removed(gateway, image, cluster):
    client = gateway("*").start().connect(image.name)
    with pytest.raises(rbd.ImageBusy):
        rbd.RBD().remove(cluster.ioctx, image.name)
    client.pwrite(b"still here", 0)
    client.flush()
    assert image.read(0, 10) == b"still here"


@pytest.mark.parametrize("access", ["*:ro", "nothing:ro"], ids=["read-only", "writable"])
def test_a_renamed_image_goes_on_for_those_who_have_it_open(gateway, image, cluster, access):
    image.write(b"data", 0)
    server = gateway("*", access=access).start()
    client = server.connect(image.name)
    old, new = image.name, unique("renamed")
    rbd.RBD().rename(cluster.ioctx, old, new)
    image.name = new
    assert client.pread(4, 0) == b"data"
    assert not opens(server, old)
    assert server.connect(new).pread(4, 0) == b"data"


def test_readers_at_once_notice_that_their_snapshot_goes(gateway, image):
    """Requests share the question whether the snapshot is still there."""
    image.write(b"m" * OBJECT, 0)
    image.snap("monday")
    image.write(b"f" * OBJECT, 0)
    server = gateway("*", "*@*").start()
    clients = [server.connect(f"{image.name}@monday") for _ in range(4)]

    def read(client):
        """Read until it fails; nothing else than monday's data may ever come."""
        for _ in range(100_000):
            try:
                data = client.pread(512, random.randrange(0, OBJECT - 512))
            except nbd.Error as error:
                return error.errnum
            assert data == b"m" * 512
        return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        reading = [pool.submit(read, client) for client in clients]
        with image.open() as opened:
            opened.remove_snap("monday")
        assert [reader.result() for reader in reading] == [errno.EIO] * len(clients)


@pytest.fixture
def family(images):
    """A clone with a snapshot, and its parent, which has all its data."""
    parent = images.create()
    parent.write(b"p" * OBJECT, 0)
    parent.write(b"p" * OBJECT, 60 * MIB)
    parent.snap("s", protect=True)
    clone = images.clone(parent, "s")
    clone.snap("s1")
    return parent, clone


def orphan(images, family):
    """Flatten the clone, and remove its parent."""
    parent, clone = family
    with clone.open() as opened:
        opened.flatten()
    images.remove(parent)


def test_a_snapshot_whose_parent_goes_reads_on(gateway, images, family):
    _, clone = family
    server = gateway("*", "*@*").start()
    client = server.connect(f"{clone.name}@s1")
    assert client.pread(4096, 0) == b"p" * 4096
    orphan(images, family)
    for reader in client, server.connect(f"{clone.name}@s1"):
        assert reader.pread(OBJECT, 0) == b"p" * OBJECT
        assert reader.pread(4096, 60 * MIB) == b"p" * 4096
        assert data_extents(reader, 0, 64 * MIB) == [(0, OBJECT), (60 * MIB, OBJECT)]


def test_a_clone_whose_parent_goes_reads_on_as_it_is_now(gateway, images, family):
    _, clone = family
    server = gateway("*", access="*:ro").start()
    client = server.connect(clone.name)
    assert client.pread(4096, 0) == b"p" * 4096
    orphan(images, family)
    with clone.open() as opened:
        opened.discard(0, OBJECT)
    for reader in client, server.connect(clone.name):
        assert reader.pread(4096, 0) == bytes(4096)
        assert reader.pread(4096, 60 * MIB) == b"p" * 4096
        assert data_extents(reader, 0, 64 * MIB) == [(60 * MIB, OBJECT)]


def test_a_clone_that_was_cut_off_and_grew_again_has_zeroes_there(gateway, images, family):
    _, clone = family
    server = gateway("*", access="*:ro").start()
    client = server.connect(clone.name)
    assert client.pread(4096, 60 * MIB) == b"p" * 4096
    with clone.open() as opened:
        opened.resize(8 * MIB)
        opened.resize(64 * MIB)
    for reader in client, server.connect(clone.name):
        assert reader.pread(4096, 60 * MIB) == bytes(4096)


def test_an_image_that_shrank_under_its_reader_fails_behind_its_end(gateway, image):
    client = gateway("*", access="*:ro").start().connect(image.name)
    assert client.pread(4096, 60 * MIB) == bytes(4096)
    with image.open() as opened:
        opened.resize(8 * MIB)
    assert failure(client.pread, 4096, 60 * MIB) == errno.EIO
    assert client.pread(4096, 0) == bytes(4096)


def test_a_reader_does_not_mind_that_its_snapshot_is_cloned_protected_or_renamed(gateway, images):
    image = images.create()
    image.write(b"m" * OBJECT, 0)
    image.snap("monday")
    server = gateway("*", "*@*").start()
    client = server.connect(f"{image.name}@monday")

    def reads_on(client):
        assert client.pread(4096, 0) == b"m" * 4096
        assert data_extents(client, 0, 64 * MIB) == [(0, OBJECT)]

    reads_on(client)
    clone = images.clone_of_unprotected(image, "monday")
    reads_on(client)
    images.remove(clone)
    reads_on(client)
    with image.open() as opened:
        opened.protect_snap("monday")
        reads_on(client)
        opened.rename_snap("monday", "tuesday")
    reads_on(client)
    reads_on(server.connect(f"{image.name}@tuesday"))
    reads_on(client)
    assert not opens(server, f"{image.name}@monday")


def test_reads_under_way_when_their_snapshot_goes_fail_all(other_pool, gateway, images, cluster):
    image = images.create(data_pool=other_pool)
    image.write(b"m" * OBJECT, 0)
    image.snap("monday")
    client = gateway("*", "*@*").start().connect(f"{image.name}@monday")
    with silence(cluster, other_pool, client):
        buffers = [nbd.Buffer(4096) for _ in range(8)]
        reads = [client.aio_pread(buffer, 4096 * i) for i, buffer in enumerate(buffers)]
        with image.open() as opened:
            opened.remove_snap("monday")
    wait_for_answers(client)
    assert [failure(client.aio_command_completed, read) for read in reads] == [errno.EIO] * 8


# ---- what exports share, and what they do not --------------------------------


def test_one_image_is_open_once_whatever_a_client_calls_it(gateway, image):
    server = gateway("*").start()
    clients = [server.connect(name) for name in (image.name, image.spec, image.name)]
    assert len(image.watchers()) == 1
    clients[0].pwrite(b"shared", 0)
    assert [client.pread(6, 0) for client in clients] == [b"shared"] * 3


def watching(image):
    (watcher,) = image.watchers()
    return watcher["addr"]


def test_images_share_a_connection_unless_told_otherwise(gateway, images):
    made = [images.create() for _ in range(3)]
    server = gateway("*").start()
    clients = [server.connect(image.name) for image in made]
    assert len({watching(image) for image in made}) == 1
    for client in clients:
        client.shutdown()


def test_images_per_connection_limits_what_a_fence_takes_down(gateway, images, cluster):
    made = [images.create() for _ in range(3)]
    server = gateway("*", **{"images-per-connection": 2}).start()
    clients = [server.connect(image.name) for image in made]
    assert watching(made[0]) == watching(made[1]) != watching(made[2])
    again = server.connect(made[0].name)
    assert watching(made[0]) == watching(made[1])
    again.shutdown()
    for client in clients:
        client.pwrite(b"before", 0)
    with cluster.blocklisted(watching(made[0])):
        assert failure(clients[0].pread, 1, 0) == errno.ESHUTDOWN
        assert failure(clients[1].pread, 1, 0) == errno.ESHUTDOWN
        clients[2].pwrite(b"after", 0)
        assert server.connect(made[0].name).pread(6, 0) == b"before"
        assert clients[2].pread(5, 0) == b"after"


def test_two_fenced_connections_do_not_refuse_who_comes_afterwards(gateway, images, cluster):
    made = [images.create() for _ in range(4)]
    server = gateway("*", **{"images-per-connection": 2}).start()
    clients = [server.connect(image.name) for image in made[:3]]
    for client in clients:
        client.pwrite(b"x", 0)
    clients[0].shutdown()
    wait_until(lambda: not made[0].watchers())
    # Both connections have room for one more image.
    with cluster.blocklisted(watching(made[1])), cluster.blocklisted(watching(made[2])):
        server.connect(made[3].name).pwrite(b"y", 0)
        assert len(server.list()) == 4


def test_connections_to_the_cluster_that_no_image_needs_are_closed(gateway, images):
    made = [images.create() for _ in range(4)]
    server = gateway("*", **{"images-per-connection": 1}).start()
    server.connect(made[0].name).shutdown()
    wait_until(lambda: not made[0].watchers())
    before = server.threads()
    clients = [server.connect(image.name) for image in made]
    assert len({watching(image) for image in made}) == 4
    assert server.threads() > before + 30
    for client in clients:
        client.shutdown()
    wait_until(lambda: server.threads() <= before)


def test_much_that_hangs_delays_no_other(other_pool, gateway, images, cluster):
    """librados would let 100 MiB or 1024 operations through, for all images together."""
    hung = images.create(GIB, pool=other_pool, features=rbd.RBD_FEATURE_LAYERING)
    fine = images.create()
    server = gateway("*", "*/*").start()
    waiting, working = server.connect(hung.spec), server.connect(fine.name)
    with silence(cluster, other_pool, waiting):
        buffers = [nbd.Buffer(32 * MIB) for _ in range(10)]
        for number, buffer in enumerate(buffers):
            waiting.aio_pread(buffer, number * 32 * MIB)
        waiting.poll(1000)
        begin = time.monotonic()
        working.pwrite(b"y" * 4096, 0)
        server.connect(fine.name).shutdown()
        assert time.monotonic() - begin < PATIENCE / 4
    wait_for_answers(waiting)


def test_an_image_that_hangs_delays_no_other(other_pool, gateway, images, cluster):
    hung, opened = (images.create(pool=other_pool) for _ in range(2))
    fine, fresh = images.create(), images.create()
    server = gateway("*", "*/*").start()
    waiting, working = server.connect(opened.spec), server.connect(fine.name)
    waiting.pwrite(b"x", 0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with silence(cluster, other_pool, waiting):
            opening = pool.submit(server.connect, hung.spec)
            begin = time.monotonic()
            for image in (fine, fresh) * 5:
                client = server.connect(image.name)
                client.pwrite(b"y" * 4096, 0)
                client.flush()
                client.shutdown()
            working.pwrite(b"z", 0)
            working.shutdown()
            wait_until(lambda: not fine.watchers())
            assert time.monotonic() - begin < PATIENCE / 4
            assert not opening.done()
        assert opening.result(PATIENCE).get_size() == 64 * MIB


def test_an_image_that_hangs_keeps_no_other_from_being_flushed_at_the_end(
    other_pool, gateway, images, cluster
):
    hung = images.create(pool=other_pool)
    made = [images.create(), hung, images.create()]  # one is closed before, one after
    server = gateway("*", "*/*", **{"ceph.rbd_cache_policy": "writeback"}).start()
    clients = [server.connect(image.spec) for image in made]
    for client in clients:
        client.pwrite(b"x", 0)
        client.flush()
    with silence(cluster, other_pool, clients[1]):
        for client in clients:
            client.pwrite(b"acknowledged", 0)
        server.process.terminate()
        for image in made[0], made[2]:
            wait_until(lambda image=image: not image.watchers())
            assert image.read(0, 12) == b"acknowledged"
    server.process.wait(PATIENCE)
    assert hung.read(0, 12) == b"acknowledged"


def test_50_clients_on_20_images_read_what_was_written(gateway, images):
    """Each client has blocks of its own in every image, and remembers them."""
    count, block = 50, 4096
    made = [images.create(16 * MIB) for _ in range(20)]
    server = gateway("*").start()

    def use(number):
        choice = random.Random(number)
        written = {}
        for _ in range(8):
            image = choice.choice(made)
            client = nbd.NBD()
            client.set_export_name(image.name)
            client.connect_unix(str(server.socket))
            for _ in range(12):
                offset = (choice.randrange(8) * count + number) * block
                key = image.name, offset
                if choice.random() < 0.5:
                    written[key] = bytes([choice.randrange(1, 256)]) * block
                    client.pwrite(written[key], offset)
                else:
                    assert client.pread(block, offset) == written.get(key, bytes(block))
            client.shutdown()
        return written

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        written = {}
        for result in pool.map(use, range(count)):
            written |= result
    server.stop()
    assert len(written) > 1000
    for image in made:
        content = image.read(0, 16 * MIB)
        for offset in range(0, 16 * MIB, block):
            expected = written.get((image.name, offset), bytes(block))
            assert content[offset : offset + block] == expected


# ---- tenants -----------------------------------------------------------------


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def certificates(authority, tmp_path):
    """Make a folder as nbdkit and libnbd want it, with a certificate of this name."""

    def make(role, name, **subject):
        folder = tmp_path / f"{role}-{unique('tls')}"
        folder.mkdir()
        issued = authority.issue_cert(name, **subject)
        authority.cert_pem.write_to_path(folder / "ca-cert.pem")
        issued.private_key_pem.write_to_path(folder / f"{role}-key.pem")
        issued.cert_chain_pems[0].write_to_path(folder / f"{role}-cert.pem")
        return folder

    return make


def tls_client(server, folder):
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.set_tls(nbd.TLS_REQUIRE)
    client.set_tls_certificates(str(folder))
    client.set_tls_hostname("localhost")
    client.connect_unix(str(server.socket))
    return client


def sees(server, folder):
    """What a client with these certificates is told is there, and what it may open."""
    found = []
    tls_client(server, folder).opt_list(lambda name, _: found.append(name))
    return found


def may_open(server, folder, export):
    client = tls_client(server, folder)
    client.set_export_name(export)
    try:
        client.opt_go()
    except nbd.Error:
        return False
    client.shutdown()
    return True


def test_each_tenant_sees_its_own_namespace_alone(
    gateway, images, cluster, certificates, nbdkit_version
):
    """{dn.CN} stands for the common name in the client's certificate."""
    server = gateway(f"{cluster.pool}/{{dn.CN}}/*", f"!{cluster.pool}/{{dn.CN}}/secret*")
    server.options = [
        "--tls=require",
        f"--tls-certificates={certificates('server', 'localhost')}",
        "--tls-verify-peer",
    ]
    if nbdkit_version < (1, 42):
        assert "{dn.CN} needs nbdkit 1.42 or newer" in refused(server)
        return
    tenants = {name: unique(name) for name in ("alice", "bob")}
    for tenant in tenants.values():
        cluster.rbd("namespace", "create", f"{cluster.pool}/{tenant}", id="admin")
        images.create(name="disk", namespace=tenant)
        images.create(name="secret", namespace=tenant)
    images.create(name="disk")
    server.start()
    disks = {name: f"{cluster.pool}/{tenant}/disk" for name, tenant in tenants.items()}

    def folder(common_name):
        return certificates("client", "client.example", common_name=common_name)

    for name, tenant in tenants.items():
        mine = folder(tenant)
        assert sees(server, mine) == [disks[name]]
        assert may_open(server, mine, disks[name])
        (others,) = [disk for other, disk in disks.items() if other != name]
        assert not may_open(server, mine, others)
        assert not may_open(server, mine, f"{cluster.pool}/{tenant}/secret")
        assert not may_open(server, mine, "disk")
    alice = tenants["alice"]
    for imposter in (
        "*",
        "?" * len(alice),
        f"[{alice[0]}]{alice[1:]}",
        f"{alice}/",
        f"{alice}/disk",
        f"x,CN={alice}",
        f"x+CN={alice}",
        f"{alice},O=x",
        f"{alice} ",
        f" {alice}",
        f"{alice.upper()}",
        f"{alice}\nx",
        f"{alice}\\",
        f'"{alice}"',
        None,
    ):
        stranger = folder(imposter)
        assert sees(server, stranger) == [], imposter
        assert not may_open(server, stranger, disks["alice"]), imposter


def test_a_tenant_whose_name_has_odd_characters_gets_what_is_its_own(
    gateway, images, cluster, certificates, nbdkit_version
):
    server = gateway(f"{cluster.pool}/{{dn.CN}}/*")
    server.options = [
        "--tls=require",
        f"--tls-certificates={certificates('server', 'localhost')}",
        "--tls-verify-peer",
    ]
    if nbdkit_version < (1, 42):
        assert "{dn.CN} needs nbdkit 1.42 or newer" in refused(server)
        return
    server.start()
    for name in ("a,b", "a+b=c", "ärger & söhne", "[x]*", "#x", 'x "y" \\ z;<>'):
        tenant = f"{name}-{unique('t')}"
        cluster.rbd("namespace", "create", f"{cluster.pool}/{tenant}", id="admin")
        images.create(name="disk", namespace=tenant)
        folder = certificates("client", "client.example", common_name=tenant)
        assert sees(server, folder) == [f"{cluster.pool}/{tenant}/disk"]
        assert may_open(server, folder, f"{cluster.pool}/{tenant}/disk")


def test_without_a_certificate_nothing_that_needs_one_is_exported(
    gateway, images, cluster, nbdkit_version
):
    image = images.create()
    server = gateway(image.name, "{dn.CN}*", f"!{{dn.CN}}-{image.name}")
    if nbdkit_version < (1, 42):
        assert "{dn.CN} needs nbdkit 1.42 or newer" in refused(server)
        return
    other = images.create()
    server.start()
    assert set(server.list()) == {image.name}
    assert opens(server, image.name)
    assert not opens(server, other.name)
    server.stop()
    assert "and the client has no common name" in server.log()


# ---- mistakes, found at the start --------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"image": "x", "exports": "y"}, "'image' and 'exports' exclude each other"),
        ({"image": "x", "default-export": "y"}, "'image' and 'default-export' exclude each other"),
        ({"exports": "y", "snapshot": "s"}, "'snapshot' needs 'image'"),
        ({"exports": ""}, "parameter 'exports': must not be empty"),
        ({"exports": "!y"}, "nothing would be exported: each 'exports' is a denial"),
        ({"exports": "a/b/c/d"}, "'exports=a/b/c/d': pattern 'a/b/c/d' is malformed"),
        ({"exports": "a//b"}, "pattern 'a//b' is malformed"),
        ({"exports": ["*", "!"]}, "'exports=!': pattern '' is malformed"),
        ({"exports": "a@"}, "pattern 'a@' is malformed"),
        ({"exports": "a@b/c"}, "pattern 'a@b/c' is malformed"),
        ({"exports": "vm[12"}, "'exports=vm[12' has a [ without its ]"),
        ({"exports": "vm[]"}, "'exports=vm[]' has a [ without its ]"),
        ({"exports": ["*", "!vm[!]"]}, "'exports=!vm[!]' has a [ without its ]"),
        ({"exports": "vm[!@]x"}, "'exports=vm[!@]x' has a [ without its ]"),
        ({"exports": "{dn.O}/*"}, "'exports={dn.O}/*' has '{dn.O}'; only {dn.CN} is known"),
        ({"exports": "*", "access": "vm1"}, "'access=vm1' must be access=PATTERN:ro"),
        ({"exports": "*", "access": "vm1:rw"}, "'access=vm1:rw' must be access=PATTERN:ro"),
        ({"exports": "*", "access": ":ro"}, "'access=:ro' must be access=PATTERN:ro"),
        ({"exports": "*", "access": "ro"}, "'access=ro' must be access=PATTERN:ro"),
        ({"exports": "*", "access": "!vm1:ro"}, "'access=!vm1:ro' must be access=PATTERN:ro"),
        ({"exports": "*", "access": "a//b:ro"}, "'access=a//b:ro': pattern 'a//b' is malformed"),
        ({"exports": "*", "namespace": "{dn.CN}"}, "'namespace' is one name for all clients"),
        ({"exports": "*", "pool": "{dn.CN}"}, "'pool' is one name for all clients"),
        ({"exports": "a*", "default-export": "b"}, "'default-export=b' is not allowed by any"),
        ({"exports": "*", "default-export": "b/"}, "export name 'b/' is malformed"),
        ({"exports": "*", "images-per-connection": "0"}, "'0' is not a whole number above 0"),
        ({"exports": "*", "images-per-connection": "x"}, "'x' is not a whole number above 0"),
        ({}, "parameter 'image' is missing"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else None,
)
def test_a_mistake_in_what_is_exported_is_named(servers, parameters, message):
    assert message in refused(servers(None, **parameters))


def test_a_pool_or_namespace_that_is_missing_is_told_at_the_start(gateway, cluster):
    for mistaken, message in {
        "no-such-pool/*": "pool 'no-such-pool' not found",
        "no-such-[[]pool/*": "pool 'no-such-[pool' not found",
        f"{cluster.pool}/no-such/*": f"namespace 'no-such' not found in pool '{cluster.pool}'",
    }.items():
        assert message in refused(gateway("*", mistaken))
    assert "namespace 'no-such' not found" in refused(gateway("*", namespace="no-such"))
    assert not opens(gateway("*", "no-such-*/*").start(), "no-such-pool/image")


def test_a_pool_that_the_key_is_not_for_is_told_at_the_start(other_pool, gateway, cluster):
    with cluster.key(mon="profile rbd", osd=f"profile rbd pool={cluster.pool}") as login:
        message = refused(gateway("*", f"{other_pool}/*", **login))
    assert f"no permission to list the images of '{other_pool}'" in message


def test_a_key_for_a_namespace_alone_is_enough(gateway, images, cluster):
    namespace = unique("ns")
    cluster.rbd("namespace", "create", f"{cluster.pool}/{namespace}", id="admin")
    images.create(name="disk", namespace=namespace)
    caps = f"profile rbd pool={cluster.pool} namespace={namespace}"
    with cluster.key(mon="profile rbd", osd=caps) as login:
        server = gateway("*", namespace=namespace, **login).start()
        assert set(server.list()) == {"disk"}
        server.connect("disk").pwrite(b"x", 0)


def test_a_default_export_that_is_missing_is_told_at_the_start(gateway, cluster):
    message = refused(gateway("*", **{"default-export": "no-such-image"}))
    assert f"image '{cluster.pool}/no-such-image' not found" in message


def test_names_that_do_not_print_are_neither_listed_nor_opened(gateway, images):
    image = images.create(name=f"{unique('odd')}\nsecond line")
    server = gateway("*").start()
    assert image.name not in server.list()
    assert not opens(server, image.name)
