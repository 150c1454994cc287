# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""How fast reads and writes are, beside qemu-nbd and beside librbd without NBD.

    bench/run.sh compare --json FILE --plot FILE.svg

fio sends the same requests to each server in turn, one server at a time, each of
them started afresh.  To draw the chart of a former run again, without a cluster:

    /usr/bin/python3 -m bench.compare --from FILE --plot FILE.svg
"""

import argparse
import collections
import contextlib
import datetime
import fnmatch
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import uuid

import matplotlib
import psutil
from matplotlib.figure import Figure
from tabulate import tabulate

from bench.common import (
    GIB,
    MIB,
    NBDKIT,
    PLUGIN,
    QEMU_NBD,
    ceph,
    image_of,
    machine,
    new_pool,
    serving_process,
    uri_of,
    versions,
)

# The server that the others are compared with.
BASE = "qemu-nbd"
# fio opens the image itself: what the library can do without NBD.
LIBRBD = "librbd"
# Only for workloads that write.
WRITE_CACHE = "write-cache"
UNCACHED = "qemu-nbd-uncached"
SERVERS = {
    "rbd_export": f"{NBDKIT} image={{image}}",
    WRITE_CACHE: f"{NBDKIT} image={{image}} write-cache=yes",
    BASE: f"{QEMU_NBD} rbd:{{image}}:id=rw:conf={{conf}}",
    UNCACHED: f"{QEMU_NBD} --cache=none rbd:{{image}}:id=rw:conf={{conf}}",
    LIBRBD: None,
}

# What fio calls rw, bs, iodepth and numjobs, which is the number of connections.
WORKLOADS = {
    "randread-4k-d1": ("randread", "4k", 1, 1),
    "randread-4k-d16": ("randread", "4k", 16, 1),
    "randread-4k-d64": ("randread", "4k", 64, 1),
    "randwrite-4k-d1": ("randwrite", "4k", 1, 1),
    "randwrite-4k-d16": ("randwrite", "4k", 16, 1),
    "randwrite-4k-4x4": ("randwrite", "4k", 4, 4),
    "randrw-4k-d16": ("randrw", "4k", 16, 1),
    "randread-64k-d16": ("randread", "64k", 16, 1),
    "read-4k-d1": ("read", "4k", 1, 1),
    "read-1m-d8": ("read", "1m", 8, 1),
    "write-1m-d8": ("write", "1m", 8, 1),
}

# Name in JSON: heading, decimals in the table.
METRICS = {
    "iops": ("IOPS", 0),
    "mib_per_second": ("MiB/s", 1),
    "mean_us": ("mean µs", 0),
    "p99_us": ("p99 µs", 0),
    "flush_us": ("flush µs", 0),
    "cpu_us": ("CPU µs", 1),
    "peak_mib": ("peak MiB", 0),
}
RATIOS = ("iops", "p99_us", "flush_us", "cpu_us", "peak_mib")
# In the chart; others get a color of matplotlib's.
LOOKS = {
    "rbd_export": ("rbd_export", "#0969da"),
    WRITE_CACHE: ("rbd_export write-cache=yes", "#54aeff"),
    UNCACHED: ("qemu-nbd --cache=none", "#6e7781"),
    LIBRBD: ("librbd without NBD (fio's rbd engine)", "#afb8c1"),
}
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
LEGEND = f"""\
IOPS and MiB/s of reads and writes together.  Latency of a request; that of a write may be
a cache's: each 128th is followed by a flush, which counts as time but not as request, and
takes this long on average.
CPU of the server for each request; the most of its memory that was ever resident.
{LIBRBD}: fio opens the image itself, all requests through one handle."""


def writes(workload):
    return not WORKLOADS[workload][0].endswith("read")


def fio(workload, seconds, *engine):
    """Run a workload; return what fio says of its jobs together."""
    rw, size, depth, jobs = WORKLOADS[workload]
    if "--ioengine=rbd" in engine:
        # More jobs would take the exclusive lock from each other.
        depth, jobs = depth * jobs, 1
    command = [
        *("fio", f"--name={workload}", "--output-format=json", "--group_reporting"),
        *("--allrandrepeat=1", "--randseed=20", "--time_based", f"--runtime={seconds}"),
        *(f"--rw={rw}", f"--bs={size}", f"--blockalign={size}"),
        *(f"--iodepth={depth}", f"--numjobs={jobs}", *engine),
    ]
    if writes(workload):
        command.append("--fsync=128")
    if rw == "randrw":
        command.append("--rwmixread=70")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    # Notes may come before the JSON.
    notes, brace, rest = done.stdout.partition("{")
    jobs = json.loads(brace + rest)["jobs"] if brace else []
    errors = {os.strerror(job["error"]) for job in jobs if job["error"]}
    if done.returncode or errors or len(jobs) != 1:
        raise SystemExit(f"fio failed: {shlex.join(command)}\n{notes}{', '.join(errors)}")
    return jobs[0]


def figures(job):
    """What a client saw.  Flushes are no requests: fio counts them apart."""
    ways = [job[way] for way in ("read", "write") if job[way]["total_ios"]]
    requests = sum(way["total_ios"] for way in ways)
    flushes = job["sync"]["total_ios"]
    return {
        "requests": requests,
        "iops": sum(way["iops"] for way in ways),
        "mib_per_second": sum(way["bw_bytes"] for way in ways) / MIB,
        "mean_us": sum(way["clat_ns"]["mean"] * way["total_ios"] for way in ways) / requests / 1e3,
        # Of reads and writes, that which is worse.
        "p99_us": max(way["clat_ns"]["percentile"]["99.000000"] for way in ways) / 1e3,
        **({"flush_us": job["sync"]["lat_ns"]["mean"] / 1e3} if flushes else {}),
    }


def cpu_seconds(process):
    times = process.cpu_times()
    return times.user + times.system


def peak_memory(pid):
    """The most that was ever resident, in MiB."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def measure_librbd(workload, image, options):
    pool, name = image.split("/")
    engine = ["--ioengine=rbd", "--clientname=rw", f"--pool={pool}", f"--rbdname={name}"]
    return figures(fio(workload, options.seconds, *engine, f"--ramp_time={options.ramp}"))


