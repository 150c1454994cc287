# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Installing the plugin, and what nbdkit and man find then."""

import os
import shutil
import subprocess
import sys

from conftest import PLUGIN, ROOT, recipe, run_script


def in_copied_system(script, **environment):
    """Run commands with a copy of /usr, whose changes are gone afterwards."""
    overlay = """
    mount -t tmpfs tmpfs /mnt
    mkdir /mnt/upper /mnt/work
    mount -t overlay overlay -o lowerdir=/usr,upperdir=/mnt/upper,workdir=/mnt/work /usr
    """
    return subprocess.run(
        ["unshare", "--mount", "bash", "-euc", overlay + script],
        env=os.environ | environment,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def directories():
    done = subprocess.run(["nbdkit", "--dump-config"], check=True, capture_output=True, text=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_nbdkit_finds_the_plugin_once_it_is_installed(cluster, image):
    output = in_copied_system(
        f"""
        ci/install.sh
        cd /
        env -u CEPH_CONF nbdkit rbd --dump-plugin
        nbdkit -U - rbd image={image.spec} --run 'nbdinfo --size "$uri"'
        nbdinfo --size [ rbd_export.py image={image.spec} ]
        """,
        CEPH_CONF=cluster.conf,
    )
    assert "rbd_export_version=0." in output
    assert "librbd_version=1." in output
    assert output.endswith("\n67108864\n67108864\n")
    assert not os.path.exists(f"{directories()['plugindir']}/nbdkit-rbd-plugin")


def test_a_clean_prefix_has_the_script_and_the_manual(tmp_path):
    where = directories()
    subprocess.run(
        [ROOT / "ci/install.sh"],
        env=os.environ | {"DESTDIR": str(tmp_path)},
        check=True,
        capture_output=True,
    )
    files = {f"/{path.relative_to(tmp_path)}" for path in tmp_path.rglob("*") if path.is_file()}
    plugin = f"{where['plugindir']}/nbdkit-rbd-plugin"
    manual = f"{where['mandir']}/man1/nbdkit-rbd-plugin.1"
    command = f"{where['bindir']}/rbd_export.py"
    links = {f"/{path.relative_to(tmp_path)}" for path in tmp_path.rglob("*") if path.is_symlink()}
    assert files == {plugin, manual}
    assert links == {command}
    assert os.readlink(tmp_path / command[1:]) == plugin
    installed = tmp_path / plugin[1:]
    assert installed.read_bytes() == PLUGIN.read_bytes()
    assert installed.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / manual[1:]).stat().st_mode & 0o777 == 0o644
    text = (tmp_path / manual[1:]).read_text()
    title = next(line for line in text.splitlines() if line.startswith(".TH "))
    assert title.startswith(".TH nbdkit-rbd-plugin 1 ")
    assert '"rbd_export 0.' in title


def test_the_line_that_the_readme_prints_installs_the_plugin(cluster, tmp_path):
    """In place of ci/install.sh."""
    script = recipe("Install", {"sudo ci/install.sh": ": here goes the script", "sudo ": ""})
    in_copied_system(
        f"{script}\nnbdkit rbd --dump-plugin | grep rbd_export_version= > {tmp_path}/version"
    )
    assert (tmp_path / "version").stat().st_size


def test_pip_installs_the_same_script_as_a_command(cluster, image, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "rbd_export.py"):
        shutil.copy2(ROOT / name, source)
    run_script(
        f"""
        /usr/bin/python3 -m venv --system-site-packages {tmp_path}/venv
        {tmp_path}/venv/bin/pip install --quiet --no-index --no-build-isolation {source}
        """,
        cluster,
        tmp_path,
    )
    command = tmp_path / "venv/bin/rbd_export.py"
    assert command.read_bytes() == PLUGIN.read_bytes()
    output = run_script(
        f"""
        {command} -U - image={image.spec} --run 'nbdinfo --size "$uri"'
        {tmp_path}/venv/bin/pip show rbd-export | grep Version
        {command} --dump-plugin | grep rbd_export_version
        """,
        cluster,
        tmp_path,
    )
    size, version, dumped = output.splitlines()
    assert size == "67108864"
    assert version.split(": ")[1] == dumped.split("=")[1]


def test_a_python_without_ceph_is_told_to_the_user(tmp_path):
    """As when another python3 comes first in PATH: nbdkit's takes its modules, too."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    path = f"{tmp_path}/venv/bin:{os.environ['PATH']}"
    done = subprocess.run(
        ["nbdkit", "python", PLUGIN, "image=x"],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "install python3-rados and python3-rbd" in done.stderr
    assert f"{tmp_path}/venv, by the python3 that comes first in PATH" in done.stderr
    assert "Traceback" not in done.stderr
