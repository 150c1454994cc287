# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""What can be said on the command line, and what is answered to mistakes."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

import nbd
import pytest
from conftest import PLUGIN, ROOT, refused, unique, wait_until


def served_size(server):
    return server.start().connect().get_size()


# ---- what works --------------------------------------------------------------


def test_pool_and_image_are_enough(servers, image, cluster):
    server = servers(image.name, pool=cluster.pool)
    assert served_size(server) == 64 << 20


def test_the_pool_is_rbd_unless_said_otherwise(servers):
    assert "image 'rbd/no-such-image' not found" in refused(servers("no-such-image"))


def test_namespace_as_a_parameter_and_in_the_spec(servers, images, cluster):
    namespace = unique("ns")
    cluster.rbd("namespace", "create", f"{cluster.pool}/{namespace}", id="admin")
    image = images.create(5 << 20, namespace=namespace)
    assert served_size(servers(image)) == 5 << 20
    assert served_size(servers(image.name, pool=cluster.pool, namespace=namespace)) == 5 << 20


def test_snapshot_as_a_parameter_and_in_the_spec(servers, image):
    image.write(b"monday", 0)
    image.snap("monday")
    image.write(b"friday", 0)
    for server in servers(f"{image.spec}@monday"), servers(image, snapshot="monday"):
        assert server.start().connect().pread(6, 0) == b"monday"


def test_spec_and_parameters_may_say_the_same_twice(servers, image, cluster):
    assert served_size(servers(image, pool=cluster.pool)) == 64 << 20


def test_dash_and_underscore_are_the_same_in_a_key(servers, image):
    server = servers(image, connect_timeout=20, **{"ceph.rbd-cache-policy": "writeback"})
    assert server.start().connect().can_cache()


def test_user_is_another_word_for_id(servers, image):
    assert served_size(servers(image, id=None, user="rw")) == 64 << 20


def test_a_ceph_option_overrides_ceph_conf(servers, image):
    message = refused(servers(image, **{"ceph.keyring": "/dev/null"}))
    assert "cannot connect to the cluster: unknown user, or its key is missing or wrong" in message


def test_ceph_options_can_replace_ceph_conf(servers, image, cluster, tmp_path, monkeypatch):
    monkeypatch.delenv("CEPH_CONF")
    monitors = cluster.rados.conf_get("mon_host")
    server = servers(image, conf=None)
    server.parameters["ceph.mon_host"] = monitors
    server.parameters["ceph.keyring"] = cluster.rados.conf_get("keyring")
    assert served_size(server) == 64 << 20


def test_conf_is_the_one_of_ceph_conf_in_the_environment(servers, image, monkeypatch, cluster):
    monkeypatch.chdir(pathlib.Path(cluster.conf).parent)
    monkeypatch.setenv("CEPH_CONF", pathlib.Path(cluster.conf).name)
    assert served_size(servers(image, conf=None)) == 64 << 20


def test_the_cluster_name_goes_into_default_paths(servers, image, cluster, tmp_path):
    keyring = tmp_path / "backup.client.rw.keyring"
    shutil.copy(cluster.rados.conf_get("keyring"), keyring)
    conf = tmp_path / "ceph.conf"
    conf.write_text(
        f"[global]\nmon host = {cluster.rados.conf_get('mon_host')}\n"
        f"keyring = {tmp_path}/$cluster.$name.keyring\n"
    )
    assert served_size(servers(image, conf=conf, cluster="backup")) == 64 << 20
    assert "its key is missing or wrong" in refused(servers(image, conf=conf))


def test_relative_paths_hold_in_the_background(servers, image, cluster, tmp_path, monkeypatch):
    shutil.copy(cluster.rados.conf_get("keyring"), tmp_path / "keyring")
    (tmp_path / "my.conf").write_text(
        f"[global]\nmon host = {cluster.rados.conf_get('mon_host')}\nkeyring = keyring\n"
    )
    monkeypatch.chdir(tmp_path)
    server = servers(image, conf="my.conf")
    command = [word for word in server.command if word != "--foreground"]
    subprocess.run(command, check=True)
    pid = int(wait_until(lambda: server.pidfile.exists() and server.pidfile.read_text()))
    try:
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        client = server.connect()
        assert client.get_size() == 64 << 20
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not pathlib.Path(f"/proc/{pid}").exists())


def test_without_the_probe_nbdkit_starts_although_the_image_is_missing(servers, images, cluster):
    name = unique("late")
    server = servers(f"{cluster.pool}/{name}", probe="no").start()
    with pytest.raises(nbd.Error):
        server.connect()
    images.create(6 << 20, name=name)
    assert server.connect().get_size() == 6 << 20


def test_dump_plugin_lists_every_parameter_without_a_cluster():
    facts = plugin_facts()
    assert facts["rbd_export_version"].count(".") == 2
    assert facts["librbd_version"].startswith("1.")
    assert "image" in facts["rbd_export_parameters"].split()


