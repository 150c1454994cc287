#!/usr/bin/env -S nbdkit python
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Serve Ceph RBD images over NBD: an nbdkit plugin.

    nbdkit python rbd_export.py pool=rbd image=vm1
    nbdkit python rbd_export.py pool=rbd exports='vm*'

Read from top to bottom: parameters, which images a client may have, the cluster
and its open images, one connection (its handle), then the callbacks in the order
in which nbdkit calls them.  Needs nbdkit's Python plugin and Ceph's
python3-rados and python3-rbd.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import difflib
import errno
import fnmatch
import functools
import glob
import os
import re
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

import nbdkit
import rados
import rbd

__version__ = "0.1.0"

API_VERSION = 2

# nbdkit prints an exception with its traceback; without one it is a line.
sys.tracebacklimit = 0

# nbdkit leaves the working directory when it goes to the background.
WORKING_DIRECTORY = os.getcwd()

# What Ceph looks for, but in the working directory, which is lost.
DEFAULT_CONF = "/etc/ceph/$cluster.conf,$home/.ceph/$cluster.conf"

# Between the paths of a list; Ceph has no way to quote them.
SEPARATORS = " ,;=\t"

GIB = 1 << 30


T = TypeVar("T")
R = TypeVar("R")


class ExportError(Exception):
    """What a user can put right, in one line."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


def printable(text: str) -> str:
    """Escape what would break the line of a log, or is not valid UTF-8.

    nbdkit crashes on the latter, as a path may be.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- parameters --------------------------------------------------------------


def any_text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def user_id(value: str) -> str:
    if value.startswith("client."):
        raise ValueError(f"'{value}' must go without 'client.'")
    return any_text(value)


def readable_file(value: str) -> str:
    path = os.path.join(WORKING_DIRECTORY, any_text(value))
    # Ceph takes a path as a list, whose separators cannot be escaped.
    if re.search(f"[{SEPARATORS}]", path):
        raise ValueError(f"'{path}' has a character that Ceph takes for the end of a path")
    try:
        with open_file(path, "rb"):
            return path
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}") from None


def seconds(value: str) -> int:
    # The range of Ceph's own timeouts, which are whole seconds.
    if not (value.isascii() and value.isdigit() and 0 < int(value) < (1 << 31) - 1):
        raise ValueError(f"'{value}' is not a whole number of seconds above 0")
    return int(value)


def positive(value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value)):
        raise ValueError(f"'{value}' is not a whole number above 0")
    return int(value)


def yes_or_no(value: str) -> bool:
    try:
        return {"yes": True, "no": False}[value]
    except KeyError:
        raise ValueError(f"'{value}' is neither 'yes' nor 'no'") from None


class Parameter(NamedTuple):
    default: Any
    parse: Callable[[str], Any]
    help: str
    repeatable: bool = False


# Every parameter.  `config`, --dump-plugin and the test of the README use this.
PARAMETERS = {
    "pool": Parameter("rbd", any_text, "pool, where image or exports say none"),
    "namespace": Parameter("", any_text, "namespace, where image or exports say none"),
    "image": Parameter(None, any_text, "image: a name or [pool/[namespace/]]image[@snapshot]"),
    "snapshot": Parameter(None, any_text, "snapshot of the image, served read-only"),
    "exports": Parameter(
        (), any_text, "images that clients may have: a glob, or !glob to deny", repeatable=True
    ),
    "default-export": Parameter(None, any_text, "what a client gets that names no export"),
    "access": Parameter((), any_text, "glob:ro makes images read-only", repeatable=True),
    "images-per-connection": Parameter(
        None, positive, "images that share a connection to the cluster"
    ),
    "conf": Parameter(None, readable_file, "ceph.conf instead of the one that Ceph finds"),
    "id": Parameter("admin", user_id, "Ceph user: ID of client.ID"),
    "cluster": Parameter("ceph", any_text, "name of the cluster, for Ceph's default paths"),
    "ceph.OPTION": Parameter(None, str, "any Ceph configuration option"),
    "connect-timeout": Parameter(30, seconds, "seconds until connecting to the cluster fails"),
    "io-timeout": Parameter(None, seconds, "seconds until a request to the cluster fails"),
    "probe": Parameter(True, yes_or_no, "try to open the image before nbdkit starts to serve"),
}
ALIASES = {"user": "id"}

open_file = open  # `open` is a callback of nbdkit further down


class Spec(NamedTuple):
    """An image, or one of its snapshots, by name."""

    pool: str
    namespace: str
    image: str
    snapshot: str | None

    def __str__(self) -> str:
        path = "/".join(part for part in (self.pool, self.namespace, self.image) if part)
        return path if self.snapshot is None else f"{path}@{self.snapshot}"


def split(text: str, what: str) -> dict[str, str]:
    """Split `[pool/[namespace/]]image[@snapshot]` into the parts that it has."""
    path, at, snapshot = text.partition("@")
    names = path.split("/")
    if len(names) > 3 or not all(names) or (at and not snapshot) or re.search("[@/]", snapshot):
        raise ExportError(
            f"{what} '{text}' is malformed: it must be [pool/[namespace/]]image[@snapshot]"
        )
    parts = {"image": names.pop()}
    parts.update(zip(("pool", "namespace"), names, strict=False))
    return parts | ({"snapshot": snapshot} if at else {})


COMMON_NAME = "{dn.CN}"


class Rule(NamedTuple):
    """One `exports` or `access`: whom it is about, and what it says."""

    pattern: Spec
    allow: bool

    def applies(self, spec: Spec, client: str | None) -> bool:
        """Tell whether an image is meant; a denial of it is one of its snapshots too."""
        if not self.allow and self.pattern.snapshot is None:
            spec = spec._replace(snapshot=None)
        return self.fits(spec, client)

    def fits(self, parts: Iterable[str | None], client: str | None) -> bool:
        """Match the first parts of a Spec; an empty part matches an empty glob only.

        A client without a common name gets nothing by one, and is denied whatever
        one might have stood for.
        """
        if self.allow and client is None and self.needs_client():
            return False
        common_name = "*" if client is None else glob.escape(client)
        return all(
            bool(part) == bool(pattern)
            and fnmatch.fnmatchcase(part or "", (pattern or "").replace(COMMON_NAME, common_name))
            for part, pattern in zip(parts, self.pattern, strict=False)
        )

    def needs_client(self) -> bool:
        return any(COMMON_NAME in (part or "") for part in self.pattern)


