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

import argparse
import bisect
import collections
import concurrent.futures
import contextlib
import ctypes
import datetime
import difflib
import errno
import fnmatch
import functools
import glob
import itertools
import json
import operator
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import syslog
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

import nbdkit

try:
    import rados
    import rbd
except ModuleNotFoundError as error:
    sys.tracebacklimit = 0
    raise ModuleNotFoundError(
        f"{error}: install python3-rados and python3-rbd for Python"
        f" {sys.version_info.major}.{sys.version_info.minor}.  nbdkit looks for them in"
        f" {sys.prefix}, by the python3 that comes first in PATH"
    ) from None

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

LIBC = ctypes.CDLL(None)

# The GIL lets few threads allocate at a time, and each of glibc's arenas keeps memory.
if hasattr(LIBC, "mallopt") and "MALLOC_ARENA_MAX" not in os.environ:
    LIBC.mallopt(-8, 2)  # M_ARENA_MAX


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


def size(value: str) -> int:
    """Parse bytes: a number and a suffix for a power of 1024.

    nbdkit.parse_size takes the same, but logs an error of its own.
    """
    match = re.fullmatch("([0-9]+)([kmgtpe]?)", value, re.IGNORECASE | re.ASCII)
    number = int(match[1]) << 10 * " KMGTPE".index(match[2].upper() or " ") if match else 0
    if not 0 < number < 1 << 63:
        raise ValueError(f"'{value}' is not a size above 0: bytes, or with k, M, G, T, P or E")
    return number


def object_size(value: str) -> int:
    number = size(value)
    if number & (number - 1) or not 1 << 12 <= number <= 1 << 25:
        raise ValueError(f"'{value}' is not a power of two from 4k to 32M")
    return number


def passphrase(value: str) -> bytes:
    """Read a passphrase: of a file, or of +FILE or -FD as nbdkit_read_password has them."""
    if re.fullmatch(r"\+.+|-[0-9]+", value):
        if not hasattr(nbdkit, "read_password"):
            raise ValueError(f"'{value}' needs nbdkit 1.42 or newer")
        found = nbdkit.read_password(value)
    else:
        path = os.path.join(WORKING_DIRECTORY, any_text(value))
        try:
            if not os.path.isfile(path) and os.path.exists(path):
                raise ValueError(f"'{path}' is not a regular file")
            with open_file(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                if mode & stat.S_IROTH:
                    raise ValueError(f"all users can read '{path}': chmod o-r")
                found = file.read().removesuffix(b"\n")
        except OSError as error:
            raise ValueError(f"cannot read '{path}': {error.strerror}") from None
    if not found:
        raise ValueError(f"'{value}' has no passphrase")
    return found


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"'{value}' is neither '" + "' nor '".join(choices) + "'")
        return value

    return parse


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
    "from-snapshot": Parameter(None, any_text, "tell what has changed since this snapshot"),
    "point-in-time": Parameter(False, yes_or_no, "serve a snapshot, taken for the first client"),
    "extents": Parameter(
        "exact", one_of("exact", "objects", "off"), "block status: exact, objects or off"
    ),
    "create": Parameter(None, size, "make the image with this size, if there is none"),
    "data-pool": Parameter(None, any_text, "with create: pool for the data"),
    "object-size": Parameter(None, object_size, "with create: bytes of an object"),
    "features": Parameter(None, any_text, "with create: features, as rbd knows them"),
    "exports": Parameter(
        (), any_text, "images that clients may have: a glob, or !glob to deny", repeatable=True
    ),
    "default-export": Parameter(None, any_text, "what a client gets that names no export"),
    "access": Parameter((), any_text, "glob:ro makes images read-only", repeatable=True),
    "images-per-connection": Parameter(
        None, positive, "images that share a connection to the cluster"
    ),
    "encryption-format": Parameter(
        (), one_of("luks", "luks1", "luks2"), "decrypt the image: LUKS format", repeatable=True
    ),
    "passphrase-file": Parameter(
        (), passphrase, "file with the passphrase of the encryption", repeatable=True
    ),
    "conf": Parameter(None, readable_file, "ceph.conf instead of the one that Ceph finds"),
    "id": Parameter("admin", user_id, "Ceph user: ID of client.ID"),
    "cluster": Parameter("ceph", any_text, "name of the cluster, for Ceph's default paths"),
    "ceph.OPTION": Parameter(None, str, "any Ceph configuration option"),
    "connect-timeout": Parameter(30, seconds, "seconds until connecting to the cluster fails"),
    "io-timeout": Parameter(None, seconds, "seconds until a request to the cluster fails"),
    "lock": Parameter(
        "auto", one_of("auto", "exclusive"), "hand the exclusive lock over to others, or keep it"
    ),
    "write-cache": Parameter(
        False, yes_or_no, "after the first flush, answer a write before the cluster has it"
    ),
    "parallel": Parameter(
        "auto", one_of("auto", "yes", "no"), "serve several requests of a connection at once"
    ),
    "probe": Parameter(True, yes_or_no, "try to open the image before nbdkit starts to serve"),
}
ALIASES = {"user": "id"}

open_file = open  # `open` is a callback of nbdkit further down


def is_ceph_option(name: str) -> bool:
    return rados.Rados(rados_id="").conf_get(name) is not None


class Spec(NamedTuple):
    """An image, or one of its snapshots, by name; with a base, what has changed since then."""

    pool: str
    namespace: str
    image: str
    snapshot: str | None = None
    base: str | None = None

    def __str__(self) -> str:
        path = "/".join(part for part in (self.pool, self.namespace, self.image) if part)
        snapshots = "" if self.base is None else f"{self.base}.."
        snapshots += self.snapshot or ""
        return f"{path}@{snapshots}" if snapshots else path


def split(text: str, what: str) -> dict[str, str]:
    """Split `[pool/[namespace/]]image[@[base..][snapshot]]` into the parts that it has."""
    path, at, snapshot = text.partition("@")
    base, dots, last = snapshot.partition("..")
    names = path.split("/")
    malformed = len(names) > 3 or not all(names) or re.search("[@/]", snapshot)
    if malformed or (at and not snapshot) or (dots and (not base or ".." in last)):
        raise ExportError(
            f"{what} '{text}' is malformed: it must be [pool/[namespace/]]image[@snapshot],"
            f" or image@base.. or image@base..snapshot for what has changed since then"
        )
    parts = {"image": names.pop()}
    parts.update(zip(("pool", "namespace"), names, strict=False))
    if dots:
        return parts | {"base": base} | ({"snapshot": last} if last else {})
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
            if is_ceph_option(key):
                known = [f"ceph.{key}"]
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
        if "create" not in self.given:
            for name in CREATION:
                if name in self.given:
                    raise ExportError(f"'{name}' needs 'create': it is for a new image")
        self.complete_encryption()
        self.read_only = [self.access(text) for text in self["access"]]
        if "conf" not in self.given and os.environ.get("CEPH_CONF"):
            self.set("conf", os.environ["CEPH_CONF"])
        try:
            self.rados()
        except ExportError as error:
            raise ExportError(f"{error} ({self.where()})") from None

    def complete_image(self) -> None:
        for name in ("exports", "default-export", "images-per-connection"):
            if name in self.given:
                raise ExportError(f"'image' and '{name}' exclude each other: leave one of them out")
        image = self.given.pop("image")
        for part_name, part in split(image, "image").items():
            name = {"base": "from-snapshot"}.get(part_name, part_name)
            if self.given.setdefault(name, part) != part:
                raise ExportError(
                    f"'image={image}' contradicts '{name}={self[name]}': leave one of them out"
                )
        self.spec = Spec(
            self["pool"], self["namespace"], self["image"], self["snapshot"], self["from-snapshot"]
        )
        if self["point-in-time"] and self.spec.snapshot is not None:
            raise ExportError("'snapshot' and 'point-in-time' exclude each other: leave one out")
        if "create" in self.given:
            for name in ("snapshot", "from-snapshot", "point-in-time"):
                if self[name]:
                    raise ExportError(f"'{name}' and 'create' exclude each other: leave one out")
            if not self["probe"]:
                raise ExportError("'create' needs the probe: leave 'probe=no' out")
            if nbdkit_options().readonly:
                raise ExportError("'create' and nbdkit's -r exclude each other: leave one out")

    def complete_encryption(self) -> None:
        layers = len(self["encryption-format"])
        if layers != len(self["passphrase-file"]):
            raise ExportError(
                "each 'encryption-format' needs its 'passphrase-file', and the reverse"
            )
        if layers and "create" in self.given:
            raise ExportError(
                "'encryption-format' and 'create' exclude each other: 'rbd encryption format'"
                " makes the header of an encrypted image"
            )
        if layers > 1 and not hasattr(rbd.Image, "encryption_load2"):
            raise ExportError(
                "'encryption-format' is given more than once: the passphrases of parents need"
                " librbd of Ceph 18 or newer"
            )

    def complete_exports(self) -> None:
        if "snapshot" in self.given:
            raise ExportError("'snapshot' needs 'image'; exports=IMAGE@SNAPSHOT exports a snapshot")
        for name in ("from-snapshot", "create"):
            if name in self.given:
                raise ExportError(f"'{name}' needs 'image': it is about one image")
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
        if "base" in parts:
            raise ExportError(f"'{parameter}' has two snapshots: each needs a pattern of its own")
        for part in parts.values():
            if "[" in re.sub(r"\[!?+.[^]]*\]", "", part):
                raise ExportError(f"'{parameter}' has a [ without its ]; [[] stands for a [")
            for field in re.findall(r"\{dn\.[^}]*\}?", part):
                if field != COMMON_NAME:
                    raise ExportError(f"'{parameter}' has '{field}'; only {COMMON_NAME} is known")
                if not hasattr(nbdkit, "peer_tls_dn"):
                    raise ExportError(f"'{parameter}': {COMMON_NAME} needs nbdkit 1.42 or newer")
        pool, namespace = glob.escape(self["pool"]), glob.escape(self["namespace"])
        return Spec(pool, namespace, "")._replace(**parts)

    def named(self, export: str) -> Spec:
        """Return what an export name stands for."""
        return Spec(self["pool"], self["namespace"], "")._replace(**split(export, "export name"))

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
        if spec.base is not None:
            whole = spec._replace(base=None)
            return self.allows(whole, client) and self.allows(
                whole._replace(snapshot=spec.base), client
            )
        verdicts = [rule.allow for rule in self.rules if rule.applies(spec, client)]
        return verdicts[-1] if verdicts else False

    def is_read_only(self, spec: Spec, client: str | None) -> bool:
        is_past = spec.snapshot is not None or spec.base is not None or self["point-in-time"]
        return is_past or any(rule.applies(spec, client) for rule in self.read_only)

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
        for name, (option, text) in CREATION.items():
            if name in self.given:
                try:
                    cluster.conf_set(option, text(self[name]))
                except rados.Error:
                    raise ExportError(f"parameter '{name}': Ceph refuses '{self[name]}'") from None
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


