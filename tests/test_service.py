# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""The systemd units: under systemd-socket-activate, and under a systemd of the test's own."""

import configparser
import os
import pathlib
import re
import shlex
import shutil
import signal
import string
import subprocess
import tempfile
from socket import create_server

import nbd
import pytest
import trustme
from conftest import MIB, PATIENCE, PLUGIN, ROOT, Image, assert_same, recipe, unique, wait_until
from test_encryption import HEADER, PASSPHRASE, luks_header

UNITS = sorted((ROOT / "config/systemd").glob("*.service")) + sorted(
    (ROOT / "config/systemd").glob("*.socket")
)
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
# A user id without a name, without a home and without rights.
NOBODY = 64321


def section(unit, name):
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read(ROOT / "config/systemd" / unit)
    return parser[name]


def assignments(text):
    return dict(word.split("=", 1) for word in shlex.split(text, comments=True))


def example(name):
    return (ROOT / f"config/systemd/{name}.env.example").read_text()


@pytest.fixture
def directory():
    """A folder that everybody may search, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture
def login(cluster, directory):
    """What a host needs: a ceph.conf that names no key, and a keyring."""
    with cluster.key(mon="profile rbd", osd="profile rbd") as login:
        host = cluster.rados.conf_get("mon_host")
        (directory / "ceph.conf").write_text(f"[global]\nmon host = {host}\n")
        yield login


# ---- the units themselves ----------------------------------------------------


def test_systemd_finds_no_mistake_in_the_units():
    verify = ["systemd-analyze", "verify", "--man=no", *UNITS]
    done = subprocess.run(verify, capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "rbd-export" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_the_services_are_as_confined_as_the_readme_says(unit):
    (printed,) = re.findall(r"threshold=(\d+)", (ROOT / "README.md").read_text())
    security = ["systemd-analyze", "security", "--offline=yes", "--no-pager"]
    done = subprocess.run(
        [*security, f"--threshold={printed}", unit], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- systemd-socket-activate -------------------------------------------------


class Activated:
    """The command of the unit, with the example of its settings, run by an unprivileged user."""

    def __init__(self, directory, login, image):
        self.socket = directory / "run/nbd.sock"
        (directory / "run").mkdir()
        shutil.copy(PLUGIN, directory)
        keyring = directory / "keyring"
        shutil.copy(login["ceph.keyring"], keyring)
        keyring.chmod(0o400)
        for path in (directory / "run", keyring):
            os.chown(path, NOBODY, NOBODY)
        settings = {"NBDKIT_OPTIONS": "", "IMAGE": image.spec}
        settings |= assignments(example("rbd-export@"))
        line = string.Template(section("rbd-export@.service", "Service")["ExecStart"])
        line = line.substitute(settings)
        for printed, ours in {
            "/usr/bin/rbd_export.py": directory / "rbd_export.py",
            "/etc/ceph": directory,
            "%d": directory,
            "id=nbd": f"id={login['id']}",
        }.items():
            assert printed in line
            line = line.replace(printed, str(ours))
        drop = ["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs"]
        none = ["--bounding-set=-all", "--inh-caps=-all"]
        activate = ["systemd-socket-activate", "-l", self.socket, *shlex.split(line)]
        self.command = [str(word) for word in ["setpriv", *drop, *none, *activate]]
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            self.command, cwd="/", env={"PATH": "/usr/bin:/bin"}, stdin=subprocess.DEVNULL
        )
        wait_until(self.socket.exists)

    def stop(self):
        """Return the exit status."""
        self.process.terminate()
        status = self.process.wait(PATIENCE / 4)
        self.socket.unlink()
        return status


def connect(socket):
    client = nbd.NBD()
    # Unlike connect_unix this ends when nobody answers.
    client.aio_connect_unix(str(socket))
    while client.aio_is_connecting():
        assert client.poll(PATIENCE // 2 * 1000)
    return client


@pytest.fixture
def activated(directory, login, image):
    activated = Activated(directory, login, image)
    yield activated
    if activated.process and activated.process.poll() is None:
        activated.process.kill()
        activated.process.wait()


def test_a_user_who_can_read_the_keyring_needs_no_other_right(activated, image):
    activated.start()
    client = connect(activated.socket)
    data = os.urandom(2 * MIB)
    client.pwrite(data, MIB)
    client.flush()
    assert_same(client.pread(len(data), MIB), data)
    assert_same(image.read(MIB, len(data)), data)
    assert os.stat(f"/proc/{activated.process.pid}").st_uid == NOBODY


def test_sigterm_ends_it_with_status_0_while_a_client_is_connected(activated):
    activated.start()
    client = connect(activated.socket)
    client.pwrite(b"first", 0)
    assert activated.stop() == 0
    activated.start()
    assert connect(activated.socket).pread(5, 0) == b"first"
    assert activated.stop() == 0


# ---- systemd -----------------------------------------------------------------

# Its processes, mounts and control groups are its own, and what it writes is gone with it.
BOOT = r"""
set -eu
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$2"
echo $$ >"$1/cgroup/$2/cgroup.procs"
exec unshare --cgroup --mount --pid --ipc --uts --fork --kill-child --mount-proc sh -euc '
  mount --bind "$1/cgroup/$2" /sys/fs/cgroup
  mount --bind "$1/run" /run
  mount --bind "$3" /run/source
  mount -t tmpfs tmpfs /var/log
  mount -t tmpfs tmpfs /var/tmp
  for path in /etc /usr; do
    mkdir -p /var/tmp$path/upper /var/tmp$path/work
    mount -t overlay overlay -o \
      lowerdir=$path,upperdir=/var/tmp$path/upper,workdir=/var/tmp$path/work $path
  done
  cp -r /run/etc/. /etc
  # None of the units of this machine: they would set up its devices and its kernel.
  mount -t tmpfs tmpfs /etc/systemd/system
  cp /usr/lib/systemd/system/systemd-journald* /run/units
  mount -t tmpfs -o mode=1777 tmpfs /tmp
  # Credentials are mounted by a child of systemd.
  mount --make-rshared /
  exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    SYSTEMD_GENERATOR_PATH=/run/none SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/units \
    /lib/systemd/systemd --system --unit=sockets.target --show-status=no
