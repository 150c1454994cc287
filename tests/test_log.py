# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""What the log tells of a service: its start and end, who came and went, and errors."""

import os
import re
import signal
import socket
import subprocess

import nbd
import pytest
from conftest import MIB, Daemon, wait_until


def info(log):
    return re.findall(r"nbdkit: info: (.*)", log)


def test_the_log_tells_of_start_clients_and_end(server, image):
    first = server.start().connect()
    second = server.connect()
    for _ in range(3):
        first.pwrite(b"x" * 1000, 0)
    first.pread(4096, 0)
    first.flush()
    first.zero(65536, 0)
    first.trim(65536, 0)
    first.block_status(MIB, 0, lambda *_: None)
    first.shutdown()
    wait_until(lambda: "gone" in server.log())
    second.pread(512, 0)
    server.end(signal.SIGTERM)
    lines = info(server.log())
    version = r"\d+\.\d+\.\d+"
    assert re.fullmatch(
        f"rbd_export {version} serves {image.spec}"
        rf" \(nbdkit {version}, librbd {version}, Python {version}\)",
        lines[0],
    )
    me = f"(process {os.getpid()})"
    assert lines[1:] == [
        f"client 1 {me} connected: {image.spec}, 67108864 bytes, read-write",
        f"client 2 {me} connected: {image.spec}, 67108864 bytes, read-write",
        f"client 1 {me} gone: read 1 (4096 bytes), write 3 (3000 bytes), flush 1,"
        " trim 1 (65536 bytes), zero 1 (65536 bytes), block status 1 (1048576 bytes)",
        f"client 2 {me} gone: read 1 (512 bytes)",
        "rbd_export ends",
    ]


def test_requests_add_no_line(server):
    client = server.start().connect()
    wait_until(lambda: "connected" in server.log())
    before = server.log()
    for place in range(100):
        client.pwrite(b"x", place)
        client.pread(1, place)
    client.flush()
    assert server.log() == before


def test_failed_requests_are_counted(server, image):
    image.snap("s")
    server.parameters["snapshot"] = "s"
    client = server.start().connect()
    client.pread(512, 0)
    with image.open() as opened:
        opened.remove_snap("s")
    with pytest.raises(nbd.Error):
        client.pread(512, 0)
    client.shutdown()
    wait_until(lambda: "gone" in server.log())
    assert info(server.log())[-1].endswith(" gone: read 1 (512 bytes), failed 1")


def test_a_gateway_names_its_patterns_and_each_export(servers, image):
    patterns = {"image": None, "pool": image.pool, "exports": ["image*", "!image-secret*"]}
    server = servers(image, **patterns).start()
    server.connect(image.name)
    server.stop()
    lines = info(server.log())
    assert " serves exports=image* exports=!image-secret* (" in lines[0]
    assert f" connected: {image.spec}, " in lines[1]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_client_that_comes_over_tcp_is_named_by_its_address(server, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # Listening, and handed over as systemd does, so that no other process takes the port.
    with socket.socket(family) as listening:
        listening.bind((address, 0))
        listening.listen()
        port = listening.getsockname()[1]
        fd = listening.fileno()
        activate = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{fd} {fd}<&-'
        command = [part for part in server.command if not part.startswith("--unix")]
        process = subprocess.Popen(
            ["bash", "-c", activate, "bash", *command],
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[fd],
        )
    with process:
        client = nbd.NBD()
        client.connect_tcp(address, str(port))
        client.shutdown()
        process.terminate()
        log = process.stderr.read()
    shown = re.escape(f"[{address}]" if ":" in address else address)
    assert re.search(rf"info: client 1 \({shown}:\d+\) connected: ", log), log


def test_nothing_is_logged_where_nbdkit_runs_for_one_command(server):
    server.options = ["-U", "-"]
    command = [part for part in server.command if not part.startswith(("--unix", "--pidfile"))]
    for run in (["--run", 'nbdinfo "$uri"'], ['--run=nbdinfo "$uri"']):
        done = subprocess.run([*command, *run], capture_output=True, text=True, check=True)
        assert info(done.stderr) == []
        assert "export-size" in done.stdout


def test_nothing_is_logged_if_nbdkit_is_to_log_nothing(server):
    server.options = ["--log=null"]
    server.start().connect()
    server.stop()
    assert info(server.log()) == []


def test_a_client_on_stdin_is_logged_without_an_error(server):
    """As libnbd and inetd start it, over a pair of pipes here."""
    command = [part for part in server.command if not part.startswith(("--unix", "--pidfile"))]
    greeting = (3).to_bytes(4, "big")
    go = b"IHAVEOPT" + (1).to_bytes(4, "big") + (0).to_bytes(4, "big")
    hang_up = (0x25609513).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes(20)
    done = subprocess.run(
        [command[0], "--single", *command[2:]],
        input=greeting + go + hang_up,
        capture_output=True,
        check=True,
    )
    log = done.stderr.decode()
    assert "error" not in log
    assert "client 1 (stdin) connected" in log


def test_an_nbdkit_in_the_background_logs_to_syslog(server, tmp_path, image):
    """With a /dev of its own, whose log is ours."""
    socket_path = tmp_path / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(socket_path))
        command = [part for part in server.command if part != "--foreground"]
        script = f"""
        mount -t tmpfs tmpfs /dev
        mknod /dev/null c 1 3
        mknod /dev/urandom c 1 9
        ln -s {socket_path} /dev/log
        exec "$@"
        """
        # Private to it, by unshare's default: else the mount would reach the host's /dev.
        private = ["unshare", "--mount", "bash", "-euc", script, "bash"]
        subprocess.run([*private, *command], check=True)
        wait_until(server.pidfile.exists)
        daemon = Daemon(server.pidfile)
        try:
            server.connect().pread(512, 0)
            server.disconnect()
        finally:
            daemon.kill(signal.SIGTERM)
        lines = []
        syslog.settimeout(30)
        while not lines or "ends" not in lines[-1]:
            lines.append(syslog.recv(4096).decode())
    assert all(re.match(rf"<30>.* nbdkit\[{daemon.pid}\]: ", line) for line in lines), lines
    assert f"serves {image.spec}" in lines[0]
    assert "connected" in lines[1]
    assert "gone: read 1 (512 bytes)" in lines[2]