@contextlib.contextmanager
def showing(log):
    """Print what a server said, but only when something fails."""
    try:
        yield
    except SystemExit:
        print(log.read_text(), end="", file=sys.stderr)
        raise


def measure_server(template, workload, image, options, directory):
    socket = directory / uuid.uuid4().hex[:8]
    command = template.format(
        socket=socket, image=image, conf=os.environ["CEPH_CONF"], plugin=PLUGIN
    )
    engine = ["--ioengine=nbd", f"--uri={uri_of(socket)}"]
    log = directory / "log"
    with (
        showing(log),
        log.open("w") as stderr,
        serving_process(shlex.split(command), socket, stderr=stderr) as process,
    ):
        server = psutil.Process(process.pid)
        # A run of its own: fio counts no request of its ramp time, but they cost CPU.
        # Elsewhere: what it leaves in librbd's cache must not be what is read next.
        if options.ramp:
            fio(workload, options.ramp, *engine, "--offset=50%")
        before = cpu_seconds(server)
        result = figures(fio(workload, options.seconds, *engine))
        cpu = cpu_seconds(server) - before
        return {
            **result,
            "cpu_us": cpu / result["requests"] * 1e6,
            "peak_mib": peak_memory(server.pid),
        }


def measurements(servers, workloads, image, options, directory):
    """Rounds of all workloads, each on one server after the other, in changing order."""
    names = list(servers)
    for number in range(options.rounds):
        first = number % len(names)
        for workload in workloads:
            for name in names[first:] + names[:first]:
                if name in (WRITE_CACHE, UNCACHED) and not writes(workload):
                    continue
                if servers[name]:
                    result = measure_server(servers[name], workload, image, options, directory)
                else:
                    result = measure_librbd(workload, image, options)
                print(
                    f"round {number + 1}: {workload}: {name}:"
                    f" {result['iops']:.0f} IOPS, p99 {result['p99_us']:.0f} µs",
                    flush=True,
                )
                yield {"round": number + 1, "workload": workload, "server": name, **result}


def medians(measured):
    """{workload: {server: {metric: median over the rounds}}}"""
    values = collections.defaultdict(list)
    for one in measured:
        for metric in METRICS:
            if metric in one:
                values[one["workload"], one["server"], metric].append(one[metric])
    result = {}
    for (workload, server, metric), several in values.items():
        of_server = result.setdefault(workload, {}).setdefault(server, {})
        of_server[metric] = statistics.median(several)
    return result


def ratios(middle):
    """The same as multiples of what the base has; empty without it."""
    return {
        workload: {
            server: {
                metric: found[metric] / servers[BASE][metric]
                for metric in RATIOS
                if metric in found and servers[BASE][metric]
            }
            for server, found in servers.items()
            if server != BASE
        }
        for workload, servers in middle.items()
        if BASE in servers
    }


def table(values, metrics, decimals):
    """A row for each workload and server."""
    rows = []
    for workload, found in values.items():
        for number, (server, value) in enumerate(found.items()):
            cells = [
                f"{value[metric]:.{digits}f}" if metric in value else "-"
                for metric, digits in zip(metrics, decimals, strict=True)
            ]
            rows.append(["" if number else workload, server, *cells])
    headers = ["", "", *(METRICS[metric][0] for metric in metrics)]
    align = ["left", "left", *["right"] * len(metrics)]
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def conditions(report):
    """Two lines: what was compared, and where."""
    tools = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    where, how, cluster = report["machine"], report["options"], report["cluster"]
    return (
        f"{report['date']}: {tools}\n"
        f"{where['cpu']}, {where['cpus']} CPUs, Linux {where['kernel']}; {cluster['osds']} OSD"
        f" ({', '.join(cluster['stores'])}), image of {how['size']} GiB;"
        f" medians of {how['rounds']} x {how['seconds']} s"
    )


