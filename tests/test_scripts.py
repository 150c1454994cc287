# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""ci/start-ceph.sh: what it starts, what it stops, and what it leaves alone."""

import pathlib
import subprocess

import pytest
from conftest import ROOT

SCRIPT = str(ROOT / "ci/start-ceph.sh")


def start_ceph(action, directory, *options, **more):
    return subprocess.run(
        [SCRIPT, action, directory, *options], capture_output=True, text=True, check=False, **more
    )


@pytest.fixture
def directories(tmp_path):
    made = [tmp_path / "one", tmp_path / "two"]
    yield made
    for directory in made:
        assert start_ceph("stop", directory).returncode == 0


def daemons(directory):
    """The daemons of a cluster, as the kernel knows them."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(directory / "ceph.conf") in command and command[0].startswith("ceph-"):
            found.append(command[0])
    return sorted(found)


def test_two_clusters_run_side_by_side_and_leave_no_process(directories):
    one, two = directories
    assert start_ceph("start", one).stdout == f"{one}/ceph.conf\n"
    assert start_ceph("start", two, "--store", "bluestore").returncode == 0
    for directory in directories:
        status = start_ceph("status", directory)
        assert status.returncode == 0
        assert "HEALTH_OK" in status.stdout
        assert daemons(directory) == ["ceph-mgr", "ceph-mon", "ceph-osd"]
        for user in ("rw", "ro"):
            subprocess.run(
                ["rbd", "--conf", directory / "ceph.conf", "--id", user, "ls", "rbd"], check=True
            )
    assert start_ceph("stop", one).returncode == 0
    assert daemons(one) == []
    assert start_ceph("status", one).returncode == 1
    assert start_ceph("status", two).returncode == 0


def test_stop_leaves_a_process_alone_that_is_no_daemon_of_this_cluster(tmp_path):
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/osd.0.pid").write_text(str(bystander.pid))
        try:
            assert start_ceph("stop", tmp_path).returncode == 0
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_start_touches_no_directory_that_it_did_not_make(tmp_path):
    (tmp_path / "ceph.conf").write_text("precious")
    (tmp_path / "keyring").write_text("precious")
    refusal = start_ceph("start", tmp_path)
    assert refusal.returncode == 1
    assert "is not empty" in refusal.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ceph.conf", "keyring"]
    assert (tmp_path / "keyring").read_text() == "precious"


def test_a_daemon_that_does_not_come_up_is_told_with_its_log(tmp_path):
    # No file of this process may grow beyond 4 KiB.
    limited = subprocess.run(
        ["prlimit", "--fsize=4096", SCRIPT, "start", tmp_path / "cluster"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert limited.returncode == 1
    assert "ceph-mon --mkfs failed; the end of its log:" in limited.stderr
    assert daemons(tmp_path / "cluster") == []
