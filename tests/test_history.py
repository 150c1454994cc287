# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Block status after random histories of an image, against what librbd reads.

Data that is called a hole is lost in a backup.  Each history makes an image, or a chain
of clones, and writes, discards, zeroes, snapshots, resizes, flattens it, and takes its
object maps away, while clients of all kinds stay connected.  After any step each of them
may be asked about any range.

    EXAMPLES=500 ci/test.sh tests/test_history.py    other histories, and more of them
"""

import contextlib
import os

import nbd
import pytest
import rbd
from conftest import Images, extents
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

ORDER = 16
OBJECT = 1 << ORDER
LARGEST = 7 * OBJECT
DATA, HOLE, ZERO = 0, 1, 3
MAPS = rbd.RBD_FEATURE_OBJECT_MAP | rbd.RBD_FEATURE_FAST_DIFF

sizes = st.sampled_from([0, 1000, OBJECT, 2 * OBJECT + 512, 4 * OBJECT, 5 * OBJECT + 4097, LARGEST])
offsets = st.one_of(
    st.integers(0, LARGEST - 1),
    st.builds(
        lambda edge, distance: max(0, edge * OBJECT + distance),
        st.integers(0, 6),
        st.sampled_from([-4096, -1, 0, 1, 4096]),
    ),
)
lengths = st.one_of(st.sampled_from([1, 4096, OBJECT, 2 * OBJECT]), st.integers(1, LARGEST))
layouts = st.sampled_from([{}, {}, {"stripe_unit": OBJECT // 4, "stripe_count": 3}])
bases = st.sampled_from([1, 1 | 4, 1 | 4 | MAPS, 1 | 4 | MAPS | 32, 1 | 4 | MAPS | 32])
picks = st.integers(0, 1000)


class Watched:
    """A connected client, and what it is told about: to and since are snapshots or now."""

    def __init__(self, server, image, to=None, since=None):
        self.image, self.to, self.since = image, to, since
        name = image.name
        if since:
            name += f"@{since}..{to or ''}"
        elif to:
            name += f"@{to}"
        self.client = server.connect(name)
        self.size = self.client.get_size()


class History(RuleBasedStateMachine):
    writable = read_only = images = None

    @initialize(features=bases, layout=layouts, size=sizes)
    def start(self, features, layout, size):
        self.features, self.layout = features, layout
        self.image = self.images.create(size, order=ORDER, features=features, **layout)
        self.parents = []
        self.truth = {}  # (image, snapshot): content
        self.taken = 0
        self.clients = []

    def write(self, action):
        with self.image.open() as image:
            action(image)

    def snapshots(self, image=None):
        return [snap for owner, snap in self.truth if owner is (image or self.image)]

    def clip(self, offset, length, size):
        return (offset, min(length, size - offset)) if offset < size else (0, 0)

    def change(self, offset, length, action):
        with self.image.open() as image:
            offset, length = self.clip(offset, length, image.size())
            if length:
                action(image, offset, length)

    # ---- what happens to the image

    @rule(offset=offsets, length=lengths, value=st.integers(1, 255))
    def write_data(self, offset, length, value):
        self.change(offset, length, lambda i, at, n: i.write(bytes([value]) * n, at))

    @rule(offset=offsets, length=lengths, value=st.integers(1, 255))
    def write_through_the_export(self, offset, length, value):
        client = self.writable.connect(self.image.name)
        offset, length = self.clip(offset, length, client.get_size())
        if length:
            client.pwrite(bytes([value]) * length, offset, nbd.CMD_FLAG_FUA)
        client.shutdown()

    @rule(offset=offsets, length=lengths)
    def discard(self, offset, length):
        self.change(offset, length, lambda i, at, n: i.discard(at, n))

    @rule(number=st.integers(0, 6))
    def discard_an_object(self, number):
        self.change(number * OBJECT, OBJECT, lambda i, at, n: i.discard(at, n))

    @rule(offset=offsets, length=lengths, thick=st.booleans())
    def zero(self, offset, length, thick):
        flags = rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION if thick else 0
        self.change(offset, length, lambda i, at, n: i.write_zeroes(at, n, flags))

    @rule(size=sizes)
    def resize(self, size):
        self.write(lambda image: image.resize(size))

    @rule()
    def snapshot(self):
        name = f"s{self.taken}"
        self.taken += 1
        self.write(lambda image: image.create_snap(name))
        self.truth[self.image, name] = self.content(name)

    @rule(pick=picks)
    def remove_a_snapshot(self, pick):
        if not self.snapshots():
            return
        name = self.snapshots()[pick % len(self.snapshots())]
        with contextlib.suppress(rbd.ImageBusy):
            self.write(lambda image: image.remove_snap(name))
            del self.truth[self.image, name]

    @precondition(lambda self: len(self.parents) < 2)
    @rule(pick=picks)
    def clone(self, pick):
        if not self.snapshots():
            return
        name = self.snapshots()[pick % len(self.snapshots())]
        if not self.truth[self.image, name]:
            return  # there are no clones of nothing
        with self.image.open() as image:
            if not image.is_protected_snap(name):
                image.protect_snap(name)
        self.parents.append(self.image)
        options = {"features": self.features, "order": ORDER, **self.layout}
        self.image = self.images.clone(self.image, name, **options)

    @precondition(lambda self: self.parents)
    @rule()
    def flatten(self):
        with contextlib.suppress(rbd.InvalidArgument):  # it is flat
            self.write(lambda image: image.flatten())

    @precondition(lambda self: self.features & MAPS)
    @rule(which=st.integers(0, 2))
    def lose_the_object_maps(self, which):
        """For good, or for maps that are invalid, of this image or of one below."""
        image = [*self.parents, self.image][-1 - which % (1 + len(self.parents))]
        with image.open() as opened:
            if opened.features() & MAPS:
                opened.update_features(MAPS, False)
            else:
                opened.update_features(MAPS, True)

    @precondition(lambda self: self.features & MAPS)
    @rule(pick=picks)
    def rebuild_an_object_map(self, pick):
        with self.image.open() as image:
            if image.features() & MAPS:
                names = [None, *self.snapshots()]
                image.set_snap(names[pick % len(names)])
                image.rebuild_object_map()

    # ---- what clients are told

    def content(self, snapshot=None, image=None):
        with (image or self.image).open(snapshot, read_only=True) as opened:
            return opened.read(0, opened.size()) if opened.size() else b""

    @rule(writable=st.booleans())
    def watch_what_is_now(self, writable):
        self.clients.append(Watched(self.writable if writable else self.read_only, self.image))

    @rule(pick=picks)
    def watch_a_snapshot(self, pick):
        if self.truth:
            image, name = list(self.truth)[pick % len(self.truth)]
            self.clients.append(Watched(self.read_only, image, name))

    @rule(pick=picks, live=st.booleans())
    def watch_what_has_changed(self, pick, live):
        names = self.snapshots()
        if names:
            since = names[pick % len(names)]
            later = [None] if live else names[names.index(since) + 1 :]
            for to in later[:1]:
                self.clients.append(Watched(self.read_only, self.image, to, since))

    @precondition(lambda self: self.clients)
    @rule(pick=picks, offset=offsets, length=lengths, one=st.booleans())
    def ask(self, pick, offset, length, one):
        watched = self.clients[pick % len(self.clients)]
        offset, length = self.clip(offset, length, watched.size)
        if length:
            self.check(watched, offset, length, one)

    @precondition(lambda self: self.clients)
    @rule(pick=picks)
    def hang_up(self, pick):
        self.clients.pop(pick % len(self.clients)).client.shutdown()

    def check(self, watched, offset, length, one=False):
        image, to, since = watched.image, watched.to, watched.since
        told = []

        def add(_context, start, entries, _error):
            for size, kind in zip(entries[::2], entries[1::2], strict=True):
                told.append((start, size, kind))
                start += size

        gone = any(name and (image, name) not in self.truth for name in (to, since))
        if gone:
            with pytest.raises(nbd.Error):
                watched.client.block_status(length, offset, add)
            return
        flags = nbd.CMD_FLAG_REQ_ONE if one else 0
        watched.client.block_status(length, offset, add, flags=flags)
        assert told[0][0] == offset
        covered = sum(size for _, size, _ in told)
        assert covered == length or (one and covered < length)
        assert not one or len(told) == 1
        self.compare(told, image, to, since)

    def compare(self, told, image, to, since):
        now = self.truth[image, to] if to else self.content(image=image)
        then = self.truth[image, since] if since else b""
        # qemu-img takes what begins in a sector for all of it.
        assert all(start % 4096 == 0 for start, _, _ in told[1:]), told
        for start, size, kind in told:
            content = now[start : start + size]
            if start + size > len(now):
                # The image has shrunk under its client.
                assert kind == DATA or not now[start:], (start, size, kind)
            if kind == ZERO:
                assert content == bytes(len(content)), "data called a hole"
            elif kind == HOLE:
                assert since, "a hole that is not zero"
                before = then[start : start + size].ljust(len(content), b"\0")
                assert content == before, "a change called none"
                assert start + size <= len(then), "what was not there called unchanged"
            else:
                assert kind == DATA

    def teardown(self):
        if not hasattr(self, "image"):
            return
        try:
            for image in (*self.parents, self.image):
                names = self.snapshots(image)
                views = [(to, None) for to in (None, *names)]
                views += [(to, since) for i, since in enumerate(names) for to in names[i + 1 :]]
                views += [(None, since) for since in names]
                for to, since in views:
                    watched = Watched(self.read_only, image, to, since)
                    if watched.size:
                        told = extents(watched.client, 0, watched.size)
                        self.compare(told, image, to, since)
                        content = watched.client.pread(watched.size, 0)
                        assert content == (
                            self.truth[image, to] if to else self.content(image=image)
                        )
                    watched.client.shutdown()
        finally:
            for watched in self.clients:
                with contextlib.suppress(nbd.Error):
                    watched.client.shutdown()
            for server in self.writable, self.read_only:
                server.clients.clear()
            for image in reversed(self.images.made.copy()):
                self.images.remove(image)


@pytest.mark.timeout(int(os.environ.get("EXAMPLES", "25")) * 30)
def test_no_history_makes_data_a_hole_or_a_change_none(cluster, servers):
    def gateway(*options):
        server = servers(None, pool=cluster.pool, exports=["*", "*@*"])
        server.options = list(options)
        return server.start()

    parts = {"writable": gateway(), "read_only": gateway("-r"), "images": Images(cluster)}
    machine = type("Machine", (History,), parts)
    try:
        play(machine)
    finally:
        # The causes of what a client is told; pytest shows them if this fails.
        for server in parts["writable"], parts["read_only"]:
            print(server.log())


def play(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("EXAMPLES", "25")),
            # Looking for a shorter history takes longer than reading a long one.
            phases=[Phase.generate],
            # The same ones each time, unless somebody looks for others.
            derandomize="EXAMPLES" not in os.environ,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
