# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Real images on a real cluster, and the real nbdkit with the real plugin.

The cluster is the one of CEPH_CONF, which ci/test.sh sets.  client.admin only
sets things up; data is looked at behind the export as client.rw.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import threading
import uuid

import nbd
import pytest
import rados
import rbd
import tenacity

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "rbd_export.py"

MIB = 1 << 20
GIB = 1 << 30
OBJECT = 4 * MIB

# What the tests themselves wait for, as opposed to what they test.
PATIENCE = 60

# The parameters for each way to answer writes: early by librbd, early by the export, not early.
CACHES = {
    "writeback": {"ceph.rbd_cache_policy": "writeback"},
    "write cache": {"write-cache": "yes"},
    "no write cache": {},
}


def wait_until(condition, seconds=PATIENCE):
    """Return condition() as soon as it is true."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_not_result(bool),
        wait=tenacity.wait_fixed(0.02),
        stop=tenacity.stop_after_delay(seconds),
    )(condition)


def wait_until_it_works(call):
    """Return as soon as a call over NBD raises no error."""
    tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(nbd.Error),
        wait=tenacity.wait_fixed(0.02),
        stop=tenacity.stop_after_delay(PATIENCE),
        reraise=True,
    )(call)


def wait_for_answers(client):
    """Return when all that a client has sent is answered."""
    while client.aio_in_flight():
        assert client.poll(PATIENCE * 1000)


def unique(prefix):
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def recipe(heading, names):
    """The commands that the README prints under a heading, with other names in them.

    Names are those of images, folders and sockets: runs must not meet.
    """
    text = (ROOT / "README.md").read_text()
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    commands = "\n".join(re.findall(r"^    (.*)$", section[1], re.MULTILINE))
    # The plugin of this tree, not the one that may be installed.
    commands = re.sub(r"(?<!profile) rbd (?=[a-z-]+=)", f" python {PLUGIN} ", commands)
    commands = commands.replace(" rbd_export.py ", f" {PLUGIN} ")
    for printed, ours in names.items():
        assert printed in commands, printed
        commands = commands.replace(printed, str(ours))
    return commands


def run_script(script, cluster, directory):
    """Run commands with bash until one fails; return what they print.

    Not by a pipe: what they leave running, if they fail, would keep it open.
    """
    environment = {**os.environ, "CEPH_CONF": cluster.conf, "TMPDIR": str(directory)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as complaints:
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{script}"],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=complaints,
            check=False,
        )
        for file in (output, complaints):
            file.seek(0)
        printed = output.read()
        assert done.returncode == 0, printed + complaints.read()
    return printed


class Cluster:
    """A Ceph cluster, with a pool of our own."""

    def __init__(self, conf):
        self.conf = str(conf)
        self.pool = unique("rbd_export_test")
        self.make_pool(self.pool)
        self.rados = rados.Rados(conffile=self.conf, rados_id="rw")
        self.rados.connect()
        self.ioctx = self.rados.open_ioctx(self.pool)

    def close(self):
        self.ioctx.close()
        self.rados.shutdown()
        self.drop_pool(self.pool)

    def make_pool(self, pool):
        self.ceph("osd", "pool", "create", pool, "8")
        self.rbd("pool", "init", pool, id="admin")

    def drop_pool(self, pool):
        self.ceph("osd", "pool", "rm", pool, pool, "--yes-i-really-really-mean-it")

    def command(self, program, *args, id, input=None):
        done = subprocess.run(
            [program, "--conf", self.conf, "--id", id]
            + [arg if isinstance(arg, bytes) else str(arg) for arg in args],
            input=input,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def ceph(self, *args):
        return self.command("ceph", *args, id="admin").decode()

    def rbd(self, *args, id="rw", input=None):
        return self.command("rbd", *args, id=id, input=input)

    @contextlib.contextmanager
    def blocklisted(self, address):
        nonce = address.rpartition("/")[2]

        def known(osd):
            """An OSD hears of it after the monitor has answered."""
            listed = self.ceph("tell", f"osd.{osd}", "dump_blocklist")
            return re.search(rf'"nonce": {nonce}\b', listed)

        self.ceph("osd", "blocklist", "add", address)
        try:
            for osd in self.ceph("osd", "ls").split():
                wait_until(functools.partial(known, osd))
            yield
        finally:
            self.ceph("osd", "blocklist", "rm", address)

    @contextlib.contextmanager
    def key(self, **caps):
        """A user with these capabilities; gives the parameters that log in as it."""
        name = unique("rbd-export-test")
        pairs = [part for pair in caps.items() for part in pair]
        keyring = self.ceph("auth", "get-or-create", f"client.{name}", *pairs)
        path = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"{name}.keyring"
        path.write_text(keyring)
        try:
            yield {"id": name, "ceph.keyring": path}
        finally:
            path.unlink()
            self.ceph("auth", "rm", f"client.{name}")


class Image:
    """An image of the test's own, looked at with librbd, without the export."""

    def __init__(self, cluster, name, namespace="", pool=None):
        self.cluster = cluster
        self.name = name
        self.namespace = namespace
        self.pool = pool or cluster.pool

    @property
    def spec(self):
        return "/".join(filter(None, [self.pool, self.namespace, self.name]))

    @contextlib.contextmanager
    def open(self, snapshot=None, read_only=False):
        with self.cluster.rados.open_ioctx(self.pool) as ioctx:
            ioctx.set_namespace(self.namespace)
            with rbd.Image(ioctx, self.name, snapshot, read_only=read_only) as image:
                yield image

    def read(self, offset, length, snapshot=None):
        with self.open(snapshot, read_only=True) as image:
            return image.read(offset, length)

    def write(self, data, offset):
        with self.open() as image:
            image.write(data, offset)

    def snap(self, name, protect=False):
        with self.open() as image:
            image.create_snap(name)
            if protect:
                image.protect_snap(name)

    def watchers(self):
        with self.open(read_only=True) as image:
            return list(image.watchers_list())

    def used(self):
        """Bytes that `rbd du` says are in use."""
        report = json.loads(self.cluster.rbd("du", self.spec, "--exact", "--format", "json"))
        return sum(entry["used_size"] for entry in report["images"])

    def diff(self):
        """What `rbd diff` says exists, as (offset, length), merged."""
        merged = []
        for entry in json.loads(self.cluster.rbd("diff", self.spec, "--format", "json")):
            if entry["exists"] != "true":
                continue
            if merged and sum(merged[-1]) == entry["offset"]:
                merged[-1] = merged[-1][0], merged[-1][1] + entry["length"]
            else:
                merged.append((entry["offset"], entry["length"]))
        return merged


