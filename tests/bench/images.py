"""isopod's image store beside containerd, pulling the same images from the same registry: images.py PULL CRICTL MEGABYTES RUNS.

PULL is image-store's example of that name. The images are of this machine's /usr, about MEGABYTES each, and are kept with the registry
that holds them in $ISOPOD_CACHE. Of RUNS runs the quickest counts. Whoever pulls starts with an empty store; the registry's files are
in the page cache.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import images_make

HERE = Path(__file__).resolve().parent
CONTAINERD = """version = 2
root = "{work}/root"
state = "{work}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "{work}/socket"
[plugins."io.containerd.internal.v1.opt"]
path = "{work}/opt"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{certs}"
"""


class Cost:
    """Seconds, seconds of CPU, peak memory in bytes, bytes on disk."""

    def __init__(self, wall, cpu, memory, disk):
        self.wall, self.cpu, self.memory, self.disk = wall, cpu, memory, disk


def run(*command):
    """Runs a program, whose last line ends with its peak memory in KiB, and gives its output and what it cost."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    memory = int(output.split()[-1]) * 1024
    return output, Cost(time.monotonic() - start, usage.ru_utime + usage.ru_stime, memory, 0)


def disk(path):
    return int(subprocess.check_output(["du", "-sB1", path]).split()[0])


def isopod(pull, certs, references, work):
    """Pulls the images into one store, and gives the cost of the last: what all cost without what all but the last did."""
    costs = []
    for count in sorted({len(references) - 1, len(references)} - {0}):
        root = work / "isopod"
        output, cost = run(pull, str(root), str(certs), *references[:count])
        cost.wall, cost.disk = float(output.splitlines()[-1].split()[0]), disk(root)
        costs.append(cost)
        shutil.rmtree(root)
    last = costs[-1]
    if len(costs) > 1:
        last.cpu, last.disk = last.cpu - costs[0].cpu, last.disk - costs[0].disk
    return last


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def containerd(crictl, certs, references, work):
    """The same with containerd, whose CRI is asked as the kubelet does."""
    home = Path(tempfile.mkdtemp(prefix="containerd.", dir=work))
    (home / "config.toml").write_text(CONTAINERD.format(work=home, certs=certs))
    command = [crictl, "-t", "600s", "-r", f"unix://{home}/socket", "-i", f"unix://{home}/socket"]
    with open(home / "log", "w") as log:
        daemon = subprocess.Popen(["containerd", "--config", home / "config.toml"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run([*command, "version"], capture_output=True).returncode:
            if daemon.poll() is not None or time.monotonic() > deadline:
                sys.exit("containerd does not answer:\n" + (home / "log").read_text()[-2000:])
            time.sleep(0.1)
        for reference in references:
            before = cpu_seconds(daemon.pid), disk(home)
            Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")
            start = time.monotonic()
            subprocess.run([*command, "pull", reference], check=True, stdout=subprocess.DEVNULL)
            wall = time.monotonic() - start
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return Cost(wall, cpu_seconds(daemon.pid) - before[0], peak, disk(home) - before[1])
    finally:
        daemon.terminate()
        daemon.wait()
        shutil.rmtree(home)


@contextlib.contextmanager
def registry(storage, work):
    """Serves the storage, and gives the directory that tells both programs where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([HERE.parent / "registry/serve", storage, str(port)], stderr=subprocess.DEVNULL)
    certs = work / "certs.d/bench.example"
    certs.mkdir(parents=True)
    # containerd 1.6 passes over a file that has a server alone.
    (certs / "hosts.toml").write_text(f'[host."http://127.0.0.1:{port}"]\ncapabilities = ["pull", "resolve"]\n')
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port, certs.parent
    finally:
        server.terminate()
        server.wait()


def row(name, ours, theirs, floor, written):
    mega = 1e6
    print(
        f"| {name} | {ours.wall:.2f} s | {theirs.wall:.2f} s | **{ours.wall / theirs.wall:.2f}** "
        f"| {ours.cpu:.2f} s | {theirs.cpu:.2f} s | **{ours.cpu / theirs.cpu:.2f}** "
        + "".join(
            f"| {least.wall:.2f} s, {least.cpu:.2f} s | {ours.wall / least.wall:.2f}, {ours.cpu / least.cpu:.2f} " if least else "| | "
            for least in (floor, written)
        )
        + f"| {ours.memory / mega:.0f}, {theirs.memory / mega:.0f} MB | {ours.disk / mega:.0f}, {theirs.disk / mega:.0f} MB |",
        flush=True,
    )


def main():
    pull, crictl, megabytes, runs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    cache = Path(os.environ.get("ISOPOD_CACHE") or Path.home() / ".cache/isopod") / "bench-images"
    key = hashlib.sha256((HERE / "images_make.py").read_bytes() + b"%d" % megabytes).hexdigest()[:16]
    storage = cache / key
    with tempfile.TemporaryDirectory(prefix="isopod-bench.", dir="/var/tmp") as work:
        work = Path(work)
        if not (storage / "images.json").exists():
            shutil.rmtree(cache, ignore_errors=True)
            storage.mkdir(parents=True)
            with registry(storage, work / "filling") as (port, _):
                images = images_make.make_all(megabytes, port, work)
            (storage / "images.json").write_text(json.dumps(images))
        images = json.loads((storage / "images.json").read_text())
        with registry(storage, work) as (_, certs):
            print("| image | isopod | containerd | ratio | CPU | containerd | ratio | plain | ratio | written | ratio | peak memory | on disk |")
            print("|---" * 13 + "|")
            for image in images:
                blobs = [
                    str(storage / "docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data")
                    for hexadecimal in image["layers"]
                ]
                subprocess.run(["cat", *blobs], stdout=subprocess.DEVNULL, check=True)
                references = image["before"] + [image["reference"]]
                best = lambda measure: min((measure() for _ in range(runs)), key=lambda cost: cost.wall)
                ours = best(lambda: isopod(pull, certs, references, work))
                theirs = best(lambda: containerd(crictl, certs, references, work))
                floor = None if image["before"] else best(lambda: run(pull, "--floor", *blobs)[1])
                written = None if image["before"] else best(lambda: run(pull, "--written", work, *blobs)[1])
                row(image["name"], ours, theirs, floor, written)


main()