class Config:
    """What the command line says."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.ceph: dict[str, str] = {}
        self.spec: Spec | None = None  # else `rules` say what is exported
        self.rules: list[Rule] = []
        self.read_only: list[Rule] = []

    def set(self, key: str, value: str) -> None:
        name, option = key.replace("_", "-"), ""
        if name.startswith("ceph."):
            name, option = "ceph.OPTION", key[len("ceph.") :].replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in PARAMETERS or (option == "") == (name == "ceph.OPTION"):
            known = difflib.get_close_matches(name, [*PARAMETERS, *ALIASES], n=1)
            hint = f"; did you mean '{known[0]}'?" if known else ""
            raise ExportError(f"unknown parameter '{key}'{hint}")
        repeatable = name in PARAMETERS and PARAMETERS[name].repeatable
        if option in self.ceph or (name in self.given and not repeatable):
            raise ExportError(f"parameter '{key}' is given twice")
        if option:
            self.ceph[option] = value
            return
        try:
            parsed = PARAMETERS[name].parse(value)
        except ValueError as error:
            raise ExportError(f"parameter '{key}': {error}") from None
        self.given[name] = [*self[name], parsed] if repeatable else parsed

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, PARAMETERS[name].default)

    def complete(self) -> None:
        if "image" in self.given:
            self.complete_image()
        elif "exports" in self.given:
            self.complete_exports()
        else:
            raise ExportError(
                "parameter 'image' is missing: image=NAME says what to serve,"
                " or exports=PATTERN which images"
            )
        self.read_only = [self.access(text) for text in self["access"]]
        if "conf" not in self.given and os.environ.get("CEPH_CONF"):
            self.set("conf", os.environ["CEPH_CONF"])
        try:
            self.rados()
        except ExportError as error:
            raise ExportError(f"{error} ({self.where()})") from None

    def complete_image(self) -> None:
        for name in ("exports", "default-export"):
            if name in self.given:
                raise ExportError(f"'image' and '{name}' exclude each other: leave one of them out")
        image = self.given.pop("image")
        for name, part in split(image, "image").items():
            if self.given.setdefault(name, part) != part:
                raise ExportError(
                    f"'image={image}' contradicts '{name}={self[name]}': leave one of them out"
                )
        self.spec = Spec(self["pool"], self["namespace"], self["image"], self["snapshot"])

    def complete_exports(self) -> None:
        if "snapshot" in self.given:
            raise ExportError("'snapshot' needs 'image'; exports=IMAGE@SNAPSHOT exports a snapshot")
        for name in ("pool", "namespace"):
            if COMMON_NAME in self[name]:
                raise ExportError(
                    f"'{name}' is one name for all clients: {COMMON_NAME} is not for it"
                )
        self.rules = [
            Rule(self.pattern(text.removeprefix("!"), f"exports={text}"), not text.startswith("!"))
            for text in self["exports"]
        ]
        if not any(rule.allow for rule in self.rules):
            raise ExportError("nothing would be exported: each 'exports' is a denial")
        default = self["default-export"]
        if default:
            spec = self.named(default)
            # Who may have what {dn.CN} stands for is known when the client is.
            if not self.allows(spec, None) and not self.for_each_client():
                raise ExportError(f"'default-export={default}' is not allowed by any 'exports'")

    def access(self, text: str) -> Rule:
        pattern, _, access = text.rpartition(":")
        if access != "ro" or not pattern or pattern.startswith("!"):
            raise ExportError(f"'access={text}' must be access=PATTERN:ro")
        return Rule(self.pattern(pattern, f"access={text}"), allow=False)

    def pattern(self, text: str, parameter: str) -> Spec:
        """Return a Spec of one glob for each part, so that none crosses `/` or `@`."""
        parts = split(text, f"'{parameter}': pattern")
        for part in parts.values():
            if "[" in re.sub(r"\[!?+.[^]]*\]", "", part):
                raise ExportError(f"'{parameter}' has a [ without its ]; [[] stands for a [")
            for field in re.findall(r"\{dn\.[^}]*\}?", part):
                if field != COMMON_NAME:
                    raise ExportError(f"'{parameter}' has '{field}'; only {COMMON_NAME} is known")
                if not hasattr(nbdkit, "peer_tls_dn"):
                    raise ExportError(f"'{parameter}': {COMMON_NAME} needs nbdkit 1.42 or newer")
        pool, namespace = glob.escape(self["pool"]), glob.escape(self["namespace"])
        return Spec(pool, namespace, "", None)._replace(**parts)

    def named(self, export: str) -> Spec:
        """Return what an export name stands for."""
        return Spec(self["pool"], self["namespace"], "", None)._replace(
            **split(export, "export name")
        )

    def name(self, spec: Spec) -> str:
        """Return the shortest export name that stands for an image."""
        if spec.namespace != self["namespace"]:
            return str(spec)
        spec = spec._replace(namespace="")
        return str(spec._replace(pool="") if spec.pool == self["pool"] else spec)

    def for_each_client(self) -> bool:
        """Tell whether who the client is decides what it may have."""
        return any(rule.needs_client() for rule in [*self.rules, *self.read_only])

    def allows(self, spec: Spec, client: str | None) -> bool:
        """Tell whether a client, known by its common name, may have an image.

        The last rule that applies decides.
        """
        verdicts = [rule.allow for rule in self.rules if rule.applies(spec, client)]
        return verdicts[-1] if verdicts else False

    def reaches(self, client: str | None, *parts: str, snapshots: bool = False) -> bool:
        """Tell whether it is worth looking into a pool, namespace or image."""
        return any(
            rule.allow and rule.fits(parts, client) and (rule.pattern.snapshot or not snapshots)
            for rule in self.rules
        )

    def where(self) -> str:
        return f"user 'client.{self['id']}', {self['conf'] or 'ceph.conf where Ceph looks for it'}"

    def rados(self) -> rados.Rados:
        """Return a cluster handle that has all settings and is not connected."""
        cluster = rados.Rados(rados_id=self["id"], clustername=self["cluster"])
        try:
            cluster.conf_read_file(self["conf"] or DEFAULT_CONF)
        except rados.ObjectNotFound:
            # No file in any of Ceph's own places: ceph.OPTION may say it all.
            pass
        except rados.Error as error:
            raise ExportError(f"Ceph cannot read its configuration: {error}") from None
        cluster.conf_set("client_mount_timeout", str(self["connect-timeout"]))
        # No limit, or the requests to an image that hangs would keep out those to
        # all others.  nbdkit's threads limit how many there are.
        cluster.conf_set("objecter_inflight_ops", "0")
        cluster.conf_set("objecter_inflight_op_bytes", "0")
        if self["io-timeout"]:
            cluster.conf_set("rados_osd_op_timeout", str(self["io-timeout"]))
        for option, value in self.ceph.items():
            try:
                cluster.conf_set(option, value)
            except rados.ObjectNotFound:
                raise ExportError(f"parameter 'ceph.{option}': Ceph has no such option") from None
            except rados.Error:
                # The value may be a key.
                raise ExportError(f"parameter 'ceph.{option}': Ceph refuses its value") from None
        if cluster.conf_get("rbd_cache_policy") == "writearound":
            cluster.conf_set("rbd_cache_max_dirty", "0")  # see OpenImage
        keyrings = re.split(f"[{SEPARATORS}]+", cluster.conf_get("keyring") or "")
        paths = [os.path.join(WORKING_DIRECTORY, path) for path in keyrings if path]
        if paths:
            cluster.conf_set("keyring", ",".join(paths))
        return cluster


CONFIG = Config()


# ---- the cluster and the images open on it -----------------------------------


class Cluster:
    """A connection to the cluster, and the images open on it.

    Connecting is what takes long, so all images share one connection, or as many
    of them as `images-per-connection` says.  The last connection is kept until
    nbdkit ends, or until the cluster fences it.  Fencing (blocklisting) hits a
    connection as a whole and for good: who opens an image afterwards gets a new
    connection, and who had one open stays refused, since somebody else may own
    the image by now.

    No lock is held while the cluster is asked: what hangs delays nobody else.
    """

    all: ClassVar[list[Cluster]] = []
    lock = threading.Lock()

    def __init__(self) -> None:
        self.rados: rados.Rados
        self.connected: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.uses: collections.Counter[Spec | None] = collections.Counter()
        self.images: dict[tuple[Any, ...], OpenImage] = {}
        self.fenced = False
        self.changed = threading.Condition()

    @classmethod
    @contextlib.contextmanager
    def use(cls, spec: Spec | None = None) -> Iterator[Cluster]:
        """Give the connection on which an image is open, or may be."""
        limit = CONFIG["images-per-connection"] or sys.maxsize
        with cls.lock:
            usable = [self for self in cls.all if spec in self.uses]
            usable += [self for self in cls.all if spec is None or len(self.uses) < limit]
            self = usable[0] if usable else cls()
            self.uses[spec] += 1
            if not usable:
                cls.all.append(self)
        try:
            if not usable:
                self.connect()
            self.connected.result()
            yield self
        except SHUTDOWN:
            self.fence()
            raise
        finally:
            with cls.lock:
                self.uses[spec] -= 1
                if not self.uses[spec]:
                    del self.uses[spec]
                unused = not self.uses and (self not in cls.all or len(cls.all) > 1)
                if unused and self in cls.all:
                    cls.all.remove(self)
            if unused:
                self.disconnect()

    def connect(self) -> None:
        try:
            self.rados = connected_rados()
            self.connected.set_result(None)
        except BaseException as error:
            self.leave()
            self.connected.set_exception(error)

    def disconnect(self) -> None:
        if not self.connected.exception():
            self.rados.shutdown()

    def leave(self) -> None:
        """Give this connection to no image from now on."""
        with self.lock:
            if self in self.all:
                self.all.remove(self)

    def fence(self) -> None:
        """Refuse whatever the clients of this connection still ask for."""
        self.leave()
        with self.changed:
            self.fenced = True
            for shared in self.images.values():
                shared.fence()

    @classmethod
    def end(cls) -> None:
        """Close what is still open, at the end of nbdkit.

        nbdkit does not call `close` for the clients that a signal cut off, and
        librbd may hold writes that it has acknowledged.  One image that hangs
        must not keep another from being flushed.
        """
        connected = [self for self in cls.all if self.connected.done()]
        images = [shared for self in connected for shared in self.images.values()]
        with concurrent.futures.ThreadPoolExecutor(len(images) + 1) as pool:
            closed = [pool.submit(shared.resources.close) for shared in images]
        for self in connected:
            self.disconnect()
        for future in closed:
            future.result()

    @contextlib.contextmanager
    def open(self, spec: Spec, read_only: bool) -> Iterator[OpenImage]:
        """Open an image for one connection; all connections share one rbd.Image.

        Sharing makes a flush of one connection cover the writes of all, and
        keeps connections from taking the exclusive lock from each other.  The
        image is looked up by its name each time, and shared if the look-up finds
        the very one that is open: a name may have passed to another image, and a
        read-only image is not told of a resize.
        """
        with contextlib.ExitStack() as stack:
            ioctx = stack.enter_context(open_pool(self.rados, spec))
            image = stack.enter_context(open_image(ioctx, spec, read_only))
            if not read_only and is_non_primary(image):
                image.close()
                read_only = True
                image = stack.enter_context(open_image(ioctx, spec, read_only))
            key = identity(image, ioctx, spec, read_only)
            found = (ReadOnlyImage if read_only else OpenImage)(image, ioctx, spec)
            stack.callback(found.close)
            with self.changed:
                if self.fenced:
                    raise rbd.ConnectionShutdown("fenced", errno=errno.ESHUTDOWN)
                # One that is being closed has writes to finish first.
                self.changed.wait_for(lambda: key not in self.images or self.images[key].users)
                shared = self.images.setdefault(key, found)
                shared.users += 1
            try:
                if shared is found:
                    shared.resources = stack.pop_all()
                stack.close()
                yield shared
            finally:
                with self.changed:
                    shared.users -= 1
                    last = not shared.users
                if last:
                    try:
                        shared.resources.close()
                    finally:
                        with self.changed:
                            del self.images[key]
                            self.changed.notify_all()


SHUTDOWN = rbd.ConnectionShutdown, rados.ConnectionShutdown


def connected_rados() -> rados.Rados:
    cluster = CONFIG.rados()
    try:
        return cluster.__enter__()
    except rados.Error as error:
        no_monitors = not cluster.conf_get("mon_host")
        cluster_keyrings = cluster.conf_get("keyring") or ""
        cluster.shutdown()
        if no_monitors:
            reason = "no monitor address is known: neither ceph.conf nor ceph.mon_host= has one"
        elif isinstance(error, rados.TimedOut):
            reason = f"no monitor answered within {CONFIG['connect-timeout']} s (connect-timeout)"
        elif error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
            # Which of these it is depends on the release of Ceph.
            reason = "unknown user, or its key is missing or wrong"
            keyrings = cluster_keyrings.split(",")
            if not any(os.access(path, os.R_OK) for path in keyrings):
                reason += f"; none of these can be read: {', '.join(keyrings)}"
        else:
            reason = str(error)
        raise ExportError(f"cannot connect to the cluster: {reason}") from None


@contextlib.contextmanager
def open_pool(cluster: rados.Rados, spec: Spec) -> Iterator[rados.Ioctx]:
    try:
        ioctx = cluster.open_ioctx(spec.pool)
    except rados.ObjectNotFound:
        raise ExportError(f"pool '{spec.pool}' not found") from None
    except rados.Error as error:
        raise ExportError(f"cannot open pool '{spec.pool}': {error}") from None
    with ioctx:
        ioctx.set_namespace(spec.namespace)
        # Answer ENOSPC when the pool is full; librados would wait for space.
        ioctx.set_osdmap_full_try()
        yield ioctx


@contextlib.contextmanager
def open_image(ioctx: rados.Ioctx, spec: Spec, read_only: bool) -> Iterator[rbd.Image]:
    try:
        image = rbd.Image(ioctx, spec.image, spec.snapshot, read_only=read_only)
    except rbd.ImageNotFound:
        raise ExportError(what_is_missing(ioctx, spec)) from None
    except rbd.PermissionError:
        hint = "" if read_only else "; if the key is read-only, start nbdkit with -r"
        raise ExportError(f"no permission to open image '{spec}'{hint}") from None
    except rbd.Error as error:
        if error.errno == errno.ESHUTDOWN:
            raise
        raise ExportError(f"cannot open image '{spec}': {error}") from None
    with image:
        yield image


def what_is_missing(ioctx: rados.Ioctx, spec: Spec) -> str:
    with contextlib.suppress(rbd.ImageNotFound, rbd.PermissionError):
        if spec.namespace and not rbd.RBD().namespace_exists(ioctx, spec.namespace):
            return f"namespace '{spec.namespace}' not found in pool '{spec.pool}'"
        with rbd.Image(ioctx, spec.image, read_only=True):
            return f"snapshot '{spec.snapshot}' not found in image '{spec._replace(snapshot=None)}'"
    return f"image '{spec._replace(snapshot=None)}' not found"


def identity(image: rbd.Image, ioctx: rados.Ioctx, spec: Spec, read_only: bool) -> tuple[Any, ...]:
    """Tell an image from all others that were, are or will be open by its name."""
    key = (ioctx.get_pool_id(), spec.namespace, image.id(), read_only)
    if spec.snapshot is not None:
        return (*key, image.snap_get_id(spec.snapshot))
    # Only an image that is open for writing hears of its resizes.
    return (*key, image.size()) if read_only else key


class OpenImage:
    """An open rbd.Image and what was decided about it when it was opened."""

    read_only = False

    def __init__(self, image: rbd.Image, ioctx: rados.Ioctx, spec: Spec) -> None:
        self.image = image
        self.resources = contextlib.ExitStack()
        self.users = 0
        # The object map says which objects exist.  It says so of this image alone,
        # not of a parent; its layout is right only without striping; and an
        # image that is open read-only never hears that the map became invalid.
        self.has_object_map = (
            bool(image.features() & rbd.RBD_FEATURE_FAST_DIFF)
            and image.stripe_count() == 1
            and not has_parent(image)
            and (not self.read_only or spec.snapshot is not None)
        )
        # Preferred is the piece that lies in one object; NBD and nbdkit want a
        # power of two from 512 bytes to 32 MiB.  64 MiB is nbdkit's own limit.
        self.block_size = 1, min(max(image.stripe_unit(), 4096), 32 << 20), 64 << 20
        config = {option["name"]: option["value"] for option in image.config_list()}
        # librbd's persistent cache acknowledges a write before it is on stable
        # storage even if the write asks for that; its flush is honest.
        persistent_cache = config.get("rbd_persistent_cache_mode", "disabled") != "disabled"
        self.can_fua = nbdkit.FUA_EMULATE if persistent_cache else nbdkit.FUA_NATIVE
        caches = config["rbd_cache"] == "true"
        writearound = config["rbd_cache_policy"] == "writearound"
        # Only the other policies keep what was read.
        self.can_cache = nbdkit.CACHE_EMULATE if caches and not writearound else nbdkit.CACHE_NONE
        # With the policy writearound, librbd acknowledges a write and forgets
        # that it has failed, if that was before the next flush began
        # (WriteAroundObjectDispatch::flush).  Config.rados turns the early
        # acknowledgement off; an image has the last word about its own options.
        if caches and writearound and config["rbd_cache_max_dirty"] != "0":
            raise ExportError(
                f"image '{spec}' sets rbd_cache_max_dirty for itself, with which librbd may"
                f" lose the error of a failed write: remove it, or set rbd_cache_policy=writeback"
            )

    def reading(self, action: Callable[[rbd.Image], R]) -> R:
        """Do what reads from the image."""
        return action(self.image)

    def fence(self) -> None:
        self.image = FENCED

    def close(self) -> None:
        pass


class ReadOnlyImage(OpenImage):
    """An image that is open read-only, or a snapshot, as it is now.

    librbd registers a watcher for an image that is open for writing: it hears of
    changes, and keeps the image from being removed.  An image that is open
    read-only stays for librbd what it was when it was opened.  If it has been
    removed since then, librbd reads zeroes, or from a removed snapshot what was
    written later; if it has been flattened, librbd still reads from its parent.

    So what was read counts only if the header of the image is *after* the read
    what it was before the image was opened.  If not, the image is opened anew and
    read again.  Who removes an image strikes it from the directory first, and who
    removes a snapshot changes the header first; the data goes last.
    """

    read_only = True

    def __init__(self, image: rbd.Image, ioctx: rados.Ioctx, spec: Spec) -> None:
        super().__init__(image, ioctx, spec)
        self.spec = spec
        self.ioctx = ioctx
        self.image_id = image.id()
        self.snapshot_id = None if spec.snapshot is None else image.snap_get_id(spec.snapshot)
        # Its header may have changed since librbd has read it: not known yet.
        self.current: tuple[Any, dict[str, bytes]] = image, {}
        self.opening = threading.Lock()
        self.header = SharedAnswer(self.ask)

    def reading(self, action: Callable[[rbd.Image], R]) -> R:
        while True:
            image, header = self.current
            result = action(image)
            if self.header.get() == header:
                return result
            self.open_anew(image)

    def ask(self) -> dict[str, bytes]:
        """Return what says how to read the image (cls_rbd.cc has the keys)."""
        keys = ["size", "parent", "features", "migration"]
        if self.snapshot_id is not None:
            keys.append(f"snapshot_{self.snapshot_id:016x}")
        answer = ask_header(self.ioctx, self.image_id, keys)
        try:
            if self.snapshot_id is None:
                image_name(self.ioctx, self.image_id)
        except rados.ObjectNotFound:
            raise self.gone() from None
        finally:
            header = answer()
        if not header or (self.snapshot_id is not None and keys[-1] not in header):
            raise self.gone()
        return header

    def open_anew(self, known: Any) -> None:
        with self.opening:
            if self.current[0] is not known:
                return  # somebody else has done it
            header = self.ask()
            image = rbd.Image(self.ioctx, image_id=self.image_id, read_only=True)
            if self.snapshot_id is not None:
                kind = image.snap_get_namespace_type(self.snapshot_id)
                if kind != rbd.RBD_SNAP_NAMESPACE_TYPE_USER:
                    raise self.gone()  # to the trash
                image.set_snap_by_id(self.snapshot_id)
            # The former one is closed when the last request has let go of it.
            self.current = image, header

    def gone(self) -> ExportError:
        return ExportError(f"image '{self.spec}' has been removed while it was open")

    def fence(self) -> None:
        super().fence()
        self.current = FENCED, {}

    def close(self) -> None:
        if not isinstance(self.current[0], Fenced):
            self.current[0].close()


class SharedAnswer:
    """The answer to a question, asked once for all who want to know it at a time."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask = ask
        self.lock = threading.Lock()
        self.asking = threading.Lock()
        self.next: concurrent.futures.Future[Any] | None = None

    def get(self) -> Any:
        """Ask, or wait for somebody who has not begun to ask yet; raise what `ask` does."""
        with self.lock:
            answer, first = self.next, self.next is None
            if answer is None:
                answer = self.next = concurrent.futures.Future()
        if first:
            with self.asking:
                with self.lock:
                    self.next = None
                try:
                    answer.set_result(self.ask())
                except BaseException as error:
                    answer.set_exception(error)
        return answer.result()