class Images:
    """Makes images, and takes all of them away at the end."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.made = []

    def create(self, size=64 * MIB, name=None, namespace="", pool=None, **options):
        image = Image(self.cluster, name or unique("image"), namespace, pool)
        with self.cluster.rados.open_ioctx(image.pool) as ioctx:
            ioctx.set_namespace(namespace)
            rbd.RBD().create(ioctx, image.name, size, old_format=False, **options)
        self.made.append(image)
        return image

    def clone(self, parent, snapshot, **options):
        image = Image(self.cluster, unique("clone"))
        ioctx = self.cluster.ioctx
        rbd.RBD().clone(ioctx, parent.name, snapshot, ioctx, image.name, **options)
        self.made.append(image)
        return image

    def clone_of_unprotected(self, parent, snapshot):
        """A clone that moves the snapshot to the trash when it is removed."""
        image = Image(self.cluster, unique("clone"))
        format_2 = "--rbd-default-clone-format=2"
        self.cluster.rbd("clone", format_2, f"{parent.spec}@{snapshot}", image.spec)
        self.made.append(image)
        return image

    def remove(self, image):
        self.made.remove(image)
        with self.cluster.rados.open_ioctx(image.pool) as ioctx:
            ioctx.set_namespace(image.namespace)
            try:
                with rbd.Image(ioctx, image.name, read_only=True) as opened:
                    watchers = [watcher["addr"] for watcher in opened.watchers_list()]
            except rbd.ImageNotFound:
                return
            # Killed clients would keep the image busy until their watch expires.
            with contextlib.ExitStack() as stack:
                for address in watchers:
                    stack.enter_context(self.cluster.blocklisted(address))
                with rbd.Image(ioctx, image.name) as opened:
                    for snap in list(opened.list_snaps()):
                        with contextlib.suppress(rbd.InvalidArgument):
                            opened.unprotect_snap(snap["name"])
                        opened.remove_snap(snap["name"])
                rbd.RBD().remove(ioctx, image.name)

    def close(self):
        for image in reversed(self.made.copy()):
            self.remove(image)


class Server:
    """nbdkit with the plugin.  Set what the test needs, then start it."""

    def __init__(self, directory, **parameters):
        self.socket = directory / "nbd.sock"
        self.pidfile = directory / "nbdkit.pid"
        self.directory = directory
        self.listen = [f"--unix={self.socket}"]
        self.options = []
        self.extra = []
        self.parameters = parameters
        self.process = None
        self.clients = []
        self.lines = []

    @property
    def command(self):
        return [
            "nbdkit",
            "--foreground",
            *self.listen,
            f"--pidfile={self.pidfile}",
            *self.options,
            "python",
            str(PLUGIN),
            *(
                f"{key}={value}"
                for key, values in self.parameters.items()
                for value in (values if isinstance(values, list) else [values])
                if value is not None
            ),
            *self.extra,
        ]

    def start(self):
        self.lines.clear()
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self.lines.extend, args=[self.process.stderr])
        self.reader.start()
        wait_until(lambda: self.pidfile.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, "".join(self.lines)
        return self

    def connect(self, export="", strict=False):
        """Return a libnbd handle that sends what it is told to, allowed or not."""
        client = nbd.NBD()
        self.clients.append(client)
        client.set_export_name(export)
        client.set_request_structured_replies(True)
        client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        if not strict:
            client.set_strict_mode(0)
        self.attach(client)
        return client

    def attach(self, client):
        client.connect_unix(str(self.socket))

    def list(self):
        """What NBD_OPT_LIST answers: {export name: description}."""
        client = nbd.NBD()
        client.set_opt_mode(True)
        self.attach(client)
        found = []
        client.opt_list(lambda name, description: found.append((name, description)))
        client.opt_abort()
        assert found == sorted(found)
        return dict(found)

    def disconnect(self):
        for client in self.clients:
            with contextlib.suppress(nbd.Error):
                client.shutdown()
        self.clients.clear()

    def kill(self):
        self.end(signal.SIGKILL)

    def stop(self):
        if self.process and self.process.poll() is None:
            self.disconnect()
            self.end(signal.SIGTERM)

    def end(self, number):
        self.process.send_signal(number)
        try:
            self.process.wait(PATIENCE / 4)
        except subprocess.TimeoutExpired:
            # The test fails, but its cluster and its images must go.
            self.process.kill()
            self.process.wait()
            raise
        self.reader.join()
        self.process.stderr.close()
        self.disconnect()
        for path in (self.pidfile, self.socket):
            path.unlink(missing_ok=True)

    def log(self):
        return "".join(self.lines)

    def threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def memory(self):
        """Bytes that are resident."""
        statm = pathlib.Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Daemon:
    """A process that a test stops for a while, or kills."""

    def __init__(self, pidfile):
        self.pid = int(pidfile.read_text())

    def stop(self):
        """Return when it has stopped; each thread takes its own moment to."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: set(self.thread_states()) == {"T"})

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)
        wait_until(lambda: not pathlib.Path(f"/proc/{self.pid}").exists())

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)

    def thread_states(self):
        for thread in pathlib.Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                # The name of a thread, in parentheses, may have any characters.
                yield (thread / "stat").read_text().rpartition(")")[2].split()[0]