def readme_rows():
    """The rows of the README's table of parameters: (parameters, default, meaning)."""
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and "=" in cells[0]:
            yield cells


def readme_parameters():
    return {word.strip("` ").split("=")[0] for row in readme_rows() for word in row[0].split(",")}


def manual_parameters():
    """The parameters of the manual page: {name: its default, if one is told}."""
    text = (ROOT / "docs/nbdkit-rbd-plugin.pod").read_text()
    section = text.split("=head1 PARAMETERS")[1].split("=head1")[0]
    found = {}
    for items, description in re.findall(
        r"((?:^=item [^\n]*\n\n)+)(.*?)(?=^=)", section, re.M | re.S
    ):
        default = re.search(r"^\(Default: C<([^>]*)>\)$", description, re.M)
        for name in re.findall(r"^=item B<([^>=]*)=", items, re.M):
            found[name] = default and default[1]
    return found


def plugin_facts():
    done = subprocess.run(
        ["nbdkit", "python", str(PLUGIN), "--dump-plugin"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "CEPH_CONF": "/nonexistent"},
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_code_readme_and_manual_know_the_same_parameters():
    known = set(plugin_facts()["rbd_export_parameters"].split())
    assert known == readme_parameters()
    assert known == set(manual_parameters())


def test_readme_and_manual_state_the_defaults_of_the_code():
    start = "rbd_export_default_"
    defaults = {
        key.removeprefix(start).replace("_", "-"): value
        for key, value in plugin_facts().items()
        if key.startswith(start)
    }
    assert defaults
    readme = {
        row[0].strip("`").split("=")[0]: default[1]
        for row in readme_rows()
        if (default := re.fullmatch("`([^`]*)`", row[1]))
    }
    manual = {name: default for name, default in manual_parameters().items() if default}
    assert manual.pop("user") == manual["id"]
    assert readme == manual == defaults


# ---- mistakes, found without the cluster -------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keyring": "x"}, "unknown parameter 'keyring'; did you mean 'ceph.keyring'?"),
        ({"images-per-connection": "2"}, "'image' and 'images-per-connection' exclude"),
        ({"imgae": "x"}, "unknown parameter 'imgae'; did you mean 'image'?"),
        ({"connect_timeuot": "1"}, "unknown parameter 'connect_timeuot'; did you mean"),
        ({"xyzzy": "1"}, "unknown parameter 'xyzzy'"),
        ({"ceph.": "1"}, "unknown parameter 'ceph.'"),
        ({"image": None}, "parameter 'image' is missing"),
        ({"image": ""}, "parameter 'image': must not be empty"),
        ({"pool": ""}, "parameter 'pool': must not be empty"),
        ({"image": "a/b/c/d"}, "image 'a/b/c/d' is malformed"),
        ({"image": "pool//image"}, "image 'pool//image' is malformed"),
        ({"image": "/image"}, "image '/image' is malformed"),
        ({"image": "pool/"}, "image 'pool/' is malformed"),
        ({"image": "image@"}, "image 'image@' is malformed"),
        ({"image": "@snap"}, "image '@snap' is malformed"),
        ({"image": "image@a@b"}, "image 'image@a@b' is malformed"),
        ({"image": "a/b", "pool": "c"}, "'image=a/b' contradicts 'pool=c'"),
        ({"image": "a/n/b", "namespace": "m"}, "'image=a/n/b' contradicts 'namespace=m'"),
        ({"image": "b@s", "snapshot": "t"}, "'image=b@s' contradicts 'snapshot=t'"),
        ({"conf": "/no/such.conf"}, "cannot read '/no/such.conf': No such file"),
        ({"conf": "/"}, "cannot read '/': Is a directory"),
        ({"ceph.no_such_option": "1"}, "parameter 'ceph.no_such_option': Ceph has no such option"),
        ({"ceph.rbd_cache": "maybe"}, "parameter 'ceph.rbd_cache': Ceph refuses its value"),
        ({"connect-timeout": "0"}, "parameter 'connect-timeout': '0' is not a whole number"),
        ({"connect-timeout": "-1"}, "parameter 'connect-timeout': '-1' is not a whole number"),
        ({"connect-timeout": "1.5"}, "parameter 'connect-timeout': '1.5' is not a whole number"),
        ({"connect-timeout": "²"}, "parameter 'connect-timeout': '²' is not a whole number"),
        ({"io-timeout": "soon"}, "parameter 'io-timeout': 'soon' is not a whole number"),
        ({"io-timeout": "9" * 30}, "is not a whole number"),
        ({"id": "client.rw"}, "parameter 'id': 'client.rw' must go without 'client.'"),
        ({"probe": "maybe"}, "parameter 'probe': 'maybe' is neither 'yes' nor 'no'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_a_mistake_is_answered_with_a_line_that_names_it(servers, parameters, message):
    assert message in refused(servers("rbd/image", **parameters))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("pool=x", "pool=y"),
        ("io-timeout=1", "io_timeout=1"),
        ("id=x", "user=x"),
        ("ceph.rbd_cache=true", "ceph.rbd-cache=true"),
    ],
)
def test_a_parameter_given_twice_is_refused(servers, first, second):
    server = servers("rbd/image", id=None)
    server.extra = [first, second]
    assert f"parameter '{second.split('=')[0]}' is given twice" in refused(server)


