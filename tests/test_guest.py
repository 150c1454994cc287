# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Guests of qemu: with the kernel's nbd client in them, and booted from the export."""

import pathlib
import re
import signal
import subprocess
from xml.etree import ElementTree

import pexpect
import pytest
from conftest import MIB, PATIENCE, ROOT, assert_same, recipe
from pexpect.popen_spawn import PopenSpawn

# Unpacked by ci/install-deps.sh.
KERNEL = pathlib.Path("/var/cache/rbd_export/kernel")
# No panic waits for somebody to look at it.
APPEND = "console=ttyS0 quiet panic=-1"
EMULATED = (
    "qemu-system-x86_64 -accel tcg -nodefaults -no-reboot -display none -serial stdio -m 256M"
)
# Behind its boot file system a disk is the guest's to write on.
BOOT_SIZE, DISK_SIZE = 48 * MIB, 128 * MIB
BLOCK = 4096


class Guest:
    """A guest that runs the commands it is sent on its serial console."""

    def __init__(self, qemu):
        command = ["bash", "-c", f"exec {qemu}"]
        self.console = PopenSpawn(command, timeout=PATIENCE, encoding="utf-8")

    def wait(self):
        self.console.expect("the guest is up\r\n")
        return self

    def run(self, script):
        """Run commands until one fails; return what they print."""
        self.console.sendline(f"(set -e\n{script}\n) 2>&1; echo status $?")
        self.console.expect(r"status (\d+)\r\n")
        assert self.console.match[1] == "0", self.console.before
        return self.console.before.replace("\r", "")

    def power_off(self):
        self.console.sendline("poweroff -f")
        self.console.expect(pexpect.EOF)


@pytest.fixture
def boot(servers):
    """Starts guests, and ends them before the servers that they use."""
    guests = []

    def start(qemu):
        guests.append(Guest(qemu))
        return guests[-1].wait()

    yield start
    for guest in guests:
        guest.console.kill(signal.SIGKILL)
        guest.console.wait()


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory):
    path = tmp_path_factory.mktemp("guest") / "initramfs"
    subprocess.run([ROOT / "tests/initramfs.sh", KERNEL, path], check=True)
    return path


@pytest.fixture(scope="session")
def vmlinuz():
    (path,) = KERNEL.glob("boot/vmlinuz-*")
    return path


@pytest.fixture(scope="session")
def boot_disk(initramfs, vmlinuz):
    """A FAT file system that a BIOS boots."""
    disk = initramfs.with_name("disk")
    config = initramfs.with_name("syslinux.cfg")
    config.write_text(f"DEFAULT vm\nLABEL vm\nLINUX vmlinuz\nINITRD initrd\nAPPEND {APPEND}\n")
    with disk.open("wb") as file:
        file.truncate(BOOT_SIZE)
    for command in (
        ["mformat", "-i", disk, "::"],
        ["mcopy", "-i", disk, vmlinuz, "::vmlinuz"],
        ["mcopy", "-i", disk, initramfs, "::initrd"],
        ["mcopy", "-i", disk, config, "::syslinux.cfg"],
        ["syslinux", "--install", disk],
    ):
        subprocess.run(command, check=True)
    return disk


@pytest.fixture
def bootable(images, servers, boot_disk):
    """A server of an image that holds the boot disk, put there through the export."""
    # Small objects, which a request of the guest covers: these go as a whole.
    image = images.create(DISK_SIZE, order=18)
    server = servers(image).start()
    uri = f"nbd+unix:///?socket={server.socket}"
    subprocess.run(["nbdcopy", "--flush", boot_disk, uri], check=True)
    return image, server


