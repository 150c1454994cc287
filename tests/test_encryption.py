# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Images encrypted with LUKS: clients see the plain image, the cluster has the ciphertext."""

import contextlib
import os
import random
import subprocess

import nbd
import pytest
import rbd
from conftest import (
    MIB,
    OBJECT,
    Image,
    assert_same,
    extents,
    recipe,
    refused,
    run_script,
    unique,
    wait_until,
)

FUA = nbd.CMD_FLAG_FUA
FAST_ZERO = nbd.CMD_FLAG_FAST_ZERO
NO_HOLE = nbd.CMD_FLAG_NO_HOLE
DATA, HOLE, ZERO = 0, 1, 3

SIZE = 32 * MIB
HEADER = 4 * MIB  # of LUKS, as the images here have it
PASSPHRASE = b"correct horse battery"

# Since Ceph 18 a clone may have a format and passphrase of its own.
LAYERED = hasattr(rbd.Image, "encryption_load2")


def luks_header(directory, kind, passphrase=PASSPHRASE):
    """What cryptsetup writes, so that a passphrase is quick to try."""
    path = directory / "header"
    with path.open("wb") as file:
        file.truncate(2 * HEADER)
    subprocess.run(
        [
            *("cryptsetup", "luksFormat", "--batch-mode", "--type", kind, "--key-file", "-"),
            *("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
            *("--offset", str(HEADER // 512), path),
        ],
        input=passphrase,
        check=True,
    )
    data = path.read_bytes()[:HEADER]
    path.unlink()
    return data


@contextlib.contextmanager
def decrypted(image, kind, **options):
    """The plain image as librbd has it, without the export."""
    with image.open(**options) as opened:
        opened.encryption_load(getattr(rbd, f"RBD_ENCRYPTION_FORMAT_{kind.upper()}"), PASSPHRASE)
        yield opened


@pytest.fixture(params=["luks1", "luks2"])
def kind(request):
    return request.param


@pytest.fixture
def encrypt(tmp_path, kind):
    def encrypt(image):
        image.write(luks_header(tmp_path, kind), 0)
        return image

    return encrypt


@pytest.fixture
def encrypted(images, encrypt):
    """An encrypted image of SIZE for clients."""
    return encrypt(images.create(HEADER + SIZE))


@pytest.fixture
def passphrase_file(tmp_path):
    path = tmp_path / "passphrase"
    path.touch(0o600)
    path.write_bytes(PASSPHRASE)
    return path


@pytest.fixture
def opener(passphrase_file):
    """The parameters that decrypt an image."""
    return {"encryption-format": "luks", "passphrase-file": passphrase_file}


def assert_reads_as_told(client, told):
    """What is called a hole, or zero, must read as zeroes."""
    for offset, length, flags in told:
        assert flags in (DATA, ZERO)
        if flags == ZERO:
            assert_same(client.pread(length, offset), bytes(length))


# ---- data --------------------------------------------------------------------


@pytest.mark.parametrize("format", ["luks", "as it is"])
def test_a_client_has_the_plain_image_and_the_cluster_the_ciphertext(
    servers, encrypted, kind, opener, format
):
    parameters = opener | {"encryption-format": "luks" if format == "luks" else kind}
    client = servers(encrypted, **parameters).start().connect()
    assert client.get_size() == SIZE
    text = b"in the clear " * 1000
    places = 0, OBJECT - 100, 9 * MIB + 7, SIZE - len(text)
    for place in places:
        client.pwrite(text, place, FUA if place else 0)
    client.flush()
    with decrypted(encrypted, kind, read_only=True) as plain:
        for place in places:
            assert_same(client.pread(len(text), place), text)
            assert_same(plain.read(place, len(text)), text)
    stored = encrypted.read(0, HEADER + SIZE)
    assert stored[:4] == b"LUKS"
    assert b"in the clear" not in stored
    assert len(set(stored[HEADER : HEADER + 4096])) == 256
    assert PASSPHRASE not in stored


def test_qemu_decrypts_what_was_written(servers, images, tmp_path, opener):
    """qemu has a LUKS of its own, for the format luks1."""
    image = images.create(HEADER + SIZE)
    header = luks_header(tmp_path, "luks1")
    image.write(header, 0)
    data = os.urandom(3 * MIB)
    client = servers(image, **opener).start().connect()
    client.pwrite(data, MIB + 512)
    client.flush()
    stored, plain = tmp_path / "stored", tmp_path / "plain"
    stored.write_bytes(image.read(0, HEADER + SIZE))
    subprocess.run(
        [
            *("qemu-img", "convert", "-O", "raw", "--image-opts"),
            *("--object", f"secret,id=key,file={opener['passphrase-file']}"),
            f"driver=luks,key-secret=key,file.filename={stored}",
            str(plain),
        ],
        check=True,
    )
    assert_same(plain.read_bytes()[MIB + 512 :][: len(data)], data)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["luks2"])  # to format takes 10 s
def test_an_image_that_rbd_has_formatted_opens(cluster, servers, images, opener, kind):
    image = images.create(64 * MIB)
    cluster.rbd("encryption", "format", image.spec, kind, opener["passphrase-file"])
    client = servers(image, **opener).start().connect()
    assert client.get_size() == 64 * MIB - {"luks1": 4, "luks2": 16}[kind] * MIB
    client.pwrite(b"x" * 5000, 12345)
    client.flush()
    with decrypted(image, kind, read_only=True) as plain:
        assert plain.size() == client.get_size()
        assert plain.read(12345, 5000) == b"x" * 5000


def test_random_requests_match_a_model(servers, encrypted, opener):
    """What nobody has written may have any content, which stays what it is."""
    dice = random.Random(16)
    client = servers(encrypted, **opener).start().connect()
    content, known = bytearray(SIZE), bytearray(SIZE)
    for _ in range(150):
        offset = dice.choice([dice.randrange(SIZE), dice.randrange(8) * OBJECT])
        length = min(dice.choice([1, 512, 4096, 5000, MIB, OBJECT]), SIZE - offset)
        if dice.random() < 0.5:
            data = dice.randbytes(length)
            client.pwrite(data, offset, dice.choice([0, FUA]))
        else:
            data = bytes(length)
            client.zero(length, offset, dice.choice([0, NO_HOLE, FUA]))
        content[offset : offset + length] = data
        known[offset : offset + length] = b"\xff" * length
    client.flush()
    for place in range(0, SIZE, OBJECT):
        found = client.pread(OBJECT, place)
        mask = int.from_bytes(known[place : place + OBJECT], "little")
        want = int.from_bytes(content[place : place + OBJECT], "little")
        assert int.from_bytes(found, "little") & mask == want


def test_zeroes_are_written_and_nothing_is_trimmed(servers, encrypted, opener):
    """librbd frees nothing of an encrypted image: trimming would write zeroes instead."""
    client = servers(encrypted, **opener).start().connect()
    client.pwrite(b"x" * OBJECT, 0)
    assert not client.can_trim()
    assert client.can_fast_zero()
    for flags in (FAST_ZERO, FAST_ZERO | NO_HOLE):
        with pytest.raises(nbd.Error) as refusal:
            client.zero(OBJECT, 0, flags)
        assert refusal.value.errno == "ENOTSUP"
    assert client.pread(OBJECT, 0) == b"x" * OBJECT
    client.zero(OBJECT - 1000, 1000)
    assert client.pread(OBJECT, 0) == b"x" * 1000 + bytes(OBJECT - 1000)


# ---- block status ------------------------------------------------------------


@pytest.mark.parametrize("precision", ["exact", "objects"])
@pytest.mark.parametrize("map", ["object map", "no object map"])
def test_only_what_reads_as_zeroes_is_called_so(servers, images, encrypt, opener, precision, map):
    """In an object that exists, what nobody has written does not read as zeroes."""
    basic = rbd.RBD_FEATURE_LAYERING | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    features = {} if map == "object map" else {"features": basic}
    image = encrypt(images.create(HEADER + SIZE, **features))
    writer = servers(image, **opener).start().connect()
    read_only = servers(image, **opener | {"extents": precision})
    read_only.options = ["-r"]
    client = read_only.start().connect()
    assert extents(client, 0, SIZE) == [(0, SIZE, ZERO)]
    writer.pwrite(b"x", OBJECT)
    writer.pwrite(b"x", 2 * OBJECT - 1)
    writer.pwrite(b"x", 5 * OBJECT)
    told = extents(client, 0, SIZE)
    assert told == [
        (0, OBJECT, ZERO),
        (OBJECT, OBJECT, DATA),
        (2 * OBJECT, 3 * OBJECT, ZERO),
        (5 * OBJECT, OBJECT, DATA),
        (6 * OBJECT, 2 * OBJECT, ZERO),
    ]
    assert any(client.pread(65536, OBJECT + MIB))  # the reason for all this
    assert_reads_as_told(client, told)
    assert extents(client, OBJECT - 4096, 8192) == [
        (OBJECT - 4096, 4096, ZERO),
        (OBJECT, 4096, DATA),
    ]
    assert extents(client, 2 * OBJECT + 5, 100) == [(2 * OBJECT + 5, 100, ZERO)]


def test_of_an_image_that_may_be_written_all_is_data(servers, encrypted, opener):
    """What reads as zeroes reads as something else once a neighbour is written."""
    client = servers(encrypted, **opener).start().connect()
    assert extents(client, 0, SIZE) == [(0, SIZE, DATA)]
    assert client.pread(4096, OBJECT + MIB) == bytes(4096)
    client.pwrite(b"x", OBJECT)
    client.pwrite(b"x", 2 * OBJECT - 1)
    assert client.pread(4096, OBJECT + MIB) != bytes(4096)


@pytest.mark.parametrize("program", ["nbdcopy", "qemu-img"])
def test_a_sparse_disk_that_is_copied_in_is_the_same(servers, encrypted, opener, tmp_path, program):
    server = servers(encrypted, **opener).start()
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
        for place in (0, MIB, 5 * MIB + 65536, 30 * MIB):
            file.seek(place)
            file.write(os.urandom(65536))
    uri = f"nbd+unix:///?socket={server.socket}"
    command = {
        "nbdcopy": ["nbdcopy", "--flush", disk, uri],
        "qemu-img": ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", disk, uri],
    }[program]
    subprocess.run(command, check=True)
    assert_same(server.connect().pread(SIZE, 0), disk.read_bytes())


def test_an_increment_has_what_has_changed(servers, encrypted, opener):
    first = servers(encrypted, **opener).start()
    first.connect().pwrite(b"m" * 8192, 0)
    first.stop()
    encrypted.snap("monday")
    second = servers(encrypted, **opener).start()
    second.connect().pwrite(b"t" * 10, 3 * OBJECT + 5000)
    second.stop()
    encrypted.snap("tuesday")
    for snapshot in ("tuesday", ""):
        name = f"{encrypted.spec}@monday..{snapshot}"
        client = servers(name, **opener).start().connect()
        assert extents(client, 0, SIZE) == [
            (0, 3 * OBJECT, HOLE),
            (3 * OBJECT, OBJECT, DATA),
            (4 * OBJECT, 4 * OBJECT, HOLE),
        ]
        assert client.pread(8192, 0) == b"m" * 8192
        assert client.pread(10, 3 * OBJECT + 5000) == b"t" * 10


# ---- other ways to open it ---------------------------------------------------


def test_a_snapshot_a_point_in_time_and_a_read_only_export_are_decrypted(
    servers, encrypted, opener
):
    writer = servers(encrypted, **opener).start().connect()
    writer.pwrite(b"past" * 1024, MIB)
    writer.flush()
    encrypted.snap("s")
    point = servers(encrypted, **opener | {"point-in-time": "yes"}).start().connect()
    writer.pwrite(b"now!" * 1024, MIB)
    writer.flush()
    read_only = servers(encrypted, **opener)
    read_only.options = ["-r"]
    snapshot = servers(f"{encrypted.spec}@s", **opener).start().connect()
    assert snapshot.get_size() == point.get_size() == SIZE
    assert snapshot.pread(4096, MIB) == point.pread(4096, MIB) == b"past" * 1024
    now = read_only.start().connect()
    assert now.pread(4096, MIB) == b"now!" * 1024
    assert extents(now, 0, SIZE) == [(0, OBJECT, DATA), (OBJECT, SIZE - OBJECT, ZERO)]
    # The header of the image changes: it is opened, and decrypted, anew.
    encrypted.snap("another")
    with encrypted.open() as opened:
        opened.resize(HEADER + SIZE + OBJECT)
    assert now.pread(4096, MIB) == b"now!" * 1024


def resize(image, size):
    """Return the size that clients are to see.

    The owner of the lock resizes for others, and since Ceph 17 takes the size for that of the
    plain image.
    """
    with image.open() as opened:
        opened.resize(size)
    with image.open(read_only=True) as opened:
        return opened.size() - HEADER


def test_a_client_that_comes_after_a_resize_sees_the_new_size(servers, encrypted, opener):
    server = servers(encrypted, **opener).start()
    server.connect().pwrite(b"x", 0)
    size = resize(encrypted, SIZE + 3 * OBJECT)
    assert size >= SIZE + 2 * OBJECT
    second = server.connect()
    assert second.get_size() == size
    second.pwrite(b"y" * 4096, SIZE + OBJECT)
    second.flush()
    size = resize(encrypted, 2 * OBJECT)
    assert size <= 2 * OBJECT
    third = server.connect()
    assert third.get_size() == size
    assert third.pread(1, 0) == b"x"


def test_a_gateway_decrypts_every_image(servers, images, encrypt, opener):
    several = [encrypt(images.create(HEADER + SIZE)) for _ in range(2)]
    plain = images.create(SIZE)
    parameters = opener | {"image": None, "pool": plain.pool, "exports": "*"}
    server = servers(plain, **parameters).start()
    for number, image in enumerate(several):
        client = server.connect(image.name)
        client.pwrite(bytes([65 + number]) * 4096, 0)
        client.flush()
    for number, image in enumerate(several):
        assert server.connect(image.name).pread(4096, 0) == bytes([65 + number]) * 4096
    with pytest.raises(nbd.Error):
        server.connect(plain.name)
    wait_until(lambda: f"image '{plain.spec}' is not encrypted" in server.log())


@pytest.fixture
def clone(servers, images, encrypted, opener):
    """A clone of an encrypted image, full of data."""
    server = servers(encrypted, **opener).start()
    client = server.connect()
    for place in range(0, SIZE, OBJECT):
        client.pwrite(b"p" * OBJECT, place)
    server.stop()
    encrypted.snap("s", protect=True)
    return images.clone(encrypted, "s")


def test_a_clone_that_is_flattened_while_a_client_writes_keeps_its_header(
    cluster, servers, clone, opener
):
    """The owner of the lock flattens for others; librbd 16 leaves out the header then."""
    server = servers(clone, **opener).start()
    client = server.connect()
    client.pwrite(b"child", 5)
    client.flush()
    cluster.rbd("flatten", "--no-progress", clone.spec)
    assert client.pread(15, 0) == b"pppppchildppppp"
    server.stop()
    again = servers(clone, **opener).start().connect()
    assert again.pread(15, 0) == b"pppppchildppppp"
    assert_same(again.pread(OBJECT, SIZE - OBJECT), b"p" * OBJECT)


def test_in_an_increment_of_a_clone_all_is_changed(servers, clone, opener):
    """What a clone that shrank has lost of its parent is nowhere on record."""
    with clone.open() as opened:
        opened.create_snap("a")
        opened.resize(HEADER + SIZE - 2 * OBJECT)
        opened.create_snap("m")
        opened.resize(HEADER + SIZE)
        opened.create_snap("b")
    client = servers(f"{clone.spec}@a..b", **opener).start().connect()
    assert extents(client, 0, SIZE) == [(0, SIZE, DATA)]
    assert client.pread(OBJECT, SIZE - OBJECT) == bytes(OBJECT)


def test_with_another_header_all_is_changed(servers, encrypt, encrypted, opener):
    encrypted.snap("a")
    encrypt(encrypted)
    encrypted.snap("b")
    client = servers(f"{encrypted.spec}@a..b", **opener).start().connect()
    assert extents(client, 0, SIZE) == [(0, SIZE, DATA)]


def test_a_clone_has_the_encryption_of_its_parent(servers, images, encrypted, kind, opener):
    server = servers(encrypted, **opener).start()
    server.connect().pwrite(b"parent" * 1000, MIB)
    server.stop()
    encrypted.snap("s", protect=True)
    clone = images.clone(encrypted, "s")
    client = servers(clone, **opener).start().connect()
    assert client.get_size() == SIZE
    assert client.pread(6000, MIB) == b"parent" * 1000
    client.pwrite(b"child", MIB + 6)
    client.pwrite(b"child", 5 * OBJECT)
    client.flush()
    assert client.pread(6000, MIB) == b"parentchildt" + b"parent" * 998
    with decrypted(clone, kind, read_only=True) as plain:
        assert plain.read(MIB, 12) == b"parentchildt"
    with decrypted(encrypted, kind, read_only=True) as plain:
        assert plain.read(MIB, 12) == b"parentparent"
    # Where the parent has no data, either, is not looked for.
    read_only = servers(clone, **opener)
    read_only.options = ["-r"]
    assert extents(read_only.start().connect(), 0, SIZE) == [(0, SIZE, DATA)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["luks1"])
def test_a_clone_may_have_a_passphrase_of_its_own(servers, images, encrypted, opener, tmp_path):
    own = tmp_path / "own"
    own.touch(0o600)
    own.write_bytes(b"of the clone")
    parameters = {
        "encryption-format": ["luks2", "luks"],
        "passphrase-file": [own, opener["passphrase-file"]],
    }
    if not LAYERED:
        message = refused(servers(encrypted, **parameters))
        assert "given more than once" in message
        assert "Ceph 18" in message
        return
    server = servers(encrypted, **opener).start()
    server.connect().pwrite(b"parent" * 1000, MIB)
    server.stop()
    encrypted.snap("s", protect=True)
    clone = images.clone(encrypted, "s")
    with clone.open() as opened:
        opened.encryption_format(rbd.RBD_ENCRYPTION_FORMAT_LUKS2, b"of the clone")
    client = servers(clone, **parameters).start().connect()
    assert client.pread(6000, MIB) == b"parent" * 1000
    client.pwrite(b"child", MIB + 6)
    client.flush()
    assert client.pread(6000, MIB) == b"parentchildt" + b"parent" * 998
    assert extents(client, 0, client.get_size()) == [(0, client.get_size(), DATA)]
    parameters["passphrase-file"].reverse()
    assert "the passphrase for image" in refused(servers(clone, **parameters))


@pytest.mark.timeout(120)
def test_the_recipe_of_the_readme_works_as_printed(cluster, images, tmp_path):
    image = Image(cluster, unique("image"))
    images.made.append(image)
    content = os.urandom(MIB) + bytes(MIB)
    (tmp_path / "vm1.raw").write_bytes(content)
    names = {"/root/": f"{tmp_path}/", "rbd/vm1-luks": image.spec}
    run_script(recipe("Encryption at rest", names), cluster, tmp_path)
    with image.open(read_only=True) as plain:
        plain.encryption_load(rbd.RBD_ENCRYPTION_FORMAT_LUKS2, (tmp_path / "vm1.pass").read_bytes())
        assert_same(plain.read(0, len(content)), content)


# ---- passphrases -------------------------------------------------------------


@pytest.mark.parametrize("newlines", [0, 1, 2])
def test_one_newline_at_the_end_of_the_file_does_not_count(
    servers, encrypted, passphrase_file, opener, newlines
):
    passphrase_file.write_bytes(PASSPHRASE + b"\n" * newlines)
    server = servers(encrypted, **opener)
    if newlines == 2:
        assert f"the passphrase for image '{encrypted.spec}' is wrong" in refused(server)
    else:
        assert server.start().connect().get_size() == SIZE


def test_a_passphrase_may_have_any_bytes(servers, images, tmp_path, opener):
    passphrase = bytes(range(256))
    image = images.create(HEADER + SIZE)
    image.write(luks_header(tmp_path, "luks2", passphrase), 0)
    opener["passphrase-file"].write_bytes(passphrase)
    assert servers(image, **opener).start().connect().get_size() == SIZE


def test_nbdkits_own_ways_to_give_a_passphrase(servers, images, tmp_path, nbdkit_version):
    new = nbdkit_version >= (1, 42)
    image = images.create(HEADER + SIZE)
    image.write(luks_header(tmp_path, "luks2"), 0)
    path = tmp_path / "line"
    path.write_bytes(PASSPHRASE + b"\n")
    with path.open("rb") as file:
        for form in (f"+{path}", f"-{file.fileno()}"):
            server = servers(image, **{"encryption-format": "luks2", "passphrase-file": form})
            command = ["bash", "-c", f'exec "$@" {file.fileno()}<{path}', "bash", *server.command]
            if new:
                command += ["--run", 'nbdinfo --size "$uri"']
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if new:
                assert done.stdout == f"{SIZE}\n", done.stderr
            else:
                assert f"'{form}' needs nbdkit 1.42 or newer" in done.stderr
                assert done.returncode == 1


def test_neither_log_nor_answer_has_the_passphrase(servers, encrypted, opener):
    server = servers(encrypted, **opener, probe="no")
    server.options = ["-v"]
    server.start().connect().pwrite(b"x", 0)
    opener["passphrase-file"].write_bytes(b"another secret")
    wrong = servers(encrypted, **opener, probe="no")
    wrong.options = ["-v"]
    with pytest.raises(nbd.Error) as refusal:
        wrong.start().connect()
    for text in (server.log(), wrong.log(), str(refusal.value)):
        assert "correct horse" not in text
        assert "another secret" not in text
    assert "is wrong" in wrong.log()
    assert "is wrong" not in str(refusal.value)


# ---- mistakes ----------------------------------------------------------------


def test_an_image_that_is_not_encrypted_is_refused(servers, image, opener):
    message = refused(servers(image, **opener))
    assert f"image '{image.spec}' is not encrypted: it has no LUKS header" in message


def test_an_image_too_small_for_a_header_is_refused(servers, images, opener):
    tiny = images.create(5)
    assert "it has no LUKS header" in refused(servers(tiny, **opener))


def test_the_wrong_format_is_refused(servers, encrypted, kind, opener):
    wrong = {"luks1": "luks2", "luks2": "luks1"}[kind]
    message = refused(servers(encrypted, **opener | {"encryption-format": wrong}))
    assert f"image '{encrypted.spec}' has the encryption format {kind}, not {wrong}" in message


def test_data_that_begins_within_an_object_is_refused(servers, images, encrypt, opener):
    """librbd 16 takes it, and loses the header of a clone at the first write."""
    image = encrypt(images.create(HEADER + SIZE, order=23))
    message = refused(servers(image, **opener))
    assert "its data does not begin at a multiple of the object size" in message


def test_a_striped_image_is_refused(servers, images, encrypt, opener):
    """librbd takes it, and reads something else than it has written."""
    image = encrypt(images.create(HEADER + SIZE, stripe_unit=65536, stripe_count=4))
    message = refused(servers(image, **opener))
    assert f"librbd cannot decrypt image '{image.spec}': it is striped" in message


def test_an_image_in_the_middle_of_a_reencryption_is_refused(servers, images, tmp_path, opener):
    """librbd takes it, with the wrong key for a part of it."""
    path = tmp_path / "image"
    path.write_bytes(luks_header(tmp_path, "luks2") + bytes(SIZE))
    key = ["--key-file", opener["passphrase-file"]]
    begin = ["cryptsetup", "reencrypt", "--init-only", "--batch-mode", *key]
    subprocess.run(
        [*begin, "--pbkdf-force-iterations", "1000", "--pbkdf", "pbkdf2", path], check=True
    )
    image = images.create(HEADER + SIZE)
    image.write(path.read_bytes(), 0)
    message = refused(servers(image, **opener))
    assert f"image '{image.spec}' is being reencrypted: cryptsetup must finish first" in message


def test_an_image_smaller_than_its_header_is_refused(servers, encrypted, opener):
    with encrypted.open() as opened:
        opened.resize(HEADER - MIB)
    message = refused(servers(encrypted, **opener))
    assert f"librbd cannot decrypt image '{encrypted.spec}': its header is " in message
    assert "larger than the image" in message


@pytest.mark.parametrize("version", [0, 3, 255])
def test_an_unknown_version_of_luks_is_refused(servers, image, opener, version):
    image.write(b"LUKS\xba\xbe\0" + bytes([version]), 0)
    message = refused(servers(image, **opener))
    assert f"image '{image.spec}' has an unknown encryption format, luks{version}" in message


@pytest.mark.parametrize("kind", ["luks2"])
def test_a_damaged_header_is_refused(servers, encrypted, opener):
    encrypted.write(bytes(MIB), 8)
    message = refused(servers(encrypted, **opener))
    assert f"librbd cannot decrypt image '{encrypted.spec}': its header is damaged" in message


def test_an_image_with_a_journal_is_refused(servers, images, encrypt, opener):
    features = rbd.RBD_FEATURE_EXCLUSIVE_LOCK | rbd.RBD_FEATURE_JOURNALING
    image = encrypt(images.create(HEADER + SIZE, features=features))
    assert "feature journaling" in refused(servers(image, **opener))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"encryption-format": "luks"}, "each 'encryption-format' needs its 'passphrase-file'"),
        ({"passphrase-file": "good"}, "each 'encryption-format' needs its 'passphrase-file'"),
        ({"encryption-format": "luks3", "passphrase-file": "good"}, "'luks3' is neither 'luks'"),
        (
            {"encryption-format": "luks", "passphrase-file": "good", "create": "1G"},
            "'encryption-format' and 'create' exclude each other",
        ),
        ({"passphrase-file": "open"}, "all users can read '{}/open': chmod o-r"),
        ({"passphrase-file": "none"}, "cannot read '{}/none': No such file or directory"),
        ({"passphrase-file": "empty"}, "'{}/empty' has no passphrase"),
        ({"passphrase-file": "newline"}, "'{}/newline' has no passphrase"),
        ({"passphrase-file": "pipe"}, "'{}/pipe' is not a regular file"),
        ({"passphrase-file": "folder"}, "'{}/folder' is not a regular file"),
        ({"passphrase-file": ""}, "must not be empty"),
    ],
)
def test_a_mistake_is_named(servers, tmp_path, parameters, message):
    for name, content in {"good": "x", "open": "x", "empty": "", "newline": "\n"}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o644 if name == "open" else 0o600)
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(0o700)
    if file := parameters.get("passphrase-file"):
        parameters = parameters | {"passphrase-file": tmp_path / file}
    assert message.format(tmp_path) in refused(servers("rbd/none", **parameters))
