# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""An image mounted on a host without krbd, and without the nbd module."""

import pathlib
import shlex
import shutil
import subprocess
import tempfile

import pytest
from conftest import MIB, ROOT, recipe, run_script, wait_until

# XFS takes no disk that is smaller.
SIZE = 300 * MIB

# What a recipe that has failed may leave.
CLEAN_UP = "trap '{{ umount {0}/mnt/vm1; fusermount3 -u {0}/run/vm1; }} 2>/dev/null || true' EXIT"


@pytest.fixture
def place():
    """A folder for mounts, which no other run of pytest takes for an old one of its own."""
    with tempfile.TemporaryDirectory(prefix="rbd-export-mount.") as name:
        yield pathlib.Path(name)


def run_privately(script, place, cluster, directory):
    """Run commands where what they mount is seen by nobody else.

    Another test's mount namespace would have a copy of it, and keep it mounted.
    """
    script = f"{CLEAN_UP.format(place)}\n{script}"
    private = f"unshare --mount bash -euo pipefail -c {shlex.quote(script)}"
    return run_script(private, cluster, directory)


@pytest.mark.parametrize(
    ("mkfs", "check"),
    [("mkfs.ext4 -q", "e2fsck -fn"), ("mkfs.xfs -q", "xfs_repair -n")],
    ids=["ext4", "xfs"],
)
def test_a_tree_of_files_outlives_the_export(cluster, images, place, tmp_path, mkfs, check):
    image = images.create(SIZE)
    names = {
        "rbd/vm1": image.spec,
        "/run/vm1": place / "run/vm1",
        "/mnt/vm1": place / "mnt/vm1",
        # Before the test's own time is over, so that it can say what went wrong.
        "timeout 60": "timeout 30",
        "mkfs.ext4 -q": mkfs,
        "e2fsck -fn": check,
    }
    commands = recipe("With nbdfuse: no kernel module", names)
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    mount, unmount = commands.rsplit("umount", 1)
    write = f"cp -a {tree} {place}/mnt/vm1/\n"
    run_privately(f"{mount}{write}umount{unmount}", place, cluster, tmp_path)
    wait_until(lambda: not image.watchers())

    # A second nbdkit, which has seen none of this.
    mount = "\n".join(line for line in mount.splitlines() if not line.startswith("mkfs"))
    compare = f"diff -r --no-dereference {tree} {place}/mnt/vm1/tree\n"
    run_privately(f"{mount}\n{compare}umount{unmount}", place, cluster, tmp_path)
    wait_until(lambda: not image.watchers())
    assert str(place) not in subprocess.check_output(["losetup", "--list"], text=True)


def test_the_example_mount_unit_is_sound():
    unit = ROOT / "config/systemd/mnt-vm1.mount"
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Of keys that it does not know it only warns.
    assert unit.name not in done.stderr
