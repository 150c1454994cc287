# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""The documents against the code, and against each other."""

import ast
import os
import re
import signal

import pytest
from conftest import MIB, PLUGIN, ROOT, Daemon, assert_same, recipe, run_script, unique

TELLS = {
    "ExportError",
    "NoPermission",
    "ValueError",
    "ModuleNotFoundError",
    "ConnectionShutdown",
    "log_error",
    "tell_once",
}


def wording(node):
    """The text of an expression, with … for what is only known when the program runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(wording, values))
        case ast.BinOp(left=left, right=right):
            return wording(left) + wording(right)
        case ast.IfExp(body=body):
            return wording(body)
    return "…"


def messages():
    """Everything that the plugin may tell a user."""
    found = set()
    for node in ast.walk(ast.parse(PLUGIN.read_text())):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[told, *_]):
                if name in TELLS or wording(told).startswith("nbdkit: warning"):
                    found.add(wording(told))
            case ast.Assign(targets=[ast.Name(id="reason" | "report" | "BAD_HEADER")], value=value):
                found.add(wording(value))
            case ast.Return(value=value) if value and "not found" in wording(value):
                found.add(wording(value))
            case ast.Dict(keys=[ast.Attribute(attr="ENOTSUP"), *_], values=values):
                found |= set(map(wording, values))
    return {text for text in found if re.search("[a-z]{4}", text)}


def test_troubleshooting_knows_every_message_and_no_other():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    explained = {
        message
        for bullet in re.findall(r"^- ((?:`[^`]+`(?:,\s*)?)+):", text, re.M)
        for message in re.findall("`([^`]+)`", bullet)
    }
    assert messages() - explained == set()
    assert explained - messages() == set()


def test_links_between_the_documents_lead_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if target.startswith("http"):
                continue
            file, _, heading = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), f"{path.name}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
                anchors = [
                    re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings
                ]
                assert heading in anchors, f"{path.name}: {target}"


@pytest.fixture
def user(cluster):
    """The name of a user that a recipe makes."""
    name = unique("rbd-export-test")
    yield name
    cluster.ceph("auth", "rm", f"client.{name}")


@pytest.fixture
def pidfile(tmp_path):
    """Of an nbdkit that a recipe leaves in the background."""
    path = tmp_path / "nbdkit.pid"
    yield path
    if path.exists():
        Daemon(path).kill(signal.SIGTERM)


def test_the_first_steps_of_the_readme_work_as_printed(cluster, images, tmp_path, user, pidfile):
    image = images.create(8 * MIB)
    image.write(os.urandom(MIB), MIB)
    names = {
        "pool=rbd": f"pool={cluster.pool}",
        "client.nbd": f"client.{user}",
        "id=nbd": f"id={user} ceph.keyring=ceph.client.{user}.keyring",
        "nbdkit --unix": f"nbdkit --pidfile={pidfile} --unix",
        "/run/vm1.sock": tmp_path / "vm1.sock",
        "rbd/vm1": image.spec,
    }
    run_script(recipe("Use it", names), cluster, tmp_path)
    assert_same((tmp_path / "vm1.raw").read_bytes(), image.read(0, 8 * MIB))


def test_the_gateway_of_the_readme_works_as_printed(cluster, images, tmp_path, pidfile):
    image = images.create(8 * MIB, name="vm1")
    images.create(name="vm-secret1")
    image.write(b"monday" * 1000, 0)
    image.snap("monday")
    image.write(b"tuesday" * 1000, 0)
    names = {
        "pool=rbd": f"pool={cluster.pool}",
        "id=nbd": "id=rw",
        "nbdkit --unix": f"nbdkit --pidfile={pidfile} --unix",
        "/run/rbd.sock": tmp_path / "rbd.sock",
    }
    listed = run_script(recipe("Serve a whole pool", names), cluster, tmp_path)
    assert set(re.findall('export="(.*)"', listed)) == {"vm1", "vm1@monday"}
    assert_same((tmp_path / "vm1.raw").read_bytes(), image.read(0, 8 * MIB))
    assert_same((tmp_path / "monday.raw").read_bytes(), image.read(0, 8 * MIB, "monday"))
