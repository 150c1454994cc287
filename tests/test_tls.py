# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""TLS, with certificates and with pre-shared keys: who is let in, and who learns nothing."""

import contextlib
import copy
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time

import nbd
import pytest
from conftest import MIB, PATIENCE, assert_same, recipe, refused, run_script
from test_clients import DIES, bystander, leaving_nothing, request

# Answers to options (NBD_REP_)
ACK, ERR_TLS_REQD = 1, (1 << 31) + 5

FOLDERS = {"/etc/pki/nbdkit": "server", "/home/alice/pki": "client"}
HOST = "DNS:gateway.example,IP:192.0.2.1"


def commands(heading, directory, host, names=()):
    """What the README says, with files in this directory."""
    ours = {printed: directory / folder for printed, folder in FOLDERS.items()}
    if heading == "Certificates":
        ours[HOST] = host
    return recipe(heading, ours | dict(names))


class Credentials:
    """What the README's commands make for the server and for one client."""

    def __init__(self, cluster, directory, host="DNS:localhost,IP:127.0.0.1"):
        # What follows starts the server.
        script = commands(self.heading, directory, host).partition("nbdkit --")[0]
        run_script(script, cluster, directory)
        self.server, self.client = directory / "server", directory / "client"


class Certificates(Credentials):
    heading = "Certificates"

    @property
    def options(self):
        return ["--tls=require", "--tls-verify-peer", f"--tls-certificates={self.server}"]

    def uri(self, port, export=""):
        return f"nbds://127.0.0.1:{port}/{export}?tls-certificates={self.client}"

    def qemu(self):
        return f"tls-creds-x509,id=tls,endpoint=client,dir={self.client}"


class Keys(Credentials):
    heading = "Pre-shared keys"

    @property
    def options(self):
        return ["--tls=require", f"--tls-psk={self.server}/keys.psk"]

    def uri(self, port, export=""):
        return f"nbds://alice@127.0.0.1:{port}/{export}?tls-psk-file={self.client}/keys.psk"

    def qemu(self):
        return f"tls-creds-psk,id=tls,endpoint=client,dir={self.client},username=alice"