def ask_header(
    ioctx: rados.Ioctx, image_id: str, keys: Iterable[str], prefix: str = ""
) -> Callable[[], dict[str, bytes]]:
    """Ask for keys of an image's header, and for one that begins with the prefix.

    The answer is empty if the image is not there or not for our key.
    """
    operation = rados.ReadOp()
    operation.create()
    found = [ioctx.get_omap_vals_by_keys(operation, tuple(keys))[0]]
    if prefix:
        found.append(ioctx.get_omap_vals(operation, "", prefix, 1)[0])
    completion = ioctx.operate_aio_read_op(operation, f"rbd_header.{image_id}")

    def answer() -> dict[str, bytes]:
        completion.wait_for_complete()
        error = -completion.get_return_value()
        values = {} if error > 0 else {key: value for pairs in found for key, value in pairs}
        operation.release()
        if error > 0 and error not in (errno.ENOENT, errno.EPERM):
            kind = rados.ConnectionShutdown if error == errno.ESHUTDOWN else rados.OSError
            raise kind(f"the header of image {image_id} cannot be read", errno=error)
        return values

    return answer


def image_name(ioctx: rados.Ioctx, image_id: str) -> str:
    """Return the name of an image; ObjectNotFound if it is in the trash, too.

    Method `dir_get_name` of the object class of RBD (cls_rbd).
    """
    return class_method(ioctx, "rbd_directory", "dir_get_name", encoded(image_id))