def refused(server):
    """Run nbdkit, which must refuse to start, and return what it says."""
    done = subprocess.run(server.command, capture_output=True, text=True, timeout=PATIENCE)
    assert not server.pidfile.exists(), "it went on to serve"
    assert done.returncode == 1
    assert done.stdout == ""
    message = done.stderr.strip()
    assert "\n" not in message, message
    assert "Traceback" not in message
    return message


def assert_same(actual, expected):
    """Compare megabytes; pytest's own explanation of a difference would take minutes."""
    if actual != expected:
        assert len(actual) == len(expected)
        place = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
        pytest.fail(f"differs at {place}: {actual[place]}, not {expected[place]}")


def failure(call, *args):
    with pytest.raises(nbd.Error) as raised:
        call(*args)
    return raised.value.errnum


def extents(client, offset, length):
    """What the client is told of a range: [(offset, length, flags)], merged."""
    found = []

    def add(context, start, entries, error):
        for size, flags in zip(entries[::2], entries[1::2], strict=True):
            if found and found[-1][2] == flags:
                found[-1] = found[-1][0], found[-1][1] + size, flags
            else:
                found.append((start, size, flags))
            start += size

    while length:
        covered = sum(size for _, size, _ in found)
        client.block_status(min(length, GIB), offset, add)
        covered = sum(size for _, size, _ in found) - covered
        assert covered > 0
        offset += covered
        length -= covered
    return found