# What `create` takes, and the option by which librbd knows it.
CREATION: dict[str, tuple[str, Callable[[Any], str]]] = {
    "data-pool": ("rbd_default_data_pool", str),
    "object-size": ("rbd_default_order", lambda number: str(number.bit_length() - 1)),
    "features": ("rbd_default_features", str),
}

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
        # What was permitted on this connection, and what is not any more: the OSDs
        # know a key's capabilities as they were when it connected.
        self.served: set[tuple[Spec | None, bool]] = set()
        self.refused: set[tuple[Spec | None, bool]] = set()
        self.changed = threading.Condition()

    @classmethod
    @contextlib.contextmanager
    def use(cls, spec: Spec | None = None, read_only: bool = True) -> Iterator[Cluster]:
        """Give the connection on which an image is open, or may be."""
        limit = CONFIG["images-per-connection"] or sys.maxsize
        with cls.lock:
            able = [self for self in cls.all if (spec, read_only) not in self.refused]
            usable = [self for self in able if spec in self.uses]
            usable += [self for self in able if spec is None or len(self.uses) < limit]
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
        except NoPermission as error:
            if (spec, read_only) not in self.served:
                raise
            self.refused.add((spec, read_only))
            raise Outdated(str(error)) from None
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

    def finish(self) -> list[OpenImage]:
        """Open no image any more; return those that are."""
        with self.changed:
            self.fenced = True
            return list(self.images.values())

    @classmethod
    def end(cls) -> None:
        """Close what is still open, at the end of nbdkit.

        nbdkit does not call `close` for the clients that a signal cut off, and
        librbd may hold writes that it has acknowledged.  One image that hangs
        must not keep another from being flushed.
        """
        connected = [self for self in cls.all if self.connected.done()]
        images = [shared for self in connected for shared in self.finish()]
        with concurrent.futures.ThreadPoolExecutor(len(images) + 1) as pool:
            closed = [pool.submit(shared.resources.close) for shared in images if shared.resources]
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
            kind: Callable[..., OpenImage] = ReadOnlyImage if read_only else OpenImage
            if not read_only and image.overlap():
                image_id = image.id()
                ancestors = Ancestors.of(self.rados, ioctx, image_id)
                if ancestors.headers:
                    key = (*key, repr(ancestors.headers))
                    kind = functools.partial(ChildOfClone, ancestors)
                    # librbd is to open the ancestors after they were looked at.
                    image.close()
                    image = stack.enter_context(open_image(ioctx, spec, read_only))
                    if image.id() != image_id:
                        raise ExportError(f"image '{spec}' has become another one just now")
            found = None
            shared = self.join(key, None)
            if not shared:
                if is_point_in_time(spec):
                    name = stack.enter_context(point_in_time(self.rados, ioctx, spec))
                    spec = spec._replace(snapshot=name)
                    image = stack.enter_context(open_image(ioctx, spec, read_only))
                found = kind(self.rados, ioctx, image, spec)
                stack.callback(found.close)
                if CONFIG["encryption-format"] and not read_only:
                    keep_header(ioctx, image)
                shared = self.join(key, found)
            try:
                if shared is found:
                    shared.resources = stack.pop_all()
                stack.close()
                if CONFIG["lock"] == "exclusive" and not read_only:
                    shared.take_lock()
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

    def join(self, key: tuple[Any, ...], found: OpenImage | None) -> Any:
        """Use the open image that is known by this key, or else the one found."""
        with self.changed:
            # One that is being closed has writes to finish first.
            self.changed.wait_for(lambda: key not in self.images or self.images[key].users)
            if self.fenced:
                raise rbd.ConnectionShutdown("fenced", errno=errno.ESHUTDOWN)
            shared = self.images.get(key, found)
            if shared:
                self.images[key] = shared
                shared.users += 1
            return shared


class NoPermission(ExportError):
    """The key is not for an image."""


class Outdated(NoPermission):
    """A new connection may have the permission."""


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
                reason += "; no file of the option 'keyring' can be read"
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
        raise NoPermission(f"no permission to open image '{spec}'{hint}") from None
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
            whole = spec._replace(snapshot=None, base=None)
            return f"snapshot '{spec.snapshot}' not found in image '{whole}'"
    return f"image '{spec._replace(snapshot=None, base=None)}' not found"


def identity(image: rbd.Image, ioctx: rados.Ioctx, spec: Spec, read_only: bool) -> tuple[Any, ...]:
    """Tell an image from all others that were, are or will be open by its name."""
    key = (ioctx.get_pool_id(), spec.namespace, image.id(), read_only, *snapshot_ids(image, spec))
    # Only an image that is open for writing hears of its resizes.
    is_fixed = spec.snapshot is not None or is_point_in_time(spec)
    return (*key, image.size()) if read_only and not is_fixed else key


def snapshot_ids(image: rbd.Image, spec: Spec) -> tuple[int | None, int | None]:
    """Return the id of the snapshot, and that of the base."""
    snapshot = None if spec.snapshot is None else image.snap_get_id(spec.snapshot)
    if spec.base is None:
        return snapshot, None
    whole = spec._replace(snapshot=None, base=None)
    try:
        base = image.snap_get_id(spec.base)
    except rbd.ImageNotFound:
        raise ExportError(f"from-snapshot '{spec.base}' not found in image '{whole}'") from None
    if snapshot is not None and base >= snapshot:
        raise ExportError(
            f"from-snapshot '{spec.base}' is not older than snapshot '{spec.snapshot}'"
            f" of image '{whole}'"
        )
    return snapshot, base


class OpenImage:
    """An open rbd.Image and what was decided about it when it was opened."""

    read_only = False

    def __init__(
        self, cluster: rados.Rados, ioctx: rados.Ioctx, image: rbd.Image, spec: Spec
    ) -> None:
        self.snapshot_ids = snapshot_ids(image, spec)
        self.name = str(spec)
        self.layer: Any = visible_layer(
            cluster, ioctx, image, self.snapshot_ids, self.name, self.read_only
        )
        self.locking = threading.Lock()
        self.resources: Any = None  # what else to close with it
        self.users = 0
        # Preferred is the piece that lies in one object; NBD and nbdkit want a
        # power of two from 512 bytes to 32 MiB.  64 MiB is nbdkit's own limit.
        # But nbdcopy writes zeroes into what is smaller than the preferred block.
        preferred = min(max(image.stripe_unit(), BLOCK), 32 << 20) if self.read_only else BLOCK
        self.block_size = 1, preferred, 64 << 20
        config = {option["name"]: option["value"] for option in image.config_list()}
        # librbd's persistent cache acknowledges a write before it is on stable
        # storage even if the write asks for that; its flush is honest.
        persistent_cache = config.get("rbd_persistent_cache_mode", "disabled") != "disabled"
        self.can_fua = nbdkit.FUA_EMULATE if persistent_cache else nbdkit.FUA_NATIVE
        caches = config["rbd_cache"] == "true"
        writearound = config["rbd_cache_policy"] == "writearound"
        # Only the other policies keep what was read.
        self.can_cache = nbdkit.CACHE_EMULATE if caches and not writearound else nbdkit.CACHE_NONE
        buffers = persistent_cache or (caches and config["rbd_cache_max_dirty"] != "0")
        self.layer.settled = self.read_only or not buffers
        self.early = EarlyWrites(self)
        self.may_answer_early = CONFIG["write-cache"] and not buffers and not opens_again()
        self.answers_early = False
        self.flushing = threading.Lock()
        self.changed = True  # since the last flush that has succeeded began
        self.flushes = 0  # that have begun
        self.succeeded = 0  # the last of them that did
        # With the policy writearound, librbd acknowledges a write and forgets
        # that it has failed, if that was before the next flush began
        # (WriteAroundObjectDispatch::flush).  Config.rados turns the early
        # acknowledgement off; an image has the last word about its own options.
        if caches and writearound and config["rbd_cache_max_dirty"] != "0":
            raise ExportError(
                f"image '{spec}' sets rbd_cache_max_dirty for itself, with which librbd may"
                f" lose the error of a failed write: remove it, or set rbd_cache_policy=writeback"
            )

    def look(self, offset: int, count: int, action: Callable[[Layer], R]) -> R:
        """Do what asks for a range."""
        self.early.settle(offset, count)
        return self.reading(action)

    def change(self, offset: int, count: int, action: Callable[[rbd.Image], None]) -> None:
        """Do what changes a range."""
        self.early.settle(offset, count)
        try:
            self.writing(action)
        finally:
            self.changed = True

    def write_early(self, data: bytes, offset: int) -> None:
        self.early.write(data, offset)
        self.changed = True

    def flush(self) -> None:
        """Return when all that was answered before is on stable storage.

        Those that come while one is under way wait for it, and then for one more together,
        or for none if nothing has been answered since the former began.
        """
        before = self.flushes
        with self.flushing:
            if self.changed and self.succeeded <= before:
                self.flushes += 1
                self.changed = False
                try:
                    self.writing(self.early.flush)
                except BaseException:
                    self.changed = True
                    raise
                self.succeeded = self.flushes
            # Not before the first flush: a client that never sends one could not notice
            # what is lost in a crash (so does librbd: rbd_cache_writethrough_until_flush).
            self.answers_early = self.may_answer_early

    def reading(self, action: Callable[[Layer], R]) -> R:
        """Do what reads from the image."""
        return action(self.layer)

    def writing(self, action: Callable[[rbd.Image], None]) -> None:
        """Do what writes to the image, or flushes what was written."""
        action(self.layer.image)

    def take_lock(self) -> None:
        """Take the exclusive lock for good, unless somebody else has it."""
        image = self.layer.image
        with self.locking:
            if image.is_exclusive_lock_owner():
                return
            look_for_lock(image, self.name)
            try:
                image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
            except rbd.Error as error:
                if error.errno == errno.ESHUTDOWN:
                    raise
                look_for_lock(image, self.name)
                raise ExportError(f"cannot lock image '{self.name}': {error}") from None

    def fence(self) -> None:
        self.layer = FENCED

    def close(self) -> None:
        if isinstance(self.layer, Fenced):
            self.early.tell_what_is_lost("fenced")
        else:
            self.early.finish()
            self.layer.close()