def snapshot_name(ioctx: rados.Ioctx, image_id: str, snapshot_id: int) -> str:
    """Return the name of a snapshot (cls_rbd)."""
    return class_method(
        ioctx, f"rbd_header.{image_id}", "get_snapshot_name", struct.pack("<Q", snapshot_id)
    )


def class_method(ioctx: rados.Ioctx, name: str, method: str, argument: bytes) -> str:
    """Call a method that returns a string."""
    return decoded(ioctx.execute(name, "rbd", method, argument)[1], "s")[0]


def encoded(text: str) -> bytes:
    """Encode a string as Ceph does: after its length."""
    return struct.pack("<I", len(text.encode())) + text.encode()


def decoded(data: bytes, layout: str) -> list[Any]:
    """Decode what Ceph has encoded: the letters are those of struct, but `s` is a string."""
    values: list[Any] = []
    position = 0
    for letter in layout:
        values += struct.unpack_from("<I" if letter == "s" else f"<{letter}", data, position)
        position += struct.calcsize("<I" if letter == "s" else f"<{letter}")
        if letter == "s":
            length = values.pop()
            values.append(data[position : position + length].decode())
            position += length
    return values


class Fenced:
    """Stands in for an image that the cluster has fenced: refuses everything.

    A fence can be lifted, or expire.  Writes sent before somebody else took the
    image over must not land then.
    """

    def __getattr__(self, name: str) -> NoReturn:
        raise rbd.ConnectionShutdown("fenced: the client must reconnect", errno=errno.ESHUTDOWN)