def show(report):
    decimals = [digits for _, digits in METRICS.values()]
    print(f"\n{conditions(report)}\n\n{LEGEND}\n")
    print(table(report["medians"], METRICS, decimals))
    if report["ratios"]:
        print(f"\nas multiples of {BASE}'s\n")
        print(table(report["ratios"], RATIOS, [2] * len(RATIOS)))


def plot(report, path):
    """Bars of IOPS as multiples of the base's, for each workload."""
    found = report["ratios"]
    servers = [
        name
        for name in report["options"]["servers"]
        if any(name in workload for workload in found.values())
    ]
    if not servers:
        raise SystemExit(f"no chart: nothing to compare with {BASE}")
    width = 0.8 / len(servers)
    # 0.2 inches for each bar and each gap.
    size = (9, 1.8 + 0.2 * len(found) * (len(servers) + 1))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for server in servers:
        values = {}
        for place, workload in enumerate(found.values()):
            there = [name for name in servers if name in workload]
            if server in there:
                offset = there.index(server) + (1 - len(there)) / 2
                values[place + offset * width] = workload[server]["iops"]
        label, color = LOOKS.get(server, (server, None))
        bars = axes.barh([*values], [*values.values()], width * 0.9, label=label, color=color)
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=8, zorder=3, bbox=BEHIND_TEXT)
    axes.axvline(1, color="black", linewidth=1)
    top = axes.get_xaxis_transform()
    axes.text(1, 1.005, BASE, ha="center", va="bottom", fontsize=9, transform=top)
    axes.set_yticks(range(len(found)), found)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.set_xlabel(f"IOPS as a multiple of {BASE}'s (longer is faster)")
    axes.set_title("rbd_export beside its peers", loc="left", pad=24)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=2, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(conditions(report), fontsize=7, color="#444444")
    # Without ids at random, and with text as text, a new chart is a small change.
    with matplotlib.rc_context({"svg.hashsalt": "rbd_export", "svg.fonttype": "none"}):
        figure.savefig(path, facecolor="white", metadata={"Date": None})


def run(options, servers, workloads):
    with tempfile.TemporaryDirectory() as directory, new_pool() as (pool, ioctx):
        size = options.size * GIB
        step = 4 * MIB
        image_of(ioctx, "image", size, ((place, step) for place in range(0, size, step)))
        place = pathlib.Path(directory)
        measured = list(measurements(servers, workloads, f"{pool}/image", options, place))
    middle = medians(measured)
    osds = json.loads(ceph("osd", "metadata", "--format=json"))
    return {
        "date": datetime.date.today().isoformat(),
        "versions": versions("nbdkit", "qemu-nbd", "ceph", "fio"),
        "machine": machine(),
        "cluster": {"osds": len(osds), "stores": sorted({osd["osd_objectstore"] for osd in osds})},
        "options": {
            **{name: getattr(options, name) for name in ("size", "rounds", "seconds", "ramp")},
            "servers": servers,
        },
        "medians": middle,
        "ratios": ratios(middle),
        "measurements": measured,
    }


def named(text):
    name, equals, command = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=COMMAND")
    return name, command


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--seconds", type=int, default=5, help="of each measurement")
    add("--ramp", type=int, default=1, help="seconds before it that do not count")
    add("--size", type=int, default=1, help="GiB of the image")
    add("--only", action="append", metavar="GLOB", help="workloads of this name")
    add(
        "--server",
        action="append",
        default=[],
        type=named,
        metavar="NAME=COMMAND",
        help="another one; {socket}, {image}, {conf} and {plugin} are put in",
    )
    add("--without", action="append", default=[], choices=SERVERS, help="leave a server out")
    add("--json", type=pathlib.Path, metavar="FILE", help="write all figures")
    add("--plot", type=pathlib.Path, metavar="FILE.svg", help="draw a chart")
    add("--from", dest="source", type=pathlib.Path, metavar="FILE", help="show a former --json")
    options = parser.parse_args()
    servers = SERVERS | dict(options.server)
    servers = {name: servers[name] for name in servers if name not in options.without}
    workloads = [
        name
        for name in WORKLOADS
        if any(fnmatch.fnmatchcase(name, glob) for glob in options.only or ["*"])
    ]
    if not workloads:
        parser.error(f"no such workload; there are {', '.join(WORKLOADS)}")
    if options.plot and BASE in options.without:
        parser.error(f"the chart compares with {BASE}")
    # Better now than after all that has been measured.
    for path in filter(None, (options.json, options.plot)):
        if not path.absolute().parent.is_dir():
            parser.error(f"no directory for '{path}'")
    return options, servers, workloads


def main():
    options, servers, workloads = parsed()
    if options.source:
        report = json.loads(options.source.read_text())
    else:
        report = run(options, servers, workloads)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