def test_a_conf_that_is_no_ini_file_is_named(servers, tmp_path):
    conf = tmp_path / "broken.conf"
    conf.write_text("this is not\nan ini = [file\n")
    message = refused(servers("rbd/image", conf=conf))
    assert str(conf) in message


def test_a_conf_whose_name_is_not_utf_8_is_named(servers, monkeypatch):
    monkeypatch.setenv("CEPH_CONF", "/no/such\udcff.conf")
    assert "cannot read '/no/such\\udcff.conf'" in refused(servers("rbd/image", conf=None))


def test_a_ceph_conf_in_the_working_directory_does_not_count(servers, tmp_path, monkeypatch):
    (tmp_path / "ceph.conf").write_text("this is not\nan ini = [file\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CEPH_CONF")
    assert "no monitor address is known" in refused(servers("rbd/image", conf=None))


def test_an_image_that_brings_back_lost_errors_is_refused(servers, image, cluster):
    cluster.rbd("config", "image", "set", image.spec, "rbd_cache_max_dirty", "1000000")
    assert "sets rbd_cache_max_dirty for itself" in refused(servers(image))
    cluster.rbd("config", "image", "set", image.spec, "rbd_cache_policy", "writeback")
    assert served_size(servers(image)) == 64 << 20


def test_a_conf_that_may_not_be_read_is_named(servers, tmp_path):
    conf = tmp_path / "a b.conf"
    conf.write_text("[global]\n")
    assert "a b.conf" in refused(servers("rbd/image", conf=conf))


def test_the_value_of_a_refused_ceph_option_is_not_repeated(servers):
    assert "geheim" not in refused(servers("rbd/image", **{"ceph.rbd_cache": "geheim"}))


# ---- mistakes, found by the start-up probe -----------------------------------


def test_a_missing_pool_namespace_image_or_snapshot_is_named(servers, image, cluster):
    pool, name = cluster.pool, image.name
    spec = image.spec
    for mistaken, message in {
        f"no-such-pool/{name}": "pool 'no-such-pool' not found",
        f"{pool}/no-such-ns/{name}": f"namespace 'no-such-ns' not found in pool '{pool}'",
        f"{pool}/no-such-image": f"image '{pool}/no-such-image' not found",
        f"{pool}/{name}@no-such-snap": f"snapshot 'no-such-snap' not found in image '{spec}'",
        f"{pool}/no-such-image@snap": f"image '{pool}/no-such-image' not found",
    }.items():
        refusal = refused(servers(mistaken))
        assert message in refusal
        assert "'client.rw'" in refusal
        assert cluster.conf in refusal


def test_an_unknown_user_is_named(servers, image):
    assert "'client.nobody'" in refused(servers(image, id="nobody"))


def test_a_wrong_key_is_told(servers, image, tmp_path, cluster):
    keyring = tmp_path / "keyring"
    cluster.command(
        "ceph-authtool", "--create-keyring", keyring, "--gen-key", "--name=client.rw", id="x"
    )
    message = refused(servers(image, **{"ceph.keyring": keyring}))
    assert "cannot connect to the cluster: unknown user, or its key is missing or wrong" in message


def test_a_keyring_that_cannot_be_read_is_told(servers, image, tmp_path):
    message = refused(servers(image, **{"ceph.keyring": tmp_path / "missing"}))
    assert "unknown user, or its key is missing or wrong;" in message
    assert "no file of the option 'keyring' can be read" in message


def test_a_user_without_permission_is_told(servers, image, cluster):
    with cluster.key(mon="profile rbd", osd="profile rbd pool=another") as login:
        message = refused(servers(image, **login))
    assert f"no permission to open image '{image.spec}'" in message


def test_a_user_without_osd_capabilities_is_told(servers, image, cluster):
    with cluster.key(mon="profile rbd") as login:
        message = refused(servers(image, **login, **{"connect-timeout": 2}))
    # Ceph 16 refuses at once, Ceph 18 does not answer.
    assert "no permission to open image" in message or "no OSD capabilities" in message


def test_a_cluster_out_of_reach_is_told_within_connect_timeout(servers, image):
    # A monitor that takes connections and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monitor = f"v2:127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        message = refused(servers(image, **{"ceph.mon_host": monitor, "connect-timeout": 2}))
        assert time.monotonic() - begin < 6
    assert "no monitor answered within 2 s (connect-timeout)" in message


def test_no_monitor_address_at_all_is_told(servers, image, tmp_path):
    conf = tmp_path / "empty.conf"
    conf.write_text("[global]\n")
    assert "no monitor address is known" in refused(servers(image, conf=conf))