# ---- one connection ----------------------------------------------------------


class Handle:
    """What one NBD connection has open."""

    def __init__(self, spec: Spec, read_only: bool) -> None:
        with contextlib.ExitStack() as stack:
            self.cluster = stack.enter_context(Cluster.use(spec))
            self.shared = stack.enter_context(self.cluster.open(spec, read_only))
            self.size = self.shared.image.size()
            self.description = description(spec)
            self.close = stack.pop_all().close

    def failed(self, error: BaseException) -> int:
        """Return the errno that the client gets for a failed request."""
        if isinstance(error, NotFast):
            return errno.ENOTSUP
        number = getattr(error, "errno", None) or errno.EIO
        if isinstance(error, MemoryError):
            number = errno.ENOMEM
        if number == errno.ESHUTDOWN:
            self.cluster.fence()
        return CLIENT_ERRNO.get(number, errno.EIO)


FENCED = Fenced()

# nbdkit turns an errno that NBD does not have into EINVAL, which would blame the
# client's request.
CLIENT_ERRNO = {
    errno.EPERM: errno.EPERM,
    errno.EACCES: errno.EPERM,
    errno.ENOMEM: errno.ENOMEM,
    errno.ENOSPC: errno.ENOSPC,
    errno.EDQUOT: errno.ENOSPC,
    errno.EROFS: errno.EROFS,
    errno.ESHUTDOWN: errno.ESHUTDOWN,
}


class NotFast(Exception):
    """Zeroing would not be faster than writing zeroes."""


def description(spec: Spec) -> str:
    return f"RBD image {spec}"


def has_parent(image: rbd.Image) -> bool:
    try:
        image.parent_id()
    except rbd.ImageNotFound:
        return False
    return True


def is_non_primary(image: rbd.Image) -> bool:
    mirror = image.mirror_image_get_info()
    return mirror["state"] == rbd.RBD_MIRROR_IMAGE_ENABLED and not mirror["primary"]