def in_blocks(ranges, size):
    """Widen (offset, length) pairs to whole blocks of 4 KiB, merged, as block status has them."""
    merged = []
    for offset, length in sorted(ranges):
        start, stop = offset - offset % 4096, min(offset + length + -(offset + length) % 4096, size)
        if merged and start <= sum(merged[-1]):
            merged[-1] = merged[-1][0], max(stop, sum(merged[-1])) - merged[-1][0]
        else:
            merged.append((start, stop - start))
    return merged


def data_extents(client, offset, length):
    return [(start, size) for start, size, flags in extents(client, offset, length) if flags == 0]


@pytest.fixture(scope="session")
def cluster():
    conf = os.environ.get("CEPH_CONF")
    assert conf, "CEPH_CONF is not set: run the tests with ci/test.sh"
    cluster = Cluster(conf)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def nbdkit_version():
    text = subprocess.run(["nbdkit", "--version"], capture_output=True, text=True, check=True)
    return tuple(map(int, re.match(r"nbdkit (\d+)\.(\d+)\.(\d+)", text.stdout).groups()))


@pytest.fixture(scope="session")
def affected(nbdkit_version):
    """Tell whether nbdkit may abort when a connection ends in mid-request."""
    return (1, 32, 4) <= nbdkit_version < (1, 33, 10)


@pytest.fixture
def images(cluster):
    images = Images(cluster)
    yield images
    images.close()


@pytest.fixture
def image(images):
    return images.create()


@pytest.fixture
def servers(cluster, images, tmp_path):
    """Makes servers that are not yet started; stops all of them before images go."""
    made = []

    def make(image, /, **parameters):
        directory = tmp_path / str(len(made))
        directory.mkdir()
        defaults = {"conf": cluster.conf, "id": "rw", "image": getattr(image, "spec", image)}
        made.append(Server(directory, **defaults | parameters))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def server(servers, image):
    """A server of `image`, not yet started."""
    return servers(image)


@contextlib.contextmanager
def running_cluster(directory, *options):
    """A cluster of a test's own, whose daemons it may stop or kill."""
    script = str(ROOT / "ci/start-ceph.sh")
    try:
        start = [script, "start", directory, *options]
        conf = subprocess.run(start, check=True, capture_output=True, text=True).stdout.strip()
        cluster = Cluster(conf)
        cluster.directory = directory
        yield cluster
        cluster.ioctx.close()
        cluster.rados.shutdown()
    finally:
        subprocess.run([script, "stop", directory], check=True)


@pytest.fixture(scope="session")
def private_cluster(tmp_path_factory):
    """A cluster whose daemons a test may stop for a while: no other run uses it."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def stoppable(private_cluster, tmp_path):
    """A server, not yet started, on a cluster whose OSD may be stopped (`.osd`)."""
    images = Images(private_cluster)
    image = images.create()
    server = Server(tmp_path, conf=private_cluster.conf, id="rw", image=image.spec)
    server.image = image
    server.osd = Daemon(private_cluster.directory / "run/osd.0.pid")
    yield server
    server.osd.resume()
    server.stop()
    images.close()