@pytest.fixture(scope="module")
def certificates(cluster, tmp_path_factory):
    return Certificates(cluster, tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def keys(cluster, tmp_path_factory):
    return Keys(cluster, tmp_path_factory.mktemp("keys"))


@pytest.fixture(params=["certificates", "keys"])
def credentials(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def port():
    """A TCP port that nobody else gets; as this socket does not listen, nbdkit may."""
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]


@pytest.fixture
def gateway(servers, cluster, port):
    """Make a gateway on TCP, not yet started."""

    def make(credentials, **parameters):
        server = servers(None, **{"pool": cluster.pool, "exports": "*"} | parameters)
        server.listen = ["--ipaddr=127.0.0.1", f"--port={port}"]
        server.options = credentials.options

        def attach(client):
            client.set_uri_allow_local_file(True)
            client.connect_uri(credentials.uri(port, client.get_export_name()))

        server.attach = attach
        return server

    return make


def run(*command):
    """Return the exit status of a program, and all that it says."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def qemu_address(port, export):
    return f"driver=nbd,host=127.0.0.1,port={port},export={export},tls-creds=tls"


# ---- who is let in -----------------------------------------------------------


@pytest.mark.parametrize("heading", ["Certificates", "Pre-shared keys"])
def test_the_recipes_of_the_readme_work_as_printed(cluster, images, port, tmp_path, heading):
    image = images.create(name="vm1")
    image.write(os.urandom(MIB), 3 * MIB)
    pidfile = tmp_path / "nbdkit.pid"
    names = {
        "--ipaddr=192.0.2.1": f"--ipaddr=127.0.0.1 --port={port} --pidfile={pidfile}",
        "gateway.example?": f"localhost:{port}?",
        "gateway.example/": f"localhost:{port}/",
        "host=gateway.example": f"host=localhost,port={port}",
        "id=nbd": "id=rw",
        "pool=rbd": f"pool={cluster.pool}",
    }
    script = f"""
trap 'pid=$(cat {pidfile}); kill "$pid"; tail --pid="$pid" -s 0.1 -f /dev/null' EXIT
{commands(heading, tmp_path, "DNS:localhost,IP:127.0.0.1", names)}
qemu-img convert -O raw vm1.qcow2 from-qcow2.raw
"""
    assert 'export="vm1"' in run_script(script, cluster, tmp_path)
    for copied in ("vm1.raw", "from-qcow2.raw"):
        assert_same((tmp_path / copied).read_bytes(), image.read(0, 64 * MIB))
    secrets = [*tmp_path.rglob("*-key.pem"), *tmp_path.rglob("keys.psk")]
    assert len(secrets) == {"Certificates": 5, "Pre-shared keys": 2}[heading]
    assert {oct(secret.stat().st_mode & 0o777) for secret in secrets} == {"0o600"}


@pytest.mark.parametrize("kind", ["image", "gateway"])
@pytest.mark.parametrize("program", ["nbdcopy", "qemu-img"])
def test_a_client_writes_and_reads(gateway, images, credentials, port, tmp_path, program, kind):
    image = images.create(8 * MIB)
    if kind == "image":
        gateway(credentials, image=image.spec, pool=None, exports=None).start()
    else:
        gateway(credentials).start()
    export = image.name if kind == "gateway" else ""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(8 * MIB))
    uri, address = credentials.uri(port, export), qemu_address(port, export)
    convert = ["qemu-img", "convert", "--object", credentials.qemu()]
    write, read = {
        "nbdcopy": (["nbdcopy", "--flush", source, uri], ["nbdcopy", uri, target]),
        "qemu-img": (
            [*convert, "-f", "raw", "-n", "--target-image-opts", source, address],
            [*convert, "-O", "raw", "--image-opts", address, target],
        ),
    }[program]
    assert run(*write) == (0, "")
    assert_same(image.read(0, 8 * MIB), source.read_bytes())
    assert run(*read) == (0, "")
    assert_same(target.read_bytes(), source.read_bytes())


def test_a_guest_has_the_disk_with_the_options_of_the_readme(
    cluster, gateway, images, certificates, port, tmp_path
):
    image = images.create(name="vm1")
    gateway(certificates).start()
    names = {
        "qemu-system-x86_64": "qemu-system-x86_64 -display none -nodefaults -S -monitor stdio",
        "/home/alice/pki": certificates.client,
        "gateway.example,server.port=10809": f"127.0.0.1,server.port={port}",
    }
    script = f"""{recipe("A disk of a guest", names)} <<'END'
qemu-io -d /machine/peripheral-anon/device[0]/virtio-backend "write -P 7 1M 4k"
quit
END"""
    assert "wrote 4096/4096 bytes" in run_script(script, cluster, tmp_path)
    assert image.read(MIB, 4096) == b"\7" * 4096


def test_a_key_that_is_taken_out_lets_nobody_in_any_more(gateway, image, cluster, port, tmp_path):
    keys = Keys(cluster, tmp_path)
    client = gateway(keys).start().connect(image.name)
    (keys.server / "keys.psk").write_text("")
    assert run("nbdinfo", keys.uri(port, image.name))[0] == 1
    client.pwrite(b"still here", 0)
    assert image.read(0, 10) == b"still here"


def test_without_verify_peer_everybody_is_let_in(gateway, image, certificates, port, tmp_path):
    server = gateway(certificates)
    server.options.remove("--tls-verify-peer")
    server.start()
    shutil.copy(certificates.client / "ca-cert.pem", tmp_path)
    anonymous = f"nbds://127.0.0.1:{port}/{image.name}?tls-certificates={tmp_path}"
    assert run("nbdinfo", "--size", anonymous) == (0, f"{64 * MIB}\n")


def test_tls_on_lets_clients_in_without_tls(gateway, image, certificates, port):
    server = gateway(certificates)
    server.options[0] = "--tls=on"
    server.start()
    plain = f"nbd://127.0.0.1:{port}/{image.name}"
    for uri in plain, certificates.uri(port, image.name):
        assert run("nbdinfo", "--size", uri) == (0, f"{64 * MIB}\n")


def test_a_unix_socket_is_for_the_user_of_nbdkit_alone(server):
    before = os.umask(0)
    try:
        server.start()
    finally:
        os.umask(before)
    assert server.socket.stat().st_mode & 0o777 == 0o755  # to connect is to write


def test_the_ip_filter_hangs_up_on_other_addresses(
    gateway, image, certificates, port, nbdkit_version
):
    for allowed, greeting in ("127.0.0.0/8", b"NBDMAGIC"), ("192.0.2.0/24", b""):
        server = gateway(certificates, allow=allowed, deny="all")
        server.options = [*server.options, "--filter=ip"]
        if nbdkit_version < (1, 42):
            assert "cannot parse address" in refused(server)
            continue
        server.start()
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            assert connection.recv(8, socket.MSG_WAITALL) == greeting
        assert run("nbdinfo", certificates.uri(port, image.name))[0] == (0 if greeting else 1)
        server.stop()


def test_each_tenant_sees_its_own_namespace_alone(
    gateway, images, cluster, certificates, port, nbdkit_version
):
    """The name in the client's certificate of the README is alice."""
    server = gateway(certificates, exports=f"{cluster.pool}/{{dn.CN}}/*")
    if nbdkit_version < (1, 42):
        assert "{dn.CN} needs nbdkit 1.42 or newer" in refused(server)
        return
    for tenant in ("alice", "bob"):
        cluster.rbd("namespace", "create", f"{cluster.pool}/{tenant}", id="admin")
        images.create(name="disk", namespace=tenant)
    own = f"{cluster.pool}/alice/disk"
    assert set(server.start().list()) == {own}
    server.connect(own).pwrite(b"hers", 0)
    with pytest.raises(nbd.Error):
        server.connect(f"{cluster.pool}/bob/disk")


# ---- who is refused ----------------------------------------------------------


def asked(server):
    """How often the plugin was asked for the list, and for an image."""
    calls = "list_exports readonly=", "open readonly="
    return tuple(server.log().count(f"python: {call}") for call in calls)


def test_a_client_without_tls_is_refused(gateway, image, credentials, port):
    server = gateway(credentials)
    server.options = [*server.options, "-v"]
    server.start()
    plain = f"nbd://127.0.0.1:{port}"
    status, said = run("nbdinfo", "--list", plain)
    assert status == 1
    assert image.name not in said
    assert run("nbdinfo", f"{plain}/{image.name}")[0] == 1
    assert run("nbdcopy", f"{plain}/{image.name}", "null:")[0] == 1
    status, said = run("qemu-img", "info", f"{plain}/{image.name}")
    assert status == 1
    assert "TLS negotiation required" in said
    client = nbd.NBD()
    client.set_tls(nbd.TLS_DISABLE)
    client.set_export_name(image.name)
    with pytest.raises(nbd.Error):
        client.connect_tcp("127.0.0.1", str(port))
    # Who may, is answered.
    server.list()
    server.connect(image.name)
    server.stop()
    assert asked(server) == (1, 1)


def greeted(port):
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    assert connection.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
    connection.sendall(struct.pack(">I", 3))
    return connection


def option(number, data=b""):
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def sized(text):
    return struct.pack(">I", len(text)) + text


def test_a_client_without_tls_is_told_that_tls_is_required_and_nothing_else(
    gateway, image, credentials, port
):
    gateway(credentials).start()
    name = sized(image.name.encode())
    context = struct.pack(">I", 1) + sized(b"base:allocation")
    options = {
        3: b"",  # LIST
        6: name + bytes(2),  # INFO
        7: name + bytes(2),  # GO
        8: b"",  # STRUCTURED_REPLY
        9: name + context,  # LIST_META_CONTEXT
        10: name + context,  # SET_META_CONTEXT
        99: b"",  # unknown
    }
    with greeted(port) as connection:
        for number, data in options.items():
            connection.sendall(option(number, data))
            reply = connection.recv(20, socket.MSG_WAITALL)
            assert struct.unpack(">QIII", reply)[1:] == (number, ERR_TLS_REQD, 0)
        # EXPORT_NAME has no reply but success.
        connection.sendall(option(1, image.name.encode()))
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def having(credentials, directory, *files):
    """The credentials of a client that has these files."""
    for file in files:
        shutil.copy(file, directory)
    changed = copy.copy(credentials)
    changed.client = directory
    return changed


@pytest.fixture(scope="module")
def mismatched(cluster, certificates, keys, tmp_path_factory):
    """What the server has, and what a client has that must be refused."""

    def folder():
        return tmp_path_factory.mktemp("mismatched")

    stranger = Certificates(cluster, folder())
    elsewhere = Certificates(cluster, folder(), "DNS:elsewhere.example,IP:127.0.0.2")
    ca = certificates.client / "ca-cert.pem"
    theirs = [stranger.client / f"client-{part}.pem" for part in ("cert", "key")]
    return {
        "the server is of another CA": (certificates, stranger),
        "the server is another host": (elsewhere, elsewhere),
        "no certificate": (certificates, having(certificates, folder(), ca)),
        "a certificate of another CA": (certificates, having(certificates, folder(), ca, *theirs)),
        "a key instead of a certificate": (certificates, keys),
        "another key of this name": (keys, Keys(cluster, folder())),
        "a certificate instead of a key": (keys, certificates),
    }


@pytest.mark.parametrize(
    "mismatch",
    [
        "the server is of another CA",
        "the server is another host",
        "no certificate",
        "a certificate of another CA",
        "a key instead of a certificate",
        "another key of this name",
        "a certificate instead of a key",
    ],
)
def test_a_client_with_wrong_credentials_is_refused(gateway, image, mismatched, port, mismatch):
    servers_own, clients_own = mismatched[mismatch]
    server = gateway(servers_own)
    server.options = [*server.options, "-v"]
    server.start()
    status, said = run("nbdinfo", "--list", clients_own.uri(port))
    assert status == 1
    assert image.name not in said
    assert run("nbdinfo", clients_own.uri(port, image.name))[0] == 1
    info = ["qemu-img", "info", "--object", clients_own.qemu(), "--image-opts"]
    assert run(*info, qemu_address(port, image.name))[0] == 1
    server.stop()
    assert asked(server) == (0, 0)


@pytest.mark.parametrize("encrypted", [False, True])
def test_on_the_path_all_is_seen_without_tls_and_nothing_with_it(
    gateway, image, certificates, port, tmp_path, encrypted
):
    server = gateway(certificates)
    server.options[0] = "--tls=on"
    server.start()
    image.write(b"to be read", 0)
    client = nbd.NBD()
    client.set_export_name(image.name)
    client.set_tls(nbd.TLS_REQUIRE if encrypted else nbd.TLS_DISABLE)
    client.set_tls_certificates(str(certificates.client))
    client.set_tls_verify_peer(False)  # socat's other end has no name
    seen = [tmp_path / "sent", tmp_path / "received"]
    client.connect_command(
        ["socat", "-r", str(seen[0]), "-R", str(seen[1]), "STDIO", f"TCP:127.0.0.1:{port}"]
    )
    assert client.pread(10, 0) == b"to be read"
    client.pwrite(b"to be written", MIB)
    client.shutdown()
    wire = b"".join(path.read_bytes() for path in seen)
    for secret in (image.name.encode(), b"to be read", b"to be written"):
        assert (secret in wire) != encrypted


# ---- clients that misbehave --------------------------------------------------


def test_clients_that_are_killed_in_mid_request_harm_nobody(gateway, images, credentials, port):
    victim, other = images.create(), images.create()
    server = gateway(credentials).start()
    dies = [sys.executable, "-c", DIES, credentials.uri(port, victim.name)]
    with leaving_nothing(server, victim.name), bystander(server, other):
        for _ in range(5):
            dying = [subprocess.Popen(dies, stderr=subprocess.PIPE) for _ in range(4)]
            assert [(process.communicate()[1], process.returncode) for process in dying] == [
                (b"", -signal.SIGKILL)
            ] * 4
    assert server.process.poll() is None
    client = server.connect(victim.name)
    client.pwrite(b"alive", 0)
    assert client.pread(5, 0) == b"alive"


class Raw:
    """Connections without a library for NBD, each a step further than the one before."""

    def __init__(self, port, certificates):
        self.port = port
        self.context = ssl.create_default_context(cafile=certificates.client / "ca-cert.pem")
        self.context.load_cert_chain(
            certificates.client / "client-cert.pem", certificates.client / "client-key.pem"
        )

    def connected(self):
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def greeted(self):
        return greeted(self.port)

    def about_to_start_tls(self):
        connection = self.greeted()
        connection.sendall(option(5))
        reply = connection.recv(20, socket.MSG_WAITALL)
        assert struct.unpack(">QIII", reply)[1:] == (5, ACK, 0)
        return connection

    def hello(self):
        """What a TLS client says first."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            self.context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1").do_handshake()
        return outgoing.read()

    def in_mid_hello(self):
        connection = self.about_to_start_tls()
        connection.sendall(self.hello()[:50])
        return connection

    def in_mid_handshake(self):
        connection = self.about_to_start_tls()
        connection.sendall(self.hello())
        return connection

    def encrypted(self):
        return self.context.wrap_socket(self.about_to_start_tls(), server_hostname="127.0.0.1")

    def in_transmission(self, export):
        connection = self.encrypted()
        connection.sendall(option(1, export.encode()))
        with connection.makefile("rb") as replies:
            assert len(replies.read(10)) == 10
        return connection


STEPS = [
    Raw.connected,
    Raw.greeted,
    Raw.about_to_start_tls,
    Raw.in_mid_hello,
    Raw.in_mid_handshake,
    Raw.encrypted,
]


@pytest.fixture
def raw(port, certificates):
    return Raw(port, certificates)


def test_clients_that_say_no_more_hold_up_nobody(gateway, images, certificates, raw):
    victim, other = images.create(), images.create()
    server = gateway(certificates).start()
    with leaving_nothing(server, other.name), bystander(server, other):
        silent = [step(raw) for step in STEPS for _ in range(10)]
        server.connect(victim.name).shutdown()
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("step", STEPS, ids=[step.__name__ for step in STEPS])
def test_garbage_hurts_nobody(gateway, images, certificates, raw, step):
    other = images.create()
    server = gateway(certificates).start()
    with leaving_nothing(server, other.name), bystander(server, other):
        for garbage in (os.urandom(4096), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
            with step(raw) as connection, contextlib.suppress(OSError):
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass


def ended_in_time(server):
    begin = time.monotonic()
    server.end(signal.SIGTERM)
    return time.monotonic() - begin < 6


def test_clients_that_say_no_more_do_not_keep_nbdkit_from_its_end(gateway, certificates, raw):
    server = gateway(certificates).start()
    with contextlib.ExitStack() as silent:
        for step in STEPS:
            silent.enter_context(step(raw))
        assert ended_in_time(server)
    assert server.process.returncode == 0


def test_a_client_that_does_not_read_its_replies_does_not_keep_nbdkit_from_a_clean_end(
    gateway, images, certificates, raw
):
    victim, other = images.create(), images.create()
    server = gateway(certificates, **{"ceph.rbd_cache_policy": "writeback"})
    client = server.start().connect(other.name)
    client.pwrite(b"x", 0)
    client.flush()
    client.pwrite(b"acknowledged early", 0)
    with raw.in_transmission(victim.name) as deaf:
        for _ in range(4):
            deaf.sendall(request(0, 0, 8 * MIB))
        assert deaf.recv(1)  # nbdkit is about to send more than it can
        assert ended_in_time(server)
    assert server.process.returncode == 0
    assert other.read(0, 18) == b"acknowledged early"