def despite_fence(action: Callable[[], R]) -> R:
    """Do what a fence may interrupt for a client that has written nothing yet."""
    for _ in list(Cluster.all):
        # Each may have been fenced since it was last used, and is given up then.
        with contextlib.suppress(*SHUTDOWN):
            return action()
    return action()


# ---- what a client asks for --------------------------------------------------


def requested(read_only: bool) -> tuple[Spec, bool]:
    """Return what the client may have by the name it gave, and whether read-only.

    The cluster is not asked: neither the answer nor its time tells a client what
    exists and is not for it.
    """
    spec, client = CONFIG.spec, common_name()
    if spec is None:
        try:
            name = nbdkit.export_name() or CONFIG["default-export"]
        except UnicodeDecodeError:
            raise ExportError("export name refused: it is not valid UTF-8") from None
        if not name:
            raise ExportError("export name missing: no default-export is set")
        if not name.isprintable():
            raise ExportError(f"export '{name}' refused: it has characters that do not print")
        spec = CONFIG.named(name)
        if not CONFIG.allows(spec, client):
            hint = " and the client has no common name" if client is None else f" to '{client}'"
            raise ExportError(
                f"export '{name}' refused: 'exports' does not allow it"
                + (hint if CONFIG.for_each_client() else "")
            )
    read_only |= spec.snapshot is not None
    read_only |= any(rule.applies(spec, client) for rule in CONFIG.read_only)
    return spec, read_only


# One attribute of a distinguished name (RFC 4514), and what goes between two.
ATTRIBUTE = re.compile(
    r"([A-Za-z0-9.-]+)=((?:[^\\,+;\"<>\0]|\\[0-9A-Fa-f]{2}|\\[^0-9A-Fa-f])*)(?:[,+]|$)"
)


def common_name() -> str | None:
    """Return the common name in the client's TLS certificate, if it has just one.

    nbdkit gives the distinguished name of a certificate that it has verified
    (nbdkit_peer_tls_dn), and nothing without --tls-verify-peer.
    """
    if not CONFIG.for_each_client():
        return None
    name, position, found = nbdkit.peer_tls_dn(), 0, []
    while position < len(name):
        attribute = ATTRIBUTE.match(name, position)
        if not attribute:
            return None
        position = attribute.end()
        if attribute[1].upper() in ("CN", "2.5.4.3", "OID.2.5.4.3"):
            found.append(attribute[2])
    # A value that starts with # is not text.
    if len(found) != 1 or not found[0] or found[0].startswith("#"):
        return None
    plain = re.sub(
        rb"\\([0-9A-Fa-f]{2}|.)",
        lambda escape: bytes.fromhex(escape[1].decode()) if len(escape[1]) == 2 else escape[1],
        found[0].encode(),
        flags=re.DOTALL,
    ).decode()
    return plain if plain.isprintable() else None


# ---- the list of exports -----------------------------------------------------

# nbdkit refuses a list with more (server/exports.c).
MAX_EXPORTS = 10_000


def allowed_exports() -> list[tuple[str, str]]:
    """Return the names of all images that the client may have, with a description.

    No image is opened, which would take 10 ms for each, unless its snapshots are
    exported.
    """
    client = common_name()
    exports = {}
    with Cluster.use() as cluster:
        clone_of = functools.cache(functools.partial(parent_name, cluster, client))
        for pool in cluster.rados.list_pools():
            for namespace in namespaces(cluster, pool, client):
                try:
                    with open_pool(cluster.rados, Spec(pool, namespace, "", None)) as ioctx:
                        for spec, size, parent in images(ioctx, pool, namespace, client):
                            clone = clone_of(*parent) if parent else ""
                            exports[CONFIG.name(spec)] = f"{size} bytes{clone}"
                except NOT_FOR_US as error:
                    nbdkit.debug(f"'{pool}/{namespace}' is not listed: {printable(str(error))}")
                except UnicodeDecodeError:
                    log_error(
                        f"'{pool}/{namespace}' is not listed: it has a name that is not UTF-8"
                    )
    return sorted(exports.items())


NOT_FOR_US = (
    ExportError,
    rados.ObjectNotFound,
    rados.PermissionError,
    rbd.ImageNotFound,
    rbd.PermissionError,
)


def namespaces(cluster: Cluster, pool: str, client: str | None) -> list[str]:
    """Return the namespaces of a pool, the default one too, in which exports may be.

    A key may be for one namespace, and not for the list of all.
    """
    if not CONFIG.reaches(client, pool):
        return []
    found = {""}
    common_name = glob.escape(client or "")
    for rule in CONFIG.rules:
        found.add(literal(rule.pattern.namespace.replace(COMMON_NAME, common_name)) or "")
    with (
        contextlib.suppress(*NOT_FOR_US, UnicodeDecodeError),
        open_pool(cluster.rados, Spec(pool, "", "", None)) as ioctx,
    ):
        found |= set(rbd.RBD().namespace_list(ioctx))
    return [namespace for namespace in found if CONFIG.reaches(client, pool, namespace)]


def images(
    ioctx: rados.Ioctx, pool: str, namespace: str, client: str | None
) -> Iterator[tuple[Spec, int, list[Any]]]:
    """Yield the images and snapshots that the client may have: name, bytes, parent.

    What cannot be read has vanished since it was listed, or is not for our key.
    """
    ids = {
        Spec(pool, namespace, image["name"], None): image["id"]
        for image in rbd.RBD().list2(ioctx)
        if is_nameable(image["name"])
    }
    with_snapshots = {spec for spec in ids if CONFIG.reaches(client, *spec[:3], snapshots=True)}
    wanted = [spec for spec in ids if CONFIG.allows(spec, client) or spec in with_snapshots]

    def ask(spec: Spec) -> Callable[[], dict[str, bytes]]:
        prefix = "snapshot_" if spec in with_snapshots else ""
        return ask_header(ioctx, ids[spec], ("size", "parent"), prefix)

    for spec, header in zip(wanted, in_parallel(ask, wanted), strict=True):
        if "size" in header and CONFIG.allows(spec, client):
            yield spec, decoded(header["size"], "Q")[0], parent_of(header.get("parent"))
        if any(key.startswith("snapshot_") for key in header):
            for name, size in snapshots(ioctx, spec):
                snapshot = spec._replace(snapshot=name)
                if is_nameable(name) and CONFIG.allows(snapshot, client):
                    yield snapshot, size, []