class EarlyWrite:
    """A write that was answered before the cluster had it."""

    def __init__(self, data: bytes, offset: int) -> None:
        self.data = data
        self.offset = offset
        self.end = offset + len(data)
        self.failed = False
        self.landing = threading.Lock()  # held until the cluster has answered
        self.landing.acquire()


class EarlyWrites:
    """The writes of an open image that were answered early: its write cache.

    What touches their bytes waits until they have landed, a flush for all of them.
    librbd could answer early by itself, but loses errors (see OpenImage).  Here a write
    that has failed stays, and who meets it tries it again, and fails if that does: no
    flush succeeds, and no read returns what was there before, until it has landed.
    """

    def __init__(self, shared: OpenImage) -> None:
        self.shared = shared
        self.lock = threading.Lock()
        self.writes: dict[int, EarlyWrite] = {}  # by offset, the oldest first; disjoint
        self.offsets: list[int] = []  # sorted
        self.bytes = 0
        self.furthest = 0  # end of those since the last flush

    def write(self, data: bytes, offset: int) -> None:
        write = EarlyWrite(data, offset)
        while True:
            with self.lock:
                former = self.meeting(offset, write.end)
                if not former and self.is_full():
                    former = [next(iter(self.writes.values()))]
                if not former:
                    self.writes[offset] = write
                    bisect.insort(self.offsets, offset)
                    self.bytes += len(data)
                    self.furthest = max(self.furthest, write.end)
                    break
            self.land(former)
        try:
            self.shared.layer.image.aio_write(data, offset, functools.partial(self.answered, write))
        except BaseException:
            self.forget(write)
            write.landing.release()
            raise

    def is_full(self) -> bool:
        return len(self.writes) >= MAX_EARLY_WRITES or self.bytes > MAX_EARLY_BYTES

    def answered(self, write: EarlyWrite, completion: Any) -> None:
        """Hear from a thread of librbd what has become of a write."""
        keep_thread_state()
        write.failed = True
        try:
            result = completion.get_return_value()
            if result >= 0:
                self.forget(write)
                write.failed = False
            elif result == -errno.ESHUTDOWN:
                # Before anybody tries again: the fence may be lifted, and this must not land.
                self.shared.fence()
        finally:
            write.landing.release()

    def forget(self, write: EarlyWrite) -> None:
        with self.lock:
            del self.writes[write.offset]
            del self.offsets[bisect.bisect_left(self.offsets, write.offset)]
            self.bytes -= len(write.data)

    def meeting(self, start: int, end: int) -> list[EarlyWrite]:
        position = bisect.bisect_left(self.offsets, end)
        found = []
        while position:
            position -= 1
            write = self.writes[self.offsets[position]]
            if write.end <= start:
                break
            found.append(write)
        return found

    def settle(self, offset: int, count: int) -> None:
        """Return when no early write to a range is under way; raise an error if one failed."""
        if self.writes:
            with self.lock:
                former = self.meeting(offset, offset + count)
            self.land(former)

    def land(self, writes: Iterable[EarlyWrite]) -> bool:
        """Wait for writes, and try again those that have failed; tell if there were any."""
        failed = False
        for write in writes:
            with write.landing:
                if write.failed:
                    failed = True
                    self.shared.layer.image.write(write.data, write.offset)
                    write.failed = False
                    self.forget(write)
        return failed

    def flush(self, image: rbd.Image) -> None:
        with self.lock:
            former = list(self.writes.values())
            furthest, self.furthest = self.furthest, 0
        try:
            image.flush()
            size = image.size()
            if furthest <= size and self.land(former):
                image.flush()
        except BaseException:
            with self.lock:
                self.furthest = max(self.furthest, furthest)
            raise
        if furthest > size:
            self.give_up(former, size)

    def give_up(self, writes: Iterable[EarlyWrite], size: int) -> NoReturn:
        """Fail once for what can never land, or what librbd has cut off without an error."""
        for write in writes:
            with write.landing:
                if write.failed and write.end > size:
                    write.failed = False
                    self.forget(write)
        raise ExportError(
            f"image '{self.shared.name}' has shrunk: what was written behind its end is lost"
        )

    def finish(self) -> None:
        """Wait for what is under way when the image is closed."""
        reason: Exception | None = None
        for write in list(self.writes.values()):
            try:
                self.land([write])
            except Exception as error:
                reason = error
                if isinstance(error, rbd.Timeout):
                    break  # or each would take as long
        self.tell_what_is_lost(reason)

    def tell_what_is_lost(self, reason: object) -> None:
        if self.writes:
            log_error(
                f"image '{self.shared.name}': {len(self.writes)} writes that were not flushed"
                f" are lost: {reason}"
            )


# What may be under way: a flush is not to take long, nor other clients to be kept waiting.
MAX_EARLY_BYTES = 8 << 20
MAX_EARLY_WRITES = 2048


def look_for_lock(image: rbd.Image, name: str) -> None:
    """Raise an error if there is no exclusive lock, or somebody has it."""
    if not image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
        raise ExportError(f"lock=exclusive: image '{name}' has not the feature exclusive-lock")
    alive = {watcher["addr"] for watcher in image.watchers_list()}
    for owner, by_librbd in owners(image):
        # librbd that is gone loses the lock to who wants it; `rbd lock add` stays.
        if owner in alive or not by_librbd:
            raise ExportError(f"lock=exclusive: image '{name}' is locked by {owner}")


def owners(image: rbd.Image) -> list[tuple[str, bool]]:
    """Return the addresses that have locked the image, and whether librbd did so by itself."""
    found = image.list_lockers()
    lockers = found["lockers"] if found else []
    return [(address, found["tag"] == "internal") for *_, address in lockers]


class Ancestors:
    """Those ancestors of an image that are clones themselves, and what they were.

    librbd does not hear of changes to them.  When one of them has been flattened
    with its snapshots (deep-flatten), the next one can be removed; librbd would
    read zeroes there, and write them where a part of an object is written.
    """

    def __init__(self, cluster: rados.Rados, encoding: bytes | None) -> None:
        self.questions: list[Callable[[], Callable[[], dict[str, bytes]]]] = []
        self.headers: list[dict[str, bytes]] = []
        while parent := parent_of(encoding):
            pool, namespace, image_id, snapshot_id = parent
            keys = "parent", f"snapshot_{snapshot_id:016x}"
            ioctx = pool_by_id(cluster, pool, namespace)
            question = functools.partial(ask_header, ioctx, image_id, keys)
            header = question()()
            encoding = header.get("parent")
            if encoding:
                self.questions.append(question)
                self.headers.append(header)

    @classmethod
    def of(cls, cluster: rados.Rados, ioctx: rados.Ioctx, image_id: str) -> Ancestors:
        return cls(cluster, ask_header(ioctx, image_id, ["parent"])().get("parent"))

    def ask(self) -> list[dict[str, bytes]]:
        """Return the headers as they are now."""
        return list(in_parallel(lambda question: question(), self.questions))


class ChildOfClone(OpenImage):
    """An image that is open for writing and whose parent is a clone itself."""

    def __init__(self, ancestors: Ancestors, *args: Any) -> None:
        super().__init__(*args)
        self.may_answer_early = False  # `writing` looks again after each write
        self.ancestors = ancestors
        self.headers = SharedAnswer(ancestors.ask)

    def reading(self, action: Callable[[Layer], R]) -> R:
        result = super().reading(action)
        self.check()
        return result

    def writing(self, action: Callable[[rbd.Image], None]) -> None:
        # Before, so as to damage nothing; after, since it may have taken its time.
        self.check()
        super().writing(action)
        self.check()

    def check(self) -> None:
        """Refuse when librbd may have a wrong idea of an ancestor of which there still is one."""
        if self.headers.get() != self.ancestors.headers and self.layer.image.overlap():
            raise ExportError(
                f"an ancestor of image '{self.name}' has been flattened or removed while it"
                f" was open: clients must reconnect"
            )