def test_the_kernel_client_mounts_an_export(
    cluster, images, servers, boot, initramfs, vmlinuz, tmp_path
):
    disk = tmp_path / "disk"
    subprocess.run(["mkfs.ext4", "-q", disk, "64M"], check=True)
    image = images.create(64 * MIB)
    image.write(disk.read_bytes(), 0)
    server = servers(None, pool=cluster.pool, exports=image.name).start()
    # Each connection to NBD's port leads to the socket; the guest reaches nothing else.
    network = f"user,restrict=on,guestfwd=tcp:10.0.2.100:10809-cmd:nc -U {server.socket}"
    guest = boot(
        f"{EMULATED} -kernel {vmlinuz} -initrd {initramfs} -append '{APPEND}'"
        f" -nic '{network},model=virtio-net-pci'"
    )

    # The shell of Debian 13's busybox would take its own, which has fewer options.
    names = {"vm1 ": f"{image.name} ", "nbd-client ": "/sbin/nbd-client "}
    commands = recipe("With the kernel's nbd client", names)
    mount, unmount = commands.split("umount")
    guest.run(f"{mount}\necho written by the guest >/mnt/marker\numount{unmount}")
    disk.write_bytes(image.read(0, 64 * MIB))
    subprocess.run(["e2fsck", "-fn", disk], check=True)
    marker = subprocess.check_output(["debugfs", "-R", "cat /marker", disk], text=True)
    assert marker == "written by the guest\n"

    nbdtab = (ROOT / "config/nbdtab.example").read_text().replace(" vm1 ", f" {image.name} ")
    guest.run(f"cat >/etc/nbdtab <<END\n{nbdtab}\nEND\n/sbin/nbd-client nbd0")
    guest.run("mount /dev/nbd0 /mnt")
    assert guest.run("cat /mnt/marker") == marker
    guest.run("umount /mnt; /sbin/nbd-client -d /dev/nbd0")
    guest.power_off()


def test_a_guest_boots_from_the_export_and_trims_it(bootable, boot):
    image, server = bootable
    names = {"qemu-system-x86_64 -m 1G": EMULATED, "/run/vm1.sock": server.socket}
    guest = boot(recipe("Boot a guest", names))
    write = f"dd of=/dev/vda bs=1M seek={BOOT_SIZE // MIB} count=8 oflag=direct conv=fsync"
    empty = image.used()
    # A part of its kernel.
    guest.run(f"{write} if=/dev/vda skip=1")
    assert_same(image.read(BOOT_SIZE, 8 * MIB), image.read(MIB, 8 * MIB))
    assert image.used() == empty + 8 * MIB
    guest.run(f"blkdiscard -o {BOOT_SIZE} -l {4 * MIB} /dev/vda")
    assert image.used() == empty + 4 * MIB
    guest.run(f"{write} if=/dev/zero")
    assert image.used() == empty
    guest.power_off()


def test_a_guest_goes_on_while_nbdkit_is_started_again(cluster, bootable, boot):
    image, server = bootable
    names = {"qemu-system-x86_64 -m 1G": EMULATED, "/run/vm1.sock": server.socket}
    guest = boot(recipe("Through a restart of nbdkit", names))
    guest.console.sendline(
        f"""
        write() {{
          printf %-{BLOCK}d $1 |
            dd of=/dev/vda bs={BLOCK} seek=$(({BOOT_SIZE // BLOCK} + $1)) conv=fsync 2>/dev/null
        }}
        i=0
        while [ ! -e /stop ]; do
          if write $i; then echo written $i; else echo failed; fi
          i=$((i + 1))
        done &
        """
    )

    def goes_on():
        """Twenty writes more than what is in the image now, and none has failed."""
        count = len(image.read(BOOT_SIZE, 16 * MIB).rstrip(b"\0")) // BLOCK
        seen = guest.console.expect(["failed", rf"written {count + 20}\r\n"])
        return seen == 1

    assert goes_on()
    server.stop()
    server.start()
    assert goes_on()
    (watcher,) = image.watchers()
    server.kill()
    # Instead of half a minute, until the watch of the dead client has ended.
    with cluster.blocklisted(watcher["addr"]):
        server.start()
        assert goes_on()
    guest.console.sendline("touch /stop; wait; echo stopped")
    guest.console.expect(r"written (\d+)\r\nstopped")
    last = int(guest.console.match[1])
    assert "error" not in guest.run("dmesg")
    guest.power_off()
    written = image.read(BOOT_SIZE, (last + 1) * BLOCK)
    assert_same(written, b"".join(b"%-*d" % (BLOCK, number) for number in range(last + 1)))


def test_libvirt_takes_the_disks_of_the_readme(tmp_path):
    disks = recipe("With libvirt", {})
    if subprocess.check_output(["virsh", "--version"]).startswith(b"9.0."):
        disks = re.sub("<reconnect .*/>", "", disks)
    assert [
        (host.get("transport"), source.get("tls"))
        for source in ElementTree.fromstring(f"<disks>{disks}</disks>").iter("source")
        for host in source.iter("host")
    ] == [("unix", None), (None, None), (None, "yes")]
    domain = tmp_path / "domain.xml"
    domain.write_text(
        "<domain type='kvm'><name>vm1</name><memory unit='GiB'>1</memory>"
        f"<os><type>hvm</type></os><devices>{disks}</devices></domain>"
    )
    subprocess.run(["virt-xml-validate", domain, "domain"], check=True)
