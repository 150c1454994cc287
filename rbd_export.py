#!/usr/bin/env -S nbdkit python
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""Serve a Ceph RBD image over NBD: an nbdkit plugin.

    nbdkit python rbd_export.py pool=rbd image=vm1

Read from top to bottom: parameters, the cluster and its open images, one
connection (its handle), then the callbacks in the order in which nbdkit calls
them.  Needs nbdkit's Python plugin and Ceph's python3-rados and python3-rbd.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import errno
import functools
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

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


class ExportError(Exception):
    """What a user can put right, in one line.

    From `open` the text also goes to the NBD client, so there it never holds a
    path, a host or a key.
    """

    def __init__(self, text: str) -> None:
        # nbdkit crashes on text that is not valid UTF-8, as a path may be.
        super().__init__(text.encode("utf-8", "backslashreplace").decode())


# ---- parameters --------------------------------------------------------------


def any_text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


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


def yes_or_no(value: str) -> bool:
    try:
        return {"yes": True, "no": False}[value]
    except KeyError:
        raise ValueError(f"'{value}' is neither 'yes' nor 'no'") from None


class Parameter(NamedTuple):
    default: Any
    parse: Callable[[str], Any]
    help: str


# Every parameter.  `config`, --dump-plugin and the test of the README use this.
PARAMETERS = {
    "pool": Parameter("rbd", any_text, "pool of the image"),
    "namespace": Parameter("", any_text, "namespace in the pool"),
    "image": Parameter(None, any_text, "image: a name or [pool/[namespace/]]image[@snapshot]"),
    "snapshot": Parameter(None, any_text, "snapshot of the image, served read-only"),
    "conf": Parameter(None, readable_file, "ceph.conf instead of the one that Ceph finds"),
    "id": Parameter("admin", any_text, "Ceph user: ID of client.ID"),
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

    @classmethod
    def parse(cls, text: str) -> dict[str, str]:
        """Split `[pool/[namespace/]]image[@snapshot]` into the parts that it has."""
        path, at, snapshot = text.partition("@")
        names = path.split("/")
        if len(names) > 3 or "@" in snapshot or not all(names) or (at and not snapshot):
            raise ExportError(
                f"malformed image '{text}': it must be [pool/[namespace/]]image[@snapshot]"
            )
        parts = {"image": names.pop()}
        parts.update(zip(("pool", "namespace"), names, strict=False))
        return parts | ({"snapshot": snapshot} if at else {})


class Config:
    """What the command line says."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.ceph: dict[str, str] = {}
        self.spec: Spec

    def set(self, key: str, value: str) -> None:
        name, option = key.replace("_", "-"), ""
        if name.startswith("ceph."):
            name, option = "ceph.OPTION", key[len("ceph.") :].replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in PARAMETERS or (option == "") == (name == "ceph.OPTION"):
            known = difflib.get_close_matches(name, [*PARAMETERS, *ALIASES], n=1)
            hint = f"; did you mean '{known[0]}'?" if known else ""
            raise ExportError(f"unknown parameter '{key}'{hint}")
        if option in self.ceph or name in self.given:
            raise ExportError(f"parameter '{key}' is given twice")
        if option:
            self.ceph[option] = value
            return
        try:
            self.given[name] = PARAMETERS[name].parse(value)
        except ValueError as error:
            raise ExportError(f"parameter '{key}': {error}") from None

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, PARAMETERS[name].default)

    def complete(self) -> None:
        if "image" not in self.given:
            raise ExportError("parameter 'image' is missing: image=NAME says what to serve")
        image = self.given.pop("image")
        for name, part in Spec.parse(image).items():
            if self.given.setdefault(name, part) != part:
                raise ExportError(
                    f"'image={image}' contradicts '{name}={self[name]}': leave one of them out"
                )
        self.spec = Spec(self["pool"], self["namespace"], self["image"], self["snapshot"])
        if "conf" not in self.given and os.environ.get("CEPH_CONF"):
            self.set("conf", os.environ["CEPH_CONF"])
        try:
            self.rados()
        except ExportError as error:
            raise ExportError(f"{error} ({self.where()})") from None

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

    Connecting is what takes long, so all images share one connection.  It is
    kept until nbdkit ends, or until the cluster fences it.  Fencing
    (blocklisting) hits a connection as a whole and for good: who opens an image
    afterwards gets a new connection, and who had one open stays refused, since
    somebody else may own the image by now.
    """

    current: Cluster | None = None
    connecting = threading.Lock()

    def __init__(self, connection: rados.Rados) -> None:
        self.rados = connection
        self.fenced = False
        self.users = 0
        self.images: dict[tuple[Any, ...], OpenImage] = {}
        self.changed = threading.Condition()

    @classmethod
    @contextlib.contextmanager
    def use(cls) -> Iterator[Cluster]:
        """Give the current connection, made now if there is none."""
        with cls.connecting:
            if cls.current is None or cls.current.fenced:
                cls.current = cls(connected_rados())
            self = cls.current
            self.users += 1
        try:
            yield self
        except rbd.ConnectionShutdown:
            self.fence()
            raise
        finally:
            with cls.connecting:
                self.users -= 1
                unused = self.fenced and not self.users
                if unused and self is cls.current:
                    cls.current = None
            if unused:
                self.rados.shutdown()

    def fence(self) -> None:
        """Refuse whatever the clients of this connection still ask for."""
        self.fenced = True
        with self.changed:
            for shared in self.images.values():
                shared.image = FENCED

    @classmethod
    def disconnect(cls) -> None:
        """Close what is still open, at the end of nbdkit.

        nbdkit does not call `close` for the clients that a signal cut off, and
        librbd may hold writes that it has acknowledged.
        """
        if cls.current:
            with contextlib.ExitStack() as stack:
                stack.callback(cls.current.rados.shutdown)
                for shared in cls.current.images.values():
                    stack.push(shared.resources)

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
            found = OpenImage(image, spec, read_only)
            with self.changed:
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


def connected_rados() -> rados.Rados:
    cluster = CONFIG.rados()
    try:
        return cluster.__enter__()
    except rados.Error as error:
        no_monitors = not cluster.conf_get("mon_host")
        cluster.shutdown()
        if no_monitors:
            reason = "no monitor address is known: neither ceph.conf nor ceph.mon_host= has one"
        elif isinstance(error, rados.TimedOut):
            reason = f"no monitor answered within {CONFIG['connect-timeout']} s (connect-timeout)"
        elif error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
            # Which of these it is depends on the release of Ceph.
            reason = "unknown user, or its key is missing or wrong"
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
        hint = "" if read_only else "; with a read-only key, start nbdkit with -r"
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

    def __init__(self, image: rbd.Image, spec: Spec, read_only: bool) -> None:
        self.image = image
        self.read_only = read_only
        self.resources = contextlib.ExitStack()
        self.users = 0
        # The object map says which objects exist.  It says so of this image alone,
        # not of a parent; its layout is right only without striping; and an
        # image that is open read-only never hears that the map became invalid.
        self.has_object_map = (
            bool(image.features() & rbd.RBD_FEATURE_FAST_DIFF)
            and image.stripe_count() == 1
            and not has_parent(image)
            and (not read_only or spec.snapshot is not None)
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
            self.cluster = stack.enter_context(Cluster.use())
            read_only = read_only or spec.snapshot is not None
            self.shared = stack.enter_context(self.cluster.open(spec, read_only))
            self.size = self.shared.image.size()
            self.description = f"RBD image {spec}"
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


def has_parent(image: rbd.Image) -> bool:
    try:
        image.parent_id()
    except rbd.ImageNotFound:
        return False
    return True


def is_non_primary(image: rbd.Image) -> bool:
    mirror = image.mirror_image_get_info()
    return mirror["state"] == rbd.RBD_MIRROR_IMAGE_ENABLED and not mirror["primary"]


def open_handle(read_only: bool) -> Handle:
    try:
        return Handle(CONFIG.spec, read_only)
    except rbd.ConnectionShutdown:
        # Fenced since it was last used: this client has written nothing yet.
        return Handle(CONFIG.spec, read_only)


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
    """Try to open the image while a failure can still end nbdkit with a message.

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
        open_handle(read_only=True).close()
        status = 0
    except Exception as error:
        os.write(writer, str(error).encode())
    finally:
        os._exit(status)


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


def open(readonly: bool) -> Handle | None:
    """Return a handle, or None if there is nothing to serve.

    An exception here would be logged with this script's path in front, and
    nbdkit since 1.42 sends the client what was logged last.
    """
    try:
        return open_handle(readonly)
    except ExportError as error:
        log_error(str(error))
    except Exception as error:
        log_error(f"{type(error).__name__}: {error}")
        log_error("the export cannot be opened")
    return None


def log_error(text: str) -> None:
    ctypes.CDLL(None).nbdkit_error(b"%s", text.encode("utf-8", "backslashreplace"))


def close(h: Handle | None) -> None:
    if h:
        h.close()


def cleanup() -> None:
    Cluster.disconnect()


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
    buf[:] = h.shared.image.read(offset, len(buf))


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
    for start, stop in allocated(h.shared, offset, end):
        if start > position:
            result.append((position, start - position, HOLE))
        result.append((start, stop - start, DATA))
        position = stop
    if position < end:
        result.append((position, end - position, HOLE))
    return result


DATA = 0
HOLE = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO


def allocated(shared: OpenImage, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges within start..end that exist, in order and disjoint."""
    size = shared.image.size()
    if start < size:
        objects = [(start, min(end, size))]
        if shared.has_object_map:
            # Looking into each object of a large image takes minutes: first see
            # which ones exist at all.
            objects = diff(shared.image, *objects[0], whole_object=True)
        for low, high in objects:
            yield from diff(shared.image, low, high, whole_object=False)
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