' sh "$@"
"""
UNBOOT = """
mount -t cgroup2 cgroup2 "$1/cgroup"
find "$1/cgroup/$2" -depth -type d -exec rmdir {} +
"""


TARGETS = ["sockets", "sysinit", "basic", "shutdown", "network-online", "remote-fs-pre"]


class Host:
    """A host that systemd has booted."""

    def __init__(self, directory):
        self.directory = directory
        self.name = unique("rbd-export-test")
        self.run = directory / "run"
        (directory / "cgroup").mkdir()
        for path in ("source", "etc/rbd-export", "etc/ceph", "etc/pki/nbdkit", "units"):
            (self.run / path).mkdir(parents=True)
        for target in TARGETS:
            (self.run / f"units/{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        (self.run / "systemd").mkdir()
        # What the kernel says is not for this journal.
        (self.run / "systemd/journald.conf.d").mkdir()
        (self.run / "systemd/journald.conf.d/own.conf").write_text(
            "[Journal]\nAudit=no\nReadKMsg=no\n"
        )
        self.process = None
        self.init = None

    def boot(self):
        command = ["unshare", "--mount", "sh", "-c", BOOT, "sh", self.directory, self.name, ROOT]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        wait_until(
            lambda: (self.run / "systemd/private").exists() or self.process.poll() is not None
        )
        assert self.process.poll() is None
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.init = children.read_text().split()[0]

    def enter(self, script):
        enter = ["nsenter", f"--target={self.init}", "--root", "--mount", "--pid", "--cgroup"]
        script = f"set -euo pipefail\ncd /run/source\n{script}"
        return subprocess.run([*enter, "bash", "-c", script], capture_output=True, text=True)

    def shell(self, script):
        done = self.enter(script)
        assert done.returncode == 0, done.stdout + done.stderr + self.log()
        return done.stdout.strip()

    def log(self):
        return self.enter("journalctl --no-pager --output=cat").stdout

    def show(self, unit, name):
        return self.shell(f"systemctl show --value --property={name} {shlex.quote(unit)}")

    def halt(self):
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not pathlib.Path(f"/proc/{self.init}").exists())
        subprocess.run(
            ["unshare", "--mount", "sh", "-euc", UNBOOT, "sh", self.directory, self.name],
            check=True,
        )


INSTALL = """
ci/install.sh
install -m 644 -t /etc/systemd/system config/systemd/*.service config/systemd/*.socket
systemctl daemon-reload
"""


@pytest.fixture
def bare_host(directory, login):
    """A host with Ceph's files and nothing of ours."""
    host = Host(directory)
    shutil.copy(directory / "ceph.conf", host.run / "etc/ceph")
    shutil.copy(login["ceph.keyring"], host.run / "etc/ceph/ceph.client.nbd.keyring")
    (host.run / "etc/ceph/ceph.client.nbd.keyring").chmod(0o600)
    try:
        host.boot()
        yield host
    finally:
        host.halt()


@pytest.fixture
def host(bare_host, login, image):
    """A host with an export `vm1`, whose name is not that of the image."""
    bare_host.shell(INSTALL)
    settings = example("rbd-export@").replace("id=nbd", f"id={login['id']}")
    settings = settings.replace("#IMAGE=rbd/vm1", f"IMAGE={image.spec}")
    (bare_host.run / "vm1.env").write_text(settings)
    bare_host.shell("cp /run/vm1.env /etc/rbd-export/")
    return bare_host


@pytest.fixture
def socket(host):
    host.shell("systemctl start rbd-export@vm1.socket")
    return host.run / "rbd-export/vm1.sock"


SERVICE = "rbd-export@vm1.service"


def test_the_recipe_of_the_readme_exports_an_image(bare_host, image, login):
    """The name of the image has dashes, which systemd-escape escapes."""
    image.write(b"readme", 0)
    (bare_host.run / "env").write_text(f"OPTIONS=id={login['id']}\n")
    bare_host.shell(f"install -D /run/env /etc/rbd-export/{image.spec}.env")
    printed = bare_host.shell(recipe("Run it as a service", {"rbd/vm1": image.spec}))
    assert "export-size: 67108864" in printed
    socket = bare_host.run / f"rbd-export/{image.spec}.sock"
    assert connect(socket).pread(6, 0) == b"readme"
    unit = bare_host.shell(f"systemd-escape --template=rbd-export@.socket {image.spec}")
    assert bare_host.show(unit, "UnitFileState") == "enabled"
    # The service goes with its socket.
    bare_host.shell(f"systemctl stop '{unit}'")
    assert not socket.exists()
    assert bare_host.show(unit.replace(".socket", ".service"), "ActiveState") == "inactive"


def test_the_first_client_starts_it_and_it_runs_confined(host, socket, image):
    assert host.show(SERVICE, "ActiveState") == "inactive"
    client = connect(socket)
    data = os.urandom(2 * MIB)
    client.pwrite(data, MIB)
    client.zero(MIB, 4 * MIB)
    client.trim(MIB, 8 * MIB)
    client.flush()
    assert_same(client.pread(len(data), MIB), data)
    assert_same(image.read(MIB, len(data)), data)
    status = host.shell(f"cat /proc/{host.show(SERVICE, 'MainPID')}/status")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["Uid"].split()[0] != "0"
    assert (int(facts["CapBnd"], 16), facts["NoNewPrivs"], facts["Seccomp"]) == (0, "1", "2")
    assert oct(socket.stat().st_mode) == oct(0o140660)


def test_after_a_stop_the_socket_stays_and_the_next_client_starts_it_again(host, socket):
    client = connect(socket)
    client.pwrite(b"stop", 0)
    host.shell(f"systemctl stop {SERVICE}")
    assert host.show(SERVICE, "Result") == "success"
    assert host.show(SERVICE, "ExecMainStatus") == "0"
    assert connect(socket).pread(4, 0) == b"stop"


def test_nbdkit_that_dies_is_started_again_and_clients_wait_in_the_socket(host, socket):
    client = connect(socket)
    client.pwrite(b"flushed", 0)
    client.flush()
    host.shell(f"systemctl kill --signal={signal.SIGABRT.name} {SERVICE}")
    wait_until(lambda: host.show(SERVICE, "SubState") == "auto-restart")
    # Connects now, and is served when nbdkit is there again.
    assert connect(socket).pread(7, 0) == b"flushed"
    assert host.show(SERVICE, "NRestarts") == "1"


def test_a_service_without_its_socket_gets_it_and_listens_on_no_port(host, image):
    host.shell(f"systemctl start {SERVICE}")
    assert connect(host.run / "rbd-export/vm1.sock").get_size() == 64 * MIB
    pid = host.show(SERVICE, "MainPID")
    descriptors = host.shell(f"readlink /proc/{pid}/fd/*")
    tcp = host.shell(f"cat /proc/{pid}/net/tcp /proc/{pid}/net/tcp6")
    listening = {line.split()[9] for line in tcp.splitlines() if line.split()[3] == "0A"}
    assert not listening & set(re.findall(r"socket:\[(\d+)\]", descriptors))


def test_a_host_that_is_up_before_its_image_serves_it_later(host, login, cluster, images):
    image = Image(cluster, unique("late"))
    (host.run / "env").write_text(f"OPTIONS=id={login['id']}\nIMAGE={image.spec}\n")
    host.shell("cp /run/env /etc/rbd-export/late.env; systemctl start rbd-export@late.socket")
    host.shell("systemctl start rbd-export@late.service")
    wait_until(lambda: int(host.show("rbd-export@late.service", "NRestarts")) > 0)
    images.create(name=image.name)
    assert connect(host.run / "rbd-export/late.sock").get_size() == 64 * MIB


def test_systemd_hands_over_the_passphrase_of_an_encrypted_image(host, login, images, directory):
    image = images.create(HEADER + 8 * MIB)
    image.write(luks_header(directory, "luks2"), 0)
    (host.run / "vm1.pass").write_bytes(PASSPHRASE)
    (host.run / "vm1.pass").chmod(0o600)
    text = (ROOT / "README.md").read_text()
    credential = re.search(r"`(LoadCredential=passphrase:)/root/vm1.pass`", text)[1]
    parameter = re.search(r"`(passphrase-file=\S+)rbd-vm1(\S+)`", text).expand(r"\1luks\2")
    (host.run / "env").write_text(
        f"IMAGE={image.spec}\nOPTIONS=id={login['id']} encryption-format=luks {parameter}\n"
    )
    host.shell(f"""
mkdir -p /etc/systemd/system/rbd-export@luks.service.d
printf '[Service]\\n{credential}/run/vm1.pass\\n' \\
  >/etc/systemd/system/rbd-export@luks.service.d/pass.conf
cp /run/env /etc/rbd-export/luks.env
systemctl daemon-reload; systemctl start rbd-export@luks.socket""")
    client = connect(host.run / "rbd-export/luks.sock")
    assert client.get_size() == 8 * MIB
    client.pwrite(b"secret", 0)
    assert client.pread(6, 0) == b"secret"


def test_the_gateway_serves_a_pool_over_tls(host, login, cluster, images, directory):
    image = images.create(name=unique("vm"))
    authority = trustme.CA()
    for role, folder in (("server", host.run / "pki"), ("client", directory / "client")):
        folder.mkdir()
        issued = authority.issue_cert("localhost")
        authority.cert_pem.write_to_path(folder / "ca-cert.pem")
        issued.private_key_pem.write_to_path(folder / f"{role}-key.pem")
        issued.cert_chain_pems[0].write_to_path(folder / f"{role}-cert.pem")
    settings = example("rbd-export-gateway").replace("id=nbd", f"id={login['id']}")
    with create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    settings = settings.replace("--port=10809", f"--port={port}")
    settings = settings.replace("pool=rbd", f"pool={cluster.pool}")
    (host.run / "env").write_text(settings)
    host.shell("""
chmod 600 /run/pki/*
cp /run/pki/* /etc/pki/nbdkit
cp /run/env /etc/rbd-export-gateway.env
systemctl start rbd-export-gateway.service""")
    wait_until(lambda: f"{port:04X}" in pathlib.Path("/proc/net/tcp").read_text())
    client = nbd.NBD()
    client.set_tls(nbd.TLS_REQUIRE)
    client.set_tls_certificates(str(directory / "client"))
    client.set_export_name(image.name)
    client.connect_tcp("localhost", str(port))
    client.pwrite(b"gateway", 0)
    assert image.read(0, 7) == b"gateway"
    plain = nbd.NBD()
    plain.set_export_name(image.name)
    with pytest.raises(nbd.Error):
        plain.connect_tcp("localhost", str(port))
    host.shell("systemctl stop rbd-export-gateway.service")
    assert host.show("rbd-export-gateway.service", "ExecMainStatus") == "0"
