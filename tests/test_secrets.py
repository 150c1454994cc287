# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Neither the key nor the way to it is told to anybody."""

import pathlib
import re
import subprocess

import nbd
import pytest
from conftest import PLUGIN, wait_until


@pytest.fixture
def user(cluster, tmp_path):
    """A ceph.conf that names the keyring of a user, as the README has it."""
    with cluster.key(mon="profile rbd", osd=f"profile rbd pool={cluster.pool}") as login:
        keyring = tmp_path / "the-keyring"
        keyring.write_text(login["ceph.keyring"].read_text())
        conf = tmp_path / "ceph.conf"
        conf.write_text(
            f"[global]\nmon host = {cluster.rados.conf_get('mon_host')}\nkeyring = {keyring}\n"
        )
        key = re.search(r"key = (\S+)", keyring.read_text())[1]
        yield {"id": login["id"], "conf": conf}, keyring, (key, str(keyring), keyring.name)


def assert_silent(text, secrets):
    for secret in secrets:
        assert secret not in text


@pytest.mark.parametrize("verbose", [[], ["-v"]], ids=["plain", "verbose"])
def test_neither_log_nor_command_line_has_a_secret(servers, image, user, verbose):
    parameters, _, secrets = user
    server = servers(image, **parameters)
    server.options = verbose
    client = server.start().connect()
    client.pwrite(b"x", 0)
    client.flush()
    assert_silent(pathlib.Path(f"/proc/{server.process.pid}/cmdline").read_text(), secrets)
    assert_silent(pathlib.Path(f"/proc/{server.process.pid}/environ").read_text(), secrets)
    server.stop()
    assert_silent(server.log(), secrets)


@pytest.mark.parametrize("verbose", [[], ["-v"]], ids=["plain", "verbose"])
@pytest.mark.parametrize("fault", ["missing", "wrong key", "no key"])
def test_a_login_that_fails_tells_no_secret(servers, image, user, fault, verbose):
    parameters, keyring, secrets = user
    server = servers(image, **parameters, probe="no")
    server.options = verbose
    server.start()
    if fault == "missing":
        keyring.unlink()
    elif fault == "no key":
        keyring.write_text("")
    else:
        wrong = "AQ" + "B" * (len(secrets[0]) - 4) + "=="
        keyring.write_text(keyring.read_text().replace(secrets[0], wrong))
        secrets = (*secrets, wrong)
    with pytest.raises(nbd.Error):
        server.connect()
    wait_until(lambda: "cannot connect to the cluster" in server.log())
    server.stop()
    assert_silent(server.log(), secrets)


def test_what_the_plugin_is_and_refuses_tells_no_secret(servers, image, user):
    parameters, keyring, secrets = user
    words = [f"{name}={value}" for name, value in parameters.items()]
    dump = ["nbdkit", "--dump-plugin", "python", str(PLUGIN)]
    assert_silent(subprocess.run(dump, capture_output=True, text=True, check=True).stdout, secrets)
    keyring.unlink()
    command = [
        "nbdkit",
        "-v",
        "-f",
        "-U",
        "-",
        "python",
        str(PLUGIN),
        f"image={image.spec}",
        *words,
    ]
    refusal = subprocess.run(command, capture_output=True, text=True)
    assert refusal.returncode == 1
    assert "cannot connect to the cluster" in refusal.stderr
    assert_silent(refusal.stderr, secrets)