def is_nameable(name: str) -> bool:
    """Tell whether clients can name it in an export name of at most 4096 bytes."""
    return name.isprintable() and len(name) < 1000 and not re.search("[@/]", name)


def snapshots(ioctx: rados.Ioctx, spec: Spec) -> list[tuple[str, int]]:
    """Return name and bytes of those that can be opened by their name.

    Those of mirrors, groups and the trash cannot.
    """
    with (
        contextlib.suppress(*NOT_FOR_US, UnicodeDecodeError),
        rbd.Image(ioctx, spec.image, read_only=True) as image,
    ):
        return [
            (snapshot["name"], snapshot["size"])
            for snapshot in image.list_snaps()
            if snapshot["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER
        ]
    return []


def in_parallel(start: Callable[[T], Callable[[], R]], items: Iterable[T]) -> Iterator[R]:
    """Start a request for each item, many at a time, and yield the results in order."""
    under_way: collections.deque[Callable[[], R]] = collections.deque()
    try:
        for item in items:
            if len(under_way) == 1000:
                yield under_way.popleft()()
            under_way.append(start(item))
        while under_way:
            yield under_way.popleft()()
    finally:
        # librados writes into their memory.
        for answer in under_way:
            with contextlib.suppress(Exception):
                answer()


def parent_of(encoding: bytes | None) -> list[Any]:
    """Return pool, namespace, image and snapshot (cls_rbd.h, cls_rbd_parent)."""
    if not encoding:
        return []
    if encoding[0] == 1:
        *_, pool, image, snapshot = decoded(encoding, "BBIqsQ")
        return [pool, "", image, snapshot]
    parent = decoded(encoding, "BBIqssQ")[3:]
    return parent if parent[0] >= 0 else []


def parent_name(
    cluster: Cluster, client: str | None, pool: int, namespace: str, image: str, snapshot: int
) -> str:
    """Describe a clone, and name its parent to who may have it."""
    with contextlib.suppress(*NOT_FOR_US, UnicodeDecodeError):
        name = cluster.rados.pool_reverse_lookup(pool) or ""
        with open_pool(cluster.rados, Spec(name, namespace, "", None)) as ioctx:
            parent = Spec(name, namespace, image_name(ioctx, image), None)
            taken = parent._replace(snapshot=snapshot_name(ioctx, image, snapshot))
            if CONFIG.allows(parent, client) or CONFIG.allows(taken, client):
                return f", clone of {printable(str(taken))}"
    return ", clone"


# ---- start -------------------------------------------------------------------


def dump_plugin() -> None:
    print(f"rbd_export_version={__version__}")
    print("librbd_version=" + ".".join(map(str, rbd.RBD().version())))
    print("rbd_export_parameters=" + " ".join([*PARAMETERS, *ALIASES]))
    for name, parameter in PARAMETERS.items():
        if parameter.default:
            default = "yes" if parameter.default is True else parameter.default
            print(f"rbd_export_default_{name.replace('-', '_')}={default}", flush=True)


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key: str, value: str) -> None:
    CONFIG.set(key, value)


def config_complete() -> None:
    CONFIG.complete()


def get_ready() -> None:
    """Try to open what is exported while a failure can still end nbdkit with a message.

    In a child process: librados' threads would not survive nbdkit's fork.
    """
    if not CONFIG["probe"]:
        return
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        probe(writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        report = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        # Without any OSD capabilities, librados of Ceph 18 tries for ever.
        report = (
            f"no OSD has answered within {CONFIG['connect-timeout']} s (connect-timeout):"
            f" none is up, or the user has no OSD capabilities"
        )
    elif status and not report:
        report = f"the start-up probe ended with status {status}"
    if report:
        raise ExportError(f"{report} ({CONFIG.where()})")


def probe(writer: int) -> NoReturn:
    """Open the image read-only, write what is wrong to the pipe, and exit."""
    status = 1
    try:
        # The directory in which the daemon will run.
        os.chdir("/")
        # librados repeats on stderr what the report says in one line.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # Connecting has its own limit, which names the monitors.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CONFIG["connect-timeout"] + 1)
        if CONFIG.spec:
            Handle(CONFIG.spec, read_only=True).close()
        else:
            probe_exports()
        status = 0
    except Exception as error:
        os.write(writer, str(error).encode())
    finally:
        os._exit(status)


def probe_exports() -> None:
    """Look for the pools and namespaces that are named, and for the default export."""
    with Cluster.use() as cluster:
        for rule in CONFIG.rules:
            pool, namespace = literal(rule.pattern.pool), literal(rule.pattern.namespace)
            if rule.allow and pool is not None and namespace is not None:
                with open_pool(cluster.rados, Spec(pool, namespace, "", None)) as ioctx:
                    probe_pool(ioctx, pool, namespace)
    default = CONFIG["default-export"]
    if default and not CONFIG.for_each_client():
        Handle(CONFIG.named(default), read_only=True).close()


def probe_pool(ioctx: rados.Ioctx, pool: str, namespace: str) -> None:
    with contextlib.suppress(rbd.PermissionError):  # a key may be for a namespace alone
        if namespace and not rbd.RBD().namespace_exists(ioctx, namespace):
            raise ExportError(f"namespace '{namespace}' not found in pool '{pool}'")
    try:
        rbd.RBD().list(ioctx)
    except UnicodeDecodeError:
        pass  # the list of exports tells
    except rbd.PermissionError:
        where = Spec(pool, namespace, "", None)
        raise ExportError(f"no permission to list the images of '{where}'") from None


def literal(pattern: str) -> str | None:
    """Return the one name that a glob matches, if there is just one."""
    name = re.sub(r"\[([*?[])\]", r"\1", pattern)
    return name if glob.escape(name) == pattern and COMMON_NAME not in name else None


def after_fork() -> None:
    """See to it that a signal ends nbdkit although clients are connected.

    nbdkit itself would wait for them to leave, for ever if need be.  Python's
    signal handler, written in C, does no more than wake the thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=end_connections, args=(reader,), daemon=True).start()


def end_connections(signalled: int) -> None:
    """After a signal, let each client's requests finish and its connection end."""
    os.read(signalled, 1)
    nbdkit.shutdown()
    while True:  # nbdkit may be accepting a client just now
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(s) for s in own_sockets()]
            names = {name for s in sockets if is_listening(s) and (name := name_of(s))}
            for s in sockets:
                if not is_listening(s) and name_of(s) in names:
                    # nbdkit reads an end of file, and answers what it has read before.
                    with contextlib.suppress(OSError):
                        s.shutdown(socket.SHUT_RD)
        time.sleep(0.1)