class ReadOnlyImage(OpenImage):
    """An image that is open read-only, or a snapshot, as it is now.

    librbd registers a watcher for an image that is open for writing: it hears of
    changes, and keeps the image from being removed.  An image that is open
    read-only stays for librbd what it was when it was opened.  If it has been
    removed since then, librbd reads zeroes, or from a removed snapshot what was
    written later; if it has been flattened, librbd still reads from its parent.

    So what was read counts only if the header of the image, and those of its
    ancestors, are *after* the read what they were before the image was opened.  If
    not, the image is opened anew and read again.  Who removes an image strikes it
    from the directory first, and who removes a snapshot changes the header first;
    the data goes last.
    """

    read_only = True

    def __init__(
        self, cluster: rados.Rados, ioctx: rados.Ioctx, image: rbd.Image, spec: Spec
    ) -> None:
        super().__init__(cluster, ioctx, image, spec)
        # The header may have changed since librbd has read it: not known yet.
        self.current: tuple[Any, Any] = self.layer, None
        self.ancestors = Ancestors(cluster, None)
        self.opening = threading.Lock()
        self.header = SharedAnswer(functools.partial(self.ask, ioctx, image.id()))

    def reading(self, action: Callable[[Layer], R]) -> R:
        while True:
            layer, header = self.current
            try:
                result = action(layer)
            except Exception:
                if self.header.get() == header:
                    raise
            else:
                if self.header.get() == header:
                    return result
            self.open_anew(layer)

    def ask(self, ioctx: rados.Ioctx, image_id: str) -> tuple[dict[str, bytes], Any]:
        """Return what says how to read the image (cls_rbd.cc has the keys), and its ancestors."""
        snapshots = [f"snapshot_{number:016x}" for number in self.snapshot_ids if number]
        answer = ask_header(
            ioctx, image_id, ["size", "parent", "features", "migration", *snapshots]
        )
        try:
            ancestors = self.ancestors.ask()
            if self.snapshot_ids[0] is None:
                image_name(ioctx, image_id)
        except rados.ObjectNotFound:
            raise self.gone() from None
        finally:
            header = answer()
        if not header or not header.keys() >= set(snapshots):
            raise self.gone()
        return header, ancestors

    def open_anew(self, known: Layer) -> None:
        with self.opening:
            if self.current[0] is not known:
                return  # somebody else has done it
            header, _ = self.header.ask()
            self.ancestors = Ancestors(known.cluster, header.get("parent"))
            image = open_by_id(known.ioctx, known.image_id, self.snapshot_ids[0])
            for number in self.snapshot_ids:
                if number and image.snap_get_namespace_type(number) != USER_SNAPSHOT:
                    raise self.gone()  # to the trash
            layer = visible_layer(
                known.cluster, known.ioctx, image, self.snapshot_ids, self.name, True
            )
            # The former one is closed when the last request has let go of it.
            self.current = layer, (header, self.ancestors.headers)

    def gone(self) -> ExportError:
        return ExportError(f"image '{self.name}' has been removed while it was open")

    def fence(self) -> None:
        super().fence()
        self.current = FENCED, None

    def close(self) -> None:
        super().close()
        if not isinstance(self.current[0], Fenced):
            self.current[0].close()


USER_SNAPSHOT = rbd.RBD_SNAP_NAMESPACE_TYPE_USER  # not one of a mirror, group or the trash


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


# ---- encryption --------------------------------------------------------------


def visible_layer(
    cluster: rados.Rados,
    ioctx: rados.Ioctx,
    image: rbd.Image,
    snapshot_ids: tuple[int | None, int | None],
    name: str,
    read_only: bool,
) -> Layer:
    """Return what clients are to see of an image: the decrypted one, if it is encrypted."""
    if not CONFIG["encryption-format"]:
        return Layer(cluster, ioctx, image, *snapshot_ids)
    size = image.size()
    decrypt(image, name)
    begin = size - image.size()
    if begin < 0 or begin % image.stat()["obj_size"]:
        # librbd of Ceph 16 takes it, but loses the header of a clone at the first write.
        raise ExportError(f"librbd cannot decrypt image '{name}': {BAD_HEADER}")
    if not read_only:
        # What reads as zeroes reads as something else as soon as a neighbour is written.
        layer = Layer(cluster, ioctx, image, *snapshot_ids)
        layer.opaque = True
        return layer
    # Block status is about what is stored, which is seen by a handle of its own.
    stored = open_by_id(ioctx, image.id(), snapshot_ids[0])
    layer = Layer(cluster, ioctx, stored, *snapshot_ids)
    if stored.size() != size:
        layer.close()
        raise ExportError(f"image '{name}' has been resized while it was opened")
    layer.image = image
    layer.begin = begin
    # How the parent's data is mapped into a clone depends on the headers of both; and with
    # another header the same ciphertext is other data.
    layer.opaque = layer.opaque or stored.overlap() > 0
    if layer.base:
        former = layer.base.stored
        header = former.read(0, min(begin, former.size()))
        layer.opaque = layer.opaque or header != stored.read(0, begin)
    return layer


def keep_header(ioctx: rados.Ioctx, image: rbd.Image) -> None:
    """Give an encrypted clone a LUKS header of its own, if its parent has it.

    When another client asks the owner of the lock to flatten the clone, librbd before
    Ceph 17 leaves out what it takes for no data.
    """
    if image.overlap() and not hasattr(rbd.Image, "encryption_load2"):
        with rbd.Image(ioctx, image_id=image.id()) as stored:
            for place in range(0, stored.size() - image.size(), stored.stat()["obj_size"]):
                stored.write(stored.read(place, 1), place)


def decrypt(image: rbd.Image, name: str) -> None:
    """Load the encryption of an image (rbd_encryption_load, rbd_encryption_load2)."""
    header = image.read(0, min(16, image.size()))
    if header[:6] not in LUKS_MAGIC or not header[7:]:
        raise ExportError(f"image '{name}' is not encrypted: it has no LUKS header")
    found = f"luks{header[7]}"
    if found not in LUKS:
        raise ExportError(f"image '{name}' has an unknown encryption format, {found}")
    if found == "luks2" and is_reencrypted(image, int.from_bytes(header[8:], "big")):
        raise ExportError(f"image '{name}' is being reencrypted: cryptsetup must finish first")
    if image.stripe_count() > 1:
        raise ExportError(f"librbd cannot decrypt image '{name}': it is striped")
    first, *parents = CONFIG["encryption-format"]
    if first not in ("luks", found):
        raise ExportError(f"image '{name}' has the encryption format {found}, not {first}")
    # Ceph 16 must be told which version of LUKS it is.
    any_version = getattr(rbd, "RBD_ENCRYPTION_FORMAT_LUKS", LUKS[found])
    formats = [LUKS.get(wanted, any_version) for wanted in (first, *parents)]
    specs = list(zip(formats, CONFIG["passphrase-file"], strict=True))
    try:
        if parents:
            image.encryption_load2(specs)
        else:
            image.encryption_load(*specs[0])
    except rbd.PermissionError:
        raise ExportError(f"the passphrase for image '{name}' is wrong") from None
    except rbd.Error as error:
        if error.errno == errno.ESHUTDOWN:
            raise
        reason = {
            errno.ENOTSUP: "it has the feature journaling, or a cipher that librbd has not",
            errno.EINVAL: BAD_HEADER,
        }.get(error.errno, str(error))
        raise ExportError(f"librbd cannot decrypt image '{name}': {reason}") from None


def is_reencrypted(image: rbd.Image, header_size: int) -> bool:
    """Tell whether a LUKS2 image has a requirement, which librbd does not look for.

    LUKS2 On-Disk Format, 3.1 and 3.6: JSON after a binary header of 4096 bytes.
    """
    length = min(header_size, image.size(), 4 << 20) - 4096
    try:
        metadata = json.loads(image.read(4096, max(0, length)).split(b"\0")[0])
        return bool(metadata["config"].get("requirements"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # librbd will tell what is wrong


BAD_HEADER = (
    "its header is damaged or larger than the image, or its data does not begin at a multiple"
    " of the object size"
)

# At the begin of an image, and of a clone with a format of its own (librbd's Magic.cc).
LUKS_MAGIC = b"LUKS\xba\xbe", b"RBDL\xba\xbe"

LUKS = {
    "luks1": rbd.RBD_ENCRYPTION_FORMAT_LUKS1,
    "luks2": rbd.RBD_ENCRYPTION_FORMAT_LUKS2,
}


# ---- points in time, and new images ------------------------------------------


def is_point_in_time(spec: Spec) -> bool:
    return CONFIG["point-in-time"] and spec.snapshot is None


@contextlib.contextmanager
def point_in_time(cluster: rados.Rados, ioctx: rados.Ioctx, spec: Spec) -> Iterator[str]:
    """Take a snapshot, and remove it at the end.

    Its name tells the client of the cluster that made it, which has the image open for
    writing as long: while that client watches the image, the snapshot is in use.
    """
    with open_image(ioctx, spec._replace(base=None), read_only=False) as image:
        remove_left_overs(image)
        now = datetime.datetime.now(datetime.UTC)
        name = f"rbd_export-{now:%Y%m%dT%H%M%S.%fZ}-{HOST}-client{cluster.get_instance_id()}"
        try:
            image.create_snap(name)
        except rbd.Error as error:
            raise ExportError(f"cannot take a snapshot of image '{spec}': {error}") from None
        try:
            yield name
        finally:
            image.remove_snap(name)


# Without what has a meaning in an export name.
HOST = re.sub("[^A-Za-z0-9-]", "_", socket.gethostname())


def remove_left_overs(image: rbd.Image) -> None:
    """Remove the snapshots for points in time whose makers are gone.

    Snapshots first, then watchers: who takes one watches already.
    """
    made = [
        (snapshot["name"], match[1])
        for snapshot in image.list_snaps()
        if snapshot["namespace"] == USER_SNAPSHOT
        and (match := re.fullmatch(r"rbd_export-[0-9T.]+Z-.*-client(\d+)", snapshot["name"]))
    ]
    watching = {watcher["id"] for watcher in image.watchers_list()} if made else set()
    for name, client in made:
        if int(client) not in watching:
            try:
                image.remove_snap(name)
            except rbd.ImageNotFound:
                pass  # somebody else has
            except (rbd.ImageBusy, rbd.PermissionError) as error:
                log_error(f"the left-over snapshot '{name}' cannot be removed: {error}")


def create_image(cluster: rados.Rados, spec: Spec) -> None:
    """Make the image, with the options that Config.rados has set, if there is none."""
    wanted, pool = CONFIG["create"], CONFIG["data-pool"]
    if pool and not cluster.pool_exists(pool):
        raise ExportError(f"pool '{pool}' (data-pool) not found")
    with open_pool(cluster, spec) as ioctx:
        try:
            rbd.RBD().create(ioctx, spec.image, wanted, old_format=False)
        except rbd.ImageExists:
            with open_image(ioctx, spec, read_only=True) as image:
                if image.size() != wanted:
                    raise ExportError(
                        f"image '{spec}' exists with {image.size()} bytes,"
                        f" not the {wanted} of 'create'"
                    ) from None
        except rbd.Error as error:
            raise ExportError(f"cannot create image '{spec}': {error}") from None


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
            self.cluster = stack.enter_context(Cluster.use(spec, read_only))
            self.shared = stack.enter_context(self.cluster.open(spec, read_only))
            self.size = self.shared.layer.image.size()
            self.description = description(spec)
            self.served = spec, read_only
            self.cluster.served.add(self.served)
            self.close = stack.pop_all().close
        self.client = ""
        # By callback: requests that were done, and their bytes.  No thread switch can fall
        # into `+=` on them.
        self.done = {name: [0, 0] for name in REQUESTS}
        self.errors = 0

    def greet(self) -> None:
        """Say who has connected; only the thread of the connection knows."""
        self.client = f"client {next(CLIENTS)} ({peer()})"
        access = "read-only" if self.shared.read_only else "read-write"
        log_info(f"{self.client} connected: {self.shared.name}, {self.size} bytes, {access}")
        CONNECTED[self] = None

    def part(self) -> None:
        """Say what the client has done, once."""
        with PARTING:
            if CONNECTED.pop(self, self) is None:
                log_info(f"{self.client} gone: {self.tally()}")

    def tally(self) -> str:
        done = [
            f"{REQUESTS[name]} {count}" + (f" ({total} bytes)" if total else "")
            for name, (count, total) in self.done.items()
            if count
        ]
        failed = [f"failed {self.errors}"] if self.errors else []
        return ", ".join([*done, *failed]) or "no requests"

    def failed(self, error: BaseException) -> int:
        """Return the errno that the client gets for a failed request."""
        if isinstance(error, NotFast):
            return errno.ENOTSUP
        self.errors += 1
        if getattr(error, "errno", None) == errno.EROFS:
            # Only with a lock that is not handed over may librbd not write.
            self.tell_who_has_the_lock()
        number = getattr(error, "errno", None) or errno.EIO
        if isinstance(error, MemoryError):
            number = errno.ENOMEM
        if number == errno.ESHUTDOWN:
            self.cluster.fence()
        if number in (errno.EPERM, errno.EACCES):
            self.cluster.refused.add(self.served)
        return CLIENT_ERRNO.get(number, errno.EIO)

    def tell_who_has_the_lock(self) -> None:
        with contextlib.suppress(rbd.Error):
            for owner, _ in owners(self.shared.layer.image):
                tell_once(f"image '{self.shared.name}' is locked by {owner}")


FENCED = Fenced()

CLIENTS = itertools.count(1)
CONNECTED: dict[Handle, None] = {}
PARTING = threading.Lock()

# By their callbacks.
REQUESTS = {
    "pread": "read",
    "pwrite": "write",
    "flush": "flush",
    "trim": "trim",
    "zero": "zero",
    "extents": "block status",
}


def peer() -> str:
    """Return the address of the client, or its process, and its certificate's name."""
    if nbdkit_options().single:
        return "stdin"
    address, length = ctypes.create_string_buffer(128), ctypes.c_uint32(128)
    found = ["unknown"]
    if LIBC.nbdkit_peer_name(address, ctypes.byref(length)) == 0:
        (family,), (port,) = struct.unpack_from("=H", address), struct.unpack_from("!2xH", address)
        if family == socket.AF_INET:
            found = [f"{socket.inet_ntop(family, address.raw[4:8])}:{port}"]
        elif family == socket.AF_INET6:
            found = [f"[{socket.inet_ntop(family, address.raw[8:24])}]:{port}"]
        elif family == socket.AF_UNIX:
            LIBC.nbdkit_peer_pid.restype = ctypes.c_int64
            pid = LIBC.nbdkit_peer_pid()
            # Of a process in another namespace there is none.
            found = [f"process {pid}" if pid > 0 else "a process"]
    if hasattr(nbdkit, "peer_tls_dn") and (name := nbdkit.peer_tls_dn()):
        found.append(name)
    return ", ".join(found)


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


def is_non_primary(image: rbd.Image) -> bool:
    mirror = image.mirror_image_get_info()
    return mirror["state"] == rbd.RBD_MIRROR_IMAGE_ENABLED and not mirror["primary"]


def despite_fence(action: Callable[[], R]) -> R:
    """Do what a fence may interrupt for a client that has written nothing yet."""
    for _ in list(Cluster.all):
        # Each may have been fenced since it was last used, and is given up then; or its
        # key has got other capabilities.
        with contextlib.suppress(*SHUTDOWN, Outdated):
            return action()
    return action()


# What has taken too long, by its key.
LATE: dict[Any, concurrent.futures.Future[Any]] = {}


def in_time(key: Any, action: Callable[[], R], undo: Callable[[Any], None] = lambda _: None) -> R:
    """Return the result of what a client waits for, or fail after connect-timeout.

    An action that takes longer goes on, and is undone when it ends.  Until then others
    with the same key wait for it: clients that come again and again pile up nothing.
    """

    def work() -> None:
        try:
            answer.set_result(action())
        except BaseException as error:
            answer.set_exception(error)

    def forget(late: concurrent.futures.Future[R]) -> None:
        if LATE.get(key) is late:
            del LATE[key]
        if not late.exception():
            undo(late.result())

    # Connecting to the monitors has a limit of its own, and says more.
    deadline = time.monotonic() + CONFIG["connect-timeout"] + 1
    waiting = LATE.get(key)
    if not waiting or concurrent.futures.wait([waiting], deadline - time.monotonic()).done:
        answer: concurrent.futures.Future[R] = concurrent.futures.Future()
        threading.Thread(target=work, daemon=True).start()
        if concurrent.futures.wait([answer], deadline - time.monotonic()).done:
            return answer.result()
        LATE[key] = answer
        answer.add_done_callback(forget)
    raise ExportError(f"no answer within {CONFIG['connect-timeout']} s (connect-timeout)")


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
    return spec, read_only or CONFIG.is_read_only(spec, client)


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


def allowed_exports(client: str | None) -> list[tuple[str, str]]:
    """Return the names of all images that the client may have, with a description.

    No image is opened, which would take 10 ms for each, unless its snapshots are
    exported.
    """
    exports = {}
    with Cluster.use() as cluster:
        clone_of = functools.cache(functools.partial(parent_name, cluster, client))
        for pool in cluster.rados.list_pools():
            for namespace in namespaces(cluster, pool, client):
                try:
                    with open_pool(cluster.rados, Spec(pool, namespace, "")) as ioctx:
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
        open_pool(cluster.rados, Spec(pool, "", "")) as ioctx,
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
        Spec(pool, namespace, image["name"]): image["id"]
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
                if is_nameable(name) and ".." not in name and CONFIG.allows(snapshot, client):
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
            if snapshot["namespace"] == USER_SNAPSHOT
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
        with open_pool(cluster.rados, Spec(name, namespace, "")) as ioctx:
            parent = Spec(name, namespace, image_name(ioctx, image))
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
        if parameter.default not in (None, "", ()):
            default = {True: "yes", False: "no"}.get(parameter.default, parameter.default)
            print(f"rbd_export_default_{name.replace('-', '_')}={default}", flush=True)


def thread_model() -> int:
    """Tell nbdkit how many requests it may have under way on a connection.

    A gateway has clients that are not to harm each other.
    """
    parallel = CONFIG["parallel"]
    if parallel == "yes" or (parallel == "auto" and (CONFIG.spec or not is_affected())):
        return nbdkit.THREAD_MODEL_PARALLEL
    return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS


@functools.cache
def nbdkit_version() -> str:
    program = os.readlink("/proc/self/exe")
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return "".join(answer.stdout.split()[1:2])


def is_affected() -> bool:
    """Tell whether a client that hangs up with several requests under way does harm.

    nbdkit from 1.32.4 on aborts, or sends replies to another client (mended by upstream
    commit 9d82aa4f, in 1.33.10).
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", nbdkit_version())
    if not found:
        raise ExportError("the version of nbdkit is not known: give parallel=yes or parallel=no")
    return (1, 32, 4) <= tuple(map(int, found.groups())) < (1, 33, 10)


def config(key: str, value: str) -> None:
    CONFIG.set(key, value)


def config_complete() -> None:
    CONFIG.complete()


def get_ready() -> None:
    """Tell what is wrong while nbdkit has a terminal."""
    if CONFIG["probe"]:
        run_probe()
    nbdkit_version()  # asked before nbdkit may lose its rights; after_fork tells
    if CONFIG["parallel"] == "auto" and CONFIG.spec and is_affected():
        print(
            "nbdkit: warning: this nbdkit may abort, or send a reply to another client, when a"
            " client hangs up in mid-request: parallel=no avoids that but is slower,"
            " parallel=yes accepts it",
            file=sys.stderr,
            flush=True,
        )


def run_probe() -> None:
    """Try to open what is exported while a failure can still end nbdkit with a message.

    In a child process: librados' threads would not survive nbdkit's fork.
    """
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
            probe_image(CONFIG.spec)
        else:
            probe_exports()
        status = 0
    except Exception as error:
        os.write(writer, str(error).encode())
    finally:
        os._exit(status)


def probe_image(spec: Spec) -> None:
    with Cluster.use() as cluster, open_pool(cluster.rados, spec) as ioctx:
        if CONFIG["create"]:
            create_image(cluster.rados, spec)
        if is_point_in_time(spec):
            with open_image(ioctx, spec._replace(base=None), read_only=False) as image:
                remove_left_overs(image)
        # A key that may only read does not open it for writing.
        read_only = nbdkit_options().readonly or CONFIG.is_read_only(spec, None)
        with open_image(ioctx, spec, read_only) as image:
            if CONFIG["lock"] == "exclusive" and not read_only:
                look_for_lock(image, str(spec))
            kind = ReadOnlyImage if read_only else OpenImage
            kind(cluster.rados, ioctx, image, spec).close()


def probe_exports() -> None:
    """Look for the pools and namespaces that are named, and for the default export."""
    with Cluster.use() as cluster:
        for rule in CONFIG.rules:
            pool, namespace = literal(rule.pattern.pool), literal(rule.pattern.namespace)
            if rule.allow and pool is not None and namespace is not None:
                with open_pool(cluster.rados, Spec(pool, namespace, "")) as ioctx:
                    probe_pool(ioctx, pool, namespace)
    default = CONFIG["default-export"]
    if default and not CONFIG.for_each_client():
        probe_image(CONFIG.named(default))


def probe_pool(ioctx: rados.Ioctx, pool: str, namespace: str) -> None:
    with contextlib.suppress(rbd.PermissionError):  # a key may be for a namespace alone
        if namespace and not rbd.RBD().namespace_exists(ioctx, namespace):
            raise ExportError(f"namespace '{namespace}' not found in pool '{pool}'")
    try:
        rbd.RBD().list(ioctx)
    except UnicodeDecodeError:
        pass  # the list of exports tells
    except rbd.PermissionError:
        where = Spec(pool, namespace, "")
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
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # what compiling this file took
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=end_connections, args=(reader,), daemon=True).start()
    what = str(CONFIG.spec) if CONFIG.spec else " ".join(f"exports={e}" for e in CONFIG["exports"])
    librbd = ".".join(map(str, rbd.RBD().version()))
    log_info(
        f"rbd_export {__version__} serves {what} (nbdkit {nbdkit_version()}, librbd {librbd},"
        f" Python {sys.version.split()[0]})"
    )


# Seconds that the end of nbdkit may take after a signal.
GRACE = 4.5


def end_connections(signalled: int) -> NoReturn:
    """After a signal, let each client's requests finish and its connection end.

    While the cluster does not answer they would not: none of what they wait for has
    been acknowledged, nor was what was answered early (write-cache) flushed.
    """
    os.read(signalled, 1)
    nbdkit.shutdown()
    begin = time.monotonic()
    names: set[Any] = set()
    # Without a listening socket (nbdkit -s) there is one client, who ends it.
    while not names or time.monotonic() < begin + GRACE:
        # nbdkit reads an end of file, and answers what it has read before, unless the
        # client takes no answers.
        late = time.monotonic() > begin + GRACE / 2
        with contextlib.ExitStack() as stack:  # nbdkit may be accepting a client just now
            sockets = [stack.enter_context(s) for s in own_sockets()]
            names |= {name for s in sockets if is_listening(s) and (name := name_of(s))}
            for s in sockets:
                if not is_listening(s) and name_of(s) in names:
                    with contextlib.suppress(OSError):
                        s.shutdown(socket.SHUT_RDWR if late else socket.SHUT_RD)
        time.sleep(0.1)
    log_error("ends although the cluster has not answered all requests")
    os._exit(1)


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
        client = common_name()
        exports = in_time(client, lambda: despite_fence(lambda: allowed_exports(client)))
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


# Where a thread of nbdkit had an image open before, for the same client: the retry
# filter closes and opens again when a request has failed, and sends it again.
SERVED: dict[int, Cluster] = {}


def preconnect(readonly: bool) -> None:
    """A new client: forget whom this thread has served, and threads that have ended."""
    for thread in list(SERVED):
        if thread == threading.get_native_id() or not os.path.exists(f"/proc/self/task/{thread}"):
            SERVED.pop(thread, None)


def open_again(former: Cluster, spec: Spec, read_only: bool) -> Handle:
    """Open for a client that may have sent writes before, unless it was fenced since."""
    with contextlib.suppress(*SHUTDOWN):
        if former in Cluster.all:
            handle = Handle(spec, read_only)
            if handle.cluster is former:
                return handle
            handle.close()
    raise ExportError("the client may have been fenced: it must reconnect")


def open(readonly: bool) -> Handle | None:
    """Return a handle, or None if there is nothing to serve.

    An exception here would be logged with this script's path in front; the retry
    filter needs one.
    """
    former = SERVED.get(threading.get_native_id())
    try:
        spec, read_only = requested(readonly)

        def opened() -> Handle:
            if former:
                return open_again(former, spec, read_only)
            return despite_fence(lambda: Handle(spec, read_only))

        handle = in_time((spec, read_only), opened, lambda handle: handle.close())
        handle.greet()
        return handle
    except Exception as error:
        if former:
            raise
        log_error(error_text(error))
        return None


def error_text(error: Exception) -> str:
    return str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"


# Whether nbdkit has gone to the background is seen by this.
FIRST_PROCESS = os.getpid()


@functools.cache
def nbdkit_options() -> argparse.Namespace:
    """Return what a plugin is not told of nbdkit's command line."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--filter", action="append", default=[])
    parser.add_argument("--log", default="default")
    parser.add_argument("--run")
    parser.add_argument("-r", "--readonly", "--read-only", action="store_true")
    parser.add_argument("-s", "--single", "--stdin", action="store_true")
    # These may stand in one word with the others.
    for flag in "46fnovV":
        parser.add_argument(f"-{flag}", action="store_true")
    for option in "DegiPptuU":
        parser.add_argument(f"-{option}", action="append")
    with open_file("/proc/self/cmdline", "rb") as file:
        words = os.fsdecode(file.read()).split("\0")[1:]
    try:
        return parser.parse_known_args(words)[0]
    except argparse.ArgumentError:
        return parser.parse_args([])


def opens_again() -> bool:
    """Tell whether a filter opens the image again when a request has failed.

    The image is closed for that, and what fails to land then is lost, but the flush that
    is sent again could not know it.
    """
    return any(re.search("(^|-)retry(-filter|$)", name) for name in nbdkit_options().filter)


@functools.cache
def info_log() -> Callable[[str], object]:
    """Return what writes a line where nbdkit logs its errors; it has no level below these.

    Nobody waits for the log of an nbdkit that runs for one command (--run).
    """
    log, in_background = nbdkit_options().log, os.getpid() != FIRST_PROCESS
    if nbdkit_options().run is not None or log == "null":
        return lambda _: None
    if log == "syslog" or (log == "default" and in_background):
        syslog.openlog("nbdkit", syslog.LOG_PID, syslog.LOG_DAEMON)
        return functools.partial(syslog.syslog, syslog.LOG_INFO)
    return lambda text: print(f"nbdkit: info: {text}\n", end="", file=sys.stderr, flush=True)


def log_info(text: str) -> None:
    with contextlib.suppress(OSError):  # a pipe that nobody reads
        info_log()(printable(text))


def log_error(text: str) -> None:
    """Log a line that the client is not to see.

    nbdkit since 1.42 sends a client what the thread that serves it has logged
    last (threadlocal_get_last_error); so another thread logs it.
    """
    line = printable(text).encode()
    log = threading.Thread(target=LIBC.nbdkit_error, args=(b"%s", line))
    log.start()
    log.join()


def close(h: Handle | None) -> None:
    if h:
        if h.errors:
            SERVED[threading.get_native_id()] = h.cluster
        h.close()
        h.part()


def cleanup() -> None:
    Cluster.end()
    # A thread that nbdkit has counted as ended may still have its state to release.
    end = time.monotonic() + 1
    while KEPT[0] and time.monotonic() < end:
        time.sleep(0.01)
    # nbdkit does not wait for connections to close after a signal.
    for handle in list(CONNECTED):
        handle.part()
    with PARTING:
        log_info("rbd_export ends")


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
    # librbd frees nothing of an encrypted image, but writes encrypted zeroes
    # (CryptoObjectDispatch::discard).
    return not CONFIG["encryption-format"]


def can_zero(h: Handle) -> bool:
    return True


def can_fast_zero(h: Handle) -> bool:
    return True


def can_fua(h: Handle) -> int:
    return h.shared.can_fua


def can_extents(h: Handle) -> bool:
    return CONFIG["extents"] != "off"


def can_multi_conn(h: Handle) -> bool:
    return True


def can_cache(h: Handle) -> int:
    return h.shared.can_cache


def is_rotational(h: Handle) -> bool:
    return False


# ---- data --------------------------------------------------------------------

# LIBRADOS_OP_FLAG_FADVISE_FUA, which the Python module does not export.
FADVISE_FUA = 0x80


# Whether this thread's state has been looked after; the mark goes with the state.
THREAD = threading.local()

# How many are kept.
KEPT = [0]


def keep_thread_state() -> None:
    """Keep the Python state of this thread until the thread ends.

    nbdkit enters Python by PyGILState_Ensure, which makes a state for the thread, and
    leaves it by PyGILState_Release, which frees it: for each request.  One more Ensure
    keeps it.  Its Release must come from the thread itself, at its end: from a destructor
    of glibc's, since those of pthread keys run when CPython's own key may be gone.  The
    main thread, which serves the one client of `nbdkit -s`, would end after Python.
    """
    if not hasattr(THREAD, "seen"):
        THREAD.seen = True
        if AT_THREAD_EXIT and threading.get_native_id() != os.getpid():
            KEPT[0] += 1
            ctypes.pythonapi.PyGILState_Ensure()
            AT_THREAD_EXIT(RELEASE, None, RELEASE_BELONGS_TO)


def release_thread_state(_: Any) -> None:
    KEPT[0] -= 1
    ctypes.pythonapi.PyGILState_Release(0)  # the callback's own makes it the last one


AT_THREAD_EXIT = getattr(LIBC, "__cxa_thread_atexit_impl", None)  # glibc's
RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(release_thread_state)
# To what is never unloaded.
RELEASE_BELONGS_TO = LIBC.malloc


def request(size: Callable[[Any], int]) -> Callable[..., Any]:
    """Count a request, or give the client an errno that NBD has; nbdkit logs the exception."""

    def decorator(callback: Callable[..., Any]) -> Callable[..., Any]:
        name = callback.__name__

        @functools.wraps(callback)
        def wrapper(h: Handle, *args: Any) -> Any:
            keep_thread_state()
            try:
                result = callback(h, *args)
            except BaseException as error:
                nbdkit.set_error(h.failed(error))
                raise
            done = h.done[name]
            done[0] += 1
            done[1] += size(args[0])
            return result

        return wrapper

    return decorator


def pieces(offset: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut a range into pieces that librbd takes: it fails from 2 GiB on.

    Cuts fall between discard granules, since a granule in two parts is not freed.
    """
    end = offset + count
    while offset < end:
        stop = min(offset - offset % GIB + GIB, end)
        yield offset, stop - offset
        offset = stop


@request(len)
def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    count = len(buf)
    # Raises when librbd read less, as it does past the end of a shrunk image.
    buf[:] = h.shared.look(offset, count, lambda layer: layer.image.read(offset, count))


@request(len)
def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    data, fua = bytes(buf), flags & nbdkit.FLAG_FUA
    if h.shared.answers_early and not fua:
        h.shared.write_early(data, offset)
    else:
        fadvise = FADVISE_FUA if fua else 0
        h.shared.change(offset, len(data), lambda image: image.write(data, offset, fadvise))


@request(lambda flags: 0)
def flush(h: Handle, flags: int) -> None:
    h.shared.flush()


@request(int)
def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    """Free the space of whole discard granules; data elsewhere may stay."""

    def discard(image: rbd.Image) -> None:
        for start, length in pieces(offset, count):
            image.discard(start, length)
        if flags & nbdkit.FLAG_FUA:
            image.flush()

    h.shared.change(offset, count, discard)


@request(int)
def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    """Zero a range, and free its space if MAY_TRIM says so.

    Keeping the space means writing zeroes, which is what a client that asks for
    FAST_ZERO would do itself.
    """
    zero_flags = 0 if flags & nbdkit.FLAG_MAY_TRIM else rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION
    if flags & nbdkit.FLAG_FAST_ZERO and (zero_flags or CONFIG["encryption-format"]):
        raise NotFast

    def write_zeroes(image: rbd.Image) -> None:
        for start, length in pieces(offset, count):
            image.write_zeroes(start, length, zero_flags)
        if flags & nbdkit.FLAG_FUA:
            image.flush()

    h.shared.change(offset, count, write_zeroes)


@request(int)
def extents(h: Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Say where data may be, and what is known of the rest (NBD's base:allocation).

    With REQ_ONE a client uses the first extent only, and asks again behind it.
    """
    end = offset + count
    one = bool(flags & nbdkit.FLAG_REQ_ONE)

    def look(layer: Layer) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        for start, stop, kind in layer.status(offset + layer.begin, end + layer.begin, one):
            start, stop = max(start - layer.begin, offset), min(stop - layer.begin, end)
            if start >= stop:
                continue
            if found and found[-1][2] == kind:
                found[-1] = found[-1][0], stop - found[-1][0], kind
            elif one and found:
                break
            else:
                found.append((start, stop - start, kind))
        return found

    return h.shared.look(offset, count, look)


# ---- where data may be -------------------------------------------------------

# qemu-img takes what begins in a sector of 512 bytes for all of it, and other clients
# have larger ones: no extent ends within a block of this many bytes.
BLOCK = 4096

DATA = 0
HOLE = nbdkit.EXTENT_HOLE
ZERO = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO

# Start and stop in bytes; in order and disjoint, unless it says otherwise.
Ranges = list[tuple[int, int]]


def combine(wanted: Callable[..., bool], *several: Ranges) -> Ranges:
    """Return where `wanted` holds, told for each of several whether the place is in it.

    They may be in any order and overlap.
    """
    edges = sorted(
        (place, number, step)
        for number, ranges in enumerate(several)
        for start, stop in ranges
        for place, step in ((start, 1), (stop, -1))
    )
    result: Ranges = []
    depth = [0] * len(several)
    began = None
    for place, group in itertools.groupby(edges, key=operator.itemgetter(0)):
        for _, number, step in group:
            depth[number] += step
        inside = wanted(*map(bool, depth))
        if inside and began is None:
            began = place
        elif not inside and began is not None:
            result.append((began, place))
            began = None
    return result


def union(*several: Ranges) -> Ranges:
    return combine(lambda *inside: any(inside), *several)


def difference(ranges: Ranges, other: Ranges) -> Ranges:
    return combine(lambda a, b: a and not b, ranges, other)


def intersection(ranges: Ranges, other: Ranges) -> Ranges:
    return combine(lambda a, b: a and b, ranges, other)


def within(ranges: Ranges, low: int, high: int) -> Ranges:
    first = bisect.bisect_right(ranges, low, key=operator.itemgetter(1))
    last = bisect.bisect_left(ranges, high, key=operator.itemgetter(0))
    return [(max(start, low), min(stop, high)) for start, stop in ranges[first:last]]


def outward(ranges: Ranges, unit: int) -> Ranges:
    return union([(start - start % unit, stop + -stop % unit) for start, stop in ranges])


def growing(low: int, high: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut a range at multiples of the unit, into ever longer pieces."""
    count = 1
    while low < high:
        stop = min(low - low % unit + count * unit, high)
        yield low, stop
        low, count = stop, count * 8


class Layer:
    """An image, or a snapshot of one, as block status looks at it: without its parent.

    The parent of a clone is a layer of its own below it.  librbd's diff_iterate would
    look there too (include_parent), but it takes an error from there for a hole
    (ObjectListSnapsRequest::handle_list_from_parent).

    An answer takes two steps.  The object map tells which objects exist at all, in one
    request; without one that can be trusted, all are candidates.  Then librbd looks into
    the candidates (list_snaps of each object).

    With a base, an earlier snapshot of the same image, the answer is what has changed
    since then.
    """

    def __init__(
        self,
        cluster: rados.Rados,
        ioctx: rados.Ioctx,
        image: rbd.Image,
        snapshot_id: int | None,
        base_id: int | None = None,
    ) -> None:
        self.cluster = cluster
        self.ioctx = ioctx
        # What clients read and write, from where on that is stored, and what is stored:
        # these differ for an image that is encrypted.
        self.image = self.stored = image
        self.begin = 0
        self.image_id = image.id()
        self.snapshot_id = snapshot_id
        self.base: Layer | None = None
        self.since: str | None = None
        if base_id is not None:
            snapshot = open_by_id(ioctx, self.image_id, base_id)
            self.base = Layer(cluster, ioctx, snapshot, base_id)
            self.since = image.snap_get_name(base_id)
        # With striping the objects of a period share its bytes; a period is what
        # diff_iterate looks at in one piece.
        self.striped = image.stripe_count() > 1
        self.period = image.stat()["obj_size"] * image.stripe_count()
        # Whose data comes from a place that librbd does not tell of.
        self.opaque = bool(image.features() & rbd.RBD_FEATURE_MIGRATING)
        self.lock = threading.Lock()
        self.inherits: tuple[int, bytes] | None = None
        self.below: tuple[bytes, Layer] | None = None
        # Whether all that was acknowledged is in the cluster: librbd caches no writes.
        self.settled = True
        # Which objects there are is known until the object map changes.  A snapshot does
        # not change at all: what is in its objects stays known too, by number of period.
        self.objects_known: dict[str | None, KnownObjects] = {}
        self.known: dict[tuple[str | None, int], Ranges] = {}
        self.maps = ObjectMaps(ioctx.dup(), self.image_id)

    def close(self) -> None:
        for layer in (self.base, self.below and self.below[1]):
            if layer:
                layer.close()
        self.stored.close()
        self.image.close()

    def status(self, offset: int, limit: int, one: bool) -> Iterator[tuple[int, int, int]]:
        """Yield start, stop and kind of adjoining extents that cover a range, and its blocks.

        If one will do: no more than the first of them, in several pieces, is certain.
        """
        low, high = offset - offset % BLOCK, limit + -limit % BLOCK
        size = self.stored.size()
        # If the image has shrunk, what is no longer there is for reads to report.
        end = min(high, size) if limit <= size else size - size % BLOCK
        unlisted = HOLE if self.base else ZERO
        position = low
        # The end of the base, or of what comes from a parent, may lie within a block.
        candidates = within(outward(self.candidates(low, end), BLOCK), low, end)
        for first, last in [*candidates, (end, end)]:
            if position < first:
                yield position, first, unlisted
                if one:
                    return
            for start, stop in growing(first, last, self.period):
                existing = self.existing(start, stop)
                present = outward(existing, BLOCK)
                touched = outward(self.changed(start, stop, existing), BLOCK)
                kinds = (
                    (DATA, intersection(touched, present)),
                    (ZERO, difference(touched, present)),
                    (HOLE, difference([(start, stop)], touched)),
                )
                yield from sorted(
                    (a, b, kind) for kind, ranges in kinds for a, b in within(ranges, start, stop)
                )
            position = last
        if end < high:
            yield max(low, end), high, DATA

    def candidates(self, low: int, high: int) -> Ranges:
        """Return where the status may be anything but that of all the rest."""
        if not self.base or self.opaque or low >= high:
            return self.present(low, high)
        overlap, size = self.stored.overlap(), self.base.stored.size()
        objects = self.objects(low, high, self.since)
        if objects is None:
            # What has changed exists now, or did then.
            objects = self.present(low, high) + self.base.present(low, min(high, size))
        # A clone that shrank has lost more of its parent, without a trace in the object
        # maps; and what an image has grown by since then was nothing.
        lost = overlap, max(overlap, self.base.stored.overlap())
        return within(union(objects, [lost, (size, max(size, high))]), low, high)

    def present(self, low: int, high: int) -> Ranges:
        """Return where objects are, of this layer or of one below."""
        if low >= high or self.opaque:
            return [(low, high)] if low < high else []
        objects = self.objects(low, high, None)
        if objects is None:
            return [(low, high)]
        return union(
            objects, self.inherited(lambda overlap: [(low, min(high, overlap))], Layer.present)
        )

    def existing(self, low: int, high: int) -> Ranges:
        """Return where data may be: what is written, here or in a layer below."""
        if self.opaque:
            return [(low, high)]
        own: Ranges = []

        def below(overlap: int) -> Ranges:
            nonlocal own
            own = self.listed(low, high, None)
            # An object hides all of the parent below it.
            hidden = own if self.striped else outward(own, self.period)
            return difference([(low, max(low, min(high, overlap)))], hidden)

        inherited = self.inherited(below, Layer.written)
        return within(union(own, inherited), low, high)

    def written(self, low: int, high: int) -> Ranges:
        return union(*(self.existing(*candidate) for candidate in self.present(low, high)))

    def inherited(
        self, where: Callable[[int], Ranges], ask: Callable[[Layer, int, int], Ranges]
    ) -> Ranges:
        """Return what the layer below says of some ranges, which depend on the overlap."""
        while True:
            overlap, encoding = inheritance = self.inheritance()
            try:
                found = [
                    ask(self.parent(encoding), *run) for run in where(overlap) if run[0] < overlap
                ]
            except Exception:
                if self.inheritance() == inheritance:
                    raise
                continue
            # The clone may have been flattened meanwhile, and its parent be gone.
            if self.inheritance() == inheritance:
                return union(*found)

    def changed(self, low: int, high: int, existing: Ranges) -> Ranges:
        """Return where the content may differ from that of the base."""
        if not self.base or self.opaque:
            return [(low, high)]
        size = self.base.stored.size()
        before = self.base.written(low, min(high, size))
        touched = [*self.listed(low, high, self.since), (size, max(high, size))]
        # librbd does not tell of all that went, nor of all that came.
        return within(
            combine(lambda was, now, new: new or was != now, before, existing, touched), low, high
        )

    def inheritance(self) -> tuple[int, bytes]:
        """Return the number of bytes that come from the parent, and what the header says of it.

        librbd would tell who the parent is, but look for it in the trash each time.
        """
        if self.inherits is None or self.snapshot_id is None:
            overlap = self.stored.overlap()
            header = ask_header(self.ioctx, self.image_id, ["parent"])() if overlap else {}
            self.inherits = overlap, header.get("parent", b"")
        return self.inherits

    def parent(self, encoding: bytes) -> Layer:
        with self.lock:
            if self.below is None or self.below[0] != encoding:
                parent = parent_of(encoding)
                if not parent:
                    raise ExportError(f"the header of image {self.image_id} names no parent")
                pool, namespace, image_id, snapshot_id = parent
                ioctx = pool_by_id(self.cluster, pool, namespace)
                image = open_by_id(ioctx, image_id, snapshot_id)
                self.below = encoding, Layer(self.cluster, ioctx, image, snapshot_id)
            return self.below[1]

    def objects(self, low: int, high: int, since: str | None) -> Ranges | None:
        """Return the objects that exist, or have changed, by the object maps.

        None if these cannot be trusted.
        """
        if self.striped or (since and self.snapshot_id is None):
            return None
        known = self.objects_known.get(since, UNKNOWN)
        covers = known.low <= low and high <= known.high
        if covers and self.snapshot_id is not None:
            return within(known.found, low, high)
        snapshots = [self.snapshot_id] if since is None else self.snapshots_since(since)
        state = self.maps.state(snapshots)
        same = state is not None and state == known.state
        if covers and same and self.settled:
            return within(known.found, low, high)
        # The longer nothing changes, the further it pays to look ahead.
        ahead = max(
            AHEAD * self.period, 2 * (known.high - known.low) if same and self.settled else 0
        )
        for _ in range(3):
            if state is None:
                return None
            stop = min(max(high, low + ahead), max(high, self.stored.size()))
            found = self.diff(low, stop, since, whole_object=True)
            before, state = state, self.maps.state(snapshots)
            if state and state.header == before.header:
                # Good until the maps are no longer what they were before.
                self.objects_known[since] = KnownObjects(before, low, stop, found)
                return within(found, low, high)
        return None

    def snapshots_since(self, since: str) -> list[int | None]:
        first, last = self.stored.snap_get_id(since), self.snapshot_id
        numbers = sorted(snapshot["id"] for snapshot in self.stored.list_snaps())
        return [number for number in numbers if first <= number <= last]

    def listed(self, low: int, high: int, since: str | None) -> Ranges:
        """Return what is written in whole periods, or has been touched since then."""
        if CONFIG["extents"] == "objects" or CONFIG["encryption-format"]:
            objects = self.objects(low, high, since)
            if objects is not None:
                return objects
        if self.snapshot_id is None:
            return self.look(low, high, since)
        periods = range(low // self.period, -(-high // self.period))
        # Others add to it meanwhile, or clear it.
        known = {
            key: found
            for key in ((since, number) for number in periods)
            if (found := self.known.get(key)) is not None
        }
        unknown = [
            (number * self.period, (number + 1) * self.period)
            for number in periods
            if (since, number) not in known
        ]
        for first, last in union(unknown):
            found = self.look(first, last, since)
            for start in range(first, last, self.period):
                known[since, start // self.period] = within(found, start, start + self.period)
        if len(self.known) > MAX_KNOWN:
            self.known.clear()
        self.known.update(known)
        return union(*(known[since, number] for number in periods))

    def look(self, low: int, high: int, since: str | None) -> Ranges:
        found = self.diff(low, high, since, whole_object=False)
        if CONFIG["encryption-format"]:
            # librbd decrypts the nothing in between, too: only an object that does not
            # exist reads as zeroes (CryptoInterface::decrypt_aligned_extent).
            return outward(found, self.period)
        if not self.striped:
            return found
        # Of several objects in one piece, librbd forgets the error of one if another
        # has answered (C_DiffObject::finish): ask again for each by itself.
        unit = self.stored.stripe_unit()
        return union(
            *(
                self.diff(start, start + unit, since, whole_object=False)
                for first, last in outward(found, self.period)
                for start in range(first, last, unit)
            )
        )

    def diff(self, low: int, high: int, since: str | None, whole_object: bool) -> Ranges:
        """Return what librbd's diff_iterate tells of whole objects.

        Since a snapshot: what it tells of at all.
        """
        found: Ranges = []

        def add(offset: int, length: int, exists: bool) -> None:
            if exists or since is not None:
                if found and found[-1][1] == offset:
                    found[-1] = found[-1][0], offset + length
                else:
                    found.append((offset, offset + length))

        if not self.striped:
            low, high = low - low % self.period, high + -high % self.period
        high = min(high, self.stored.size())
        if low < high:  # librbd 16.2 aborts on an empty range
            self.stored.diff_iterate(low, high - low, since, add, False, whole_object)
        return union(found)


# Objects of which the map is asked at least: librbd reads all of it each time, but takes
# a microsecond for each that exists.
AHEAD = 1024

# Periods of a snapshot about which an open image remembers what it has learned: 64 GiB
# of data in objects of 4 MiB, and a few megabytes of memory.
MAX_KNOWN = 16384


class MapState(NamedTuple):
    """The same header: the maps were valid in between.  The same head: unchanged, too."""

    header: Any
    head: int | None


class KnownObjects(NamedTuple):
    state: MapState | None
    low: int
    high: int
    found: Ranges


UNKNOWN = KnownObjects(None, 0, 0, [])


class ObjectMaps:
    """The object maps of an image and its snapshots: whether they can be trusted.

    Their flags stand in the header.  librbd does not hear of changes to the header of
    an image that is open read-only, and takes a map that is missing between two
    snapshots for one without changes.
    """

    def __init__(self, ioctx: rados.Ioctx, image_id: str) -> None:
        self.ioctx = ioctx  # for nothing else: it remembers the version of what it read
        self.image_id = image_id
        self.lock = threading.Lock()

    def state(self, snapshots: list[int | None]) -> MapState | None:
        """Return what tells one state of valid maps from another, or None."""
        header = f"rbd_header.{self.image_id}"
        try:
            with self.lock, rados.ReadOpCtx() as operation:
                found, _ = self.ioctx.get_omap_vals_by_keys(operation, ("features", "flags"))
                self.ioctx.operate_read_op(operation, header)
                version = self.ioctx.get_last_version()
                values = dict(found)
                if not decoded(values["features"], "Q")[0] & rbd.RBD_FEATURE_FAST_DIFF:
                    tell_once(f"image {self.image_id} has no fast-diff: {SLOW}")
                    return None
                flags = [values.get("flags", b"")] if None in snapshots else []
                for number in filter(None, snapshots):
                    argument = struct.pack("<Q", number)
                    flags.append(self.ioctx.execute(header, "rbd", "get_flags", argument)[1])
                    if len(snapshots) > 1:
                        # A map goes before the header changes.  librbd takes no notice
                        # if it is one in between.
                        self.ioctx.stat(f"rbd_object_map.{self.image_id}.{number:016x}")
                if any(map(any, flags)):
                    tell_once(f"an object map of image {self.image_id} is invalid: {SLOW}")
                    return None
                head = None
                if None in snapshots:
                    # It changes before an object comes into being.
                    self.ioctx.stat(f"rbd_object_map.{self.image_id}")
                    head = self.ioctx.get_last_version()
        except rados.ObjectNotFound:
            return None
        return MapState((version, values), head)


SLOW = "block status has to look into each of its objects"


@functools.cache
def tell_once(text: str) -> None:
    log_error(text)


def open_by_id(ioctx: rados.Ioctx, image_id: str, snapshot_id: int | None) -> rbd.Image:
    image = rbd.Image(ioctx, image_id=image_id, read_only=True)
    if snapshot_id is not None:
        image.set_snap_by_id(snapshot_id)
    return image


def pool_by_id(cluster: rados.Rados, pool: int, namespace: str) -> rados.Ioctx:
    ioctx = cluster.open_ioctx2(pool)
    ioctx.set_namespace(namespace)
    return ioctx