def own_sockets() -> Iterator[socket.socket]:
    """Duplicate the sockets of this process: their owners may close them meanwhile."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(fd)).st_mode):
                yield socket.socket(fileno=os.dup(int(fd)))


def is_listening(s: socket.socket) -> bool:
    return bool(s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def name_of(s: socket.socket) -> Any:
    """Return what an accepted socket has in common with the one that listened."""
    address = s.getsockname()
    return address[1] if isinstance(address, tuple) else address  # port or path


# ---- connections -------------------------------------------------------------


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]] | None:
    """Return names and descriptions; None makes nbdkit refuse the client's request."""
    if CONFIG.spec:
        return [("", description(CONFIG.spec))]
    try:
        exports = despite_fence(allowed_exports)
    except Exception as error:
        log_error(f"the exports cannot be listed: {error_text(error)}")
        return None
    if len(exports) > MAX_EXPORTS:
        log_error(
            f"only the first {MAX_EXPORTS} of {len(exports)} exports are listed;"
            f" clients can open all of them"
        )
    return exports[:MAX_EXPORTS]


def default_export(readonly: bool, is_tls: bool) -> str:
    return CONFIG["default-export"] or ""


def open(readonly: bool) -> Handle | None:
    """Return a handle, or None if there is nothing to serve.

    An exception here would be logged with this script's path in front.
    """
    try:
        return despite_fence(lambda: Handle(*requested(readonly)))
    except Exception as error:
        log_error(error_text(error))
        return None


def error_text(error: Exception) -> str:
    return str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"


def log_error(text: str) -> None:
    """Log a line that the client is not to see.

    nbdkit since 1.42 sends a client what the thread that serves it has logged
    last (threadlocal_get_last_error); so another thread logs it.
    """
    line = printable(text).encode()
    log = threading.Thread(target=ctypes.CDLL(None).nbdkit_error, args=(b"%s", line))
    log.start()
    log.join()


def close(h: Handle | None) -> None:
    if h:
        h.close()


def cleanup() -> None:
    Cluster.end()


# ---- negotiation -------------------------------------------------------------


def get_size(h: Handle | None) -> int:
    # nbdkit refuses a client when the size is unknown.
    return h.size if h else -1


def export_description(h: Handle) -> str:
    return h.description


def block_size(h: Handle) -> tuple[int, int, int]:
    return h.shared.block_size


def can_write(h: Handle) -> bool:
    return not h.shared.read_only


def can_flush(h: Handle) -> bool:
    return True


def can_trim(h: Handle) -> bool:
    return True


def can_zero(h: Handle) -> bool:
    return True


def can_fast_zero(h: Handle) -> bool:
    return True


def can_fua(h: Handle) -> int:
    return h.shared.can_fua


def can_extents(h: Handle) -> bool:
    return True


def can_multi_conn(h: Handle) -> bool:
    return True


def can_cache(h: Handle) -> int:
    return h.shared.can_cache


def is_rotational(h: Handle) -> bool:
    return False


# ---- data --------------------------------------------------------------------

# LIBRADOS_OP_FLAG_FADVISE_FUA, which the Python module does not export.
FADVISE_FUA = 0x80


def request(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Give the client an errno that NBD has; nbdkit logs the exception itself."""

    @functools.wraps(callback)
    def wrapper(h: Handle, *args: Any) -> Any:
        try:
            return callback(h, *args)
        except BaseException as error:
            nbdkit.set_error(h.failed(error))
            raise

    return wrapper


def pieces(offset: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut a range into pieces that librbd takes: it fails from 2 GiB on.

    Cuts fall between discard granules, since a granule in two parts is not freed.
    """
    end = offset + count
    while offset < end:
        stop = min(offset - offset % GIB + GIB, end)
        yield offset, stop - offset
        offset = stop


@request
def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    # Raises when librbd read less, as it does past the end of a shrunk image.
    buf[:] = h.shared.reading(lambda image: image.read(offset, len(buf)))


@request
def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    h.shared.image.write(bytes(buf), offset, FADVISE_FUA if flags & nbdkit.FLAG_FUA else 0)


@request
def flush(h: Handle, flags: int) -> None:
    h.shared.image.flush()


@request
def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    """Free the space of whole discard granules; data elsewhere may stay."""
    for start, length in pieces(offset, count):
        h.shared.image.discard(start, length)
    if flags & nbdkit.FLAG_FUA:
        h.shared.image.flush()


@request
def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    """Zero a range, and free its space if MAY_TRIM says so.

    Keeping the space means writing zeroes, which is what a client that asks for
    FAST_ZERO would do itself.
    """
    zero_flags = 0 if flags & nbdkit.FLAG_MAY_TRIM else rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION
    if zero_flags and flags & nbdkit.FLAG_FAST_ZERO:
        raise NotFast
    for start, length in pieces(offset, count):
        h.shared.image.write_zeroes(start, length, zero_flags)
    if flags & nbdkit.FLAG_FUA:
        h.shared.image.flush()


@request
def extents(h: Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Say where data may be; all else reads as zeroes and takes no space."""
    result = []
    position, end = offset, offset + count
    ranges = h.shared.reading(
        lambda image: list(allocated(image, h.shared.has_object_map, offset, end))
    )
    for start, stop in ranges:
        if start > position:
            result.append((position, start - position, HOLE))
        result.append((start, stop - start, DATA))
        position = stop
    if position < end:
        result.append((position, end - position, HOLE))
    return result


DATA = 0
HOLE = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO


def allocated(
    image: rbd.Image, has_object_map: bool, start: int, end: int
) -> Iterator[tuple[int, int]]:
    """Yield the ranges within start..end that exist, in order and disjoint."""
    size = image.size()
    if start < size:
        objects = [(start, min(end, size))]
        if has_object_map:
            # Looking into each object of a large image takes minutes: first see
            # which ones exist at all.
            objects = diff(image, *objects[0], whole_object=True)
        for low, high in objects:
            yield from diff(image, low, high, whole_object=False)
    if size < end:
        # The image has shrunk.  What is no longer there is for reads to report.
        yield max(start, size), end


def diff(image: rbd.Image, start: int, end: int, whole_object: bool) -> list[tuple[int, int]]:
    """Return the ranges that librbd's diff_iterate calls existing, merged."""
    found: list[tuple[int, int]] = []

    def add(offset: int, length: int, exists: bool) -> None:
        if exists:
            found.append((max(offset, start), min(offset + length, end)))

    image.diff_iterate(start, end - start, None, add, True, whole_object)
    merged: list[tuple[int, int]] = []
    for low, high in sorted(found):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], high)
        elif low < high:
            merged.append((low, high))
    return merged
