"""The images of tests/bench/images, made of this machine's /usr and pushed to a registry without TLS."""

import hashlib
import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

SMALL = 16 << 10
MEDIUM = 1 << 20
LAYERS = 60
HOST = "bench.example"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def files_of_usr():
    """Regular files that can be read, with their sizes, in the order of their names."""
    found = []
    for top in ("/usr/lib", "/usr/share"):
        for directory, _, names in os.walk(top):
            for name in names:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                if os.path.isfile(path) and not os.path.islink(path) and "\n" not in path:
                    found.append((path, status.st_size))
    return sorted(found)


def lists(files, size, count):
    """`count` lists of files of about `size` bytes in all, and for each the directory it goes to. Files come again if need be."""
    result, turn, index = [], 0, 0
    for _ in range(count):
        names, total, first = [], 0, turn
        while total < size / count and turn - first < 2:
            path, length = files[index]
            names.append(path)
            total += length
            index += 1
            if index == len(files):
                # The same name twice in a layer would be one file.
                index, turn = 0, turn + 1
                if names:
                    break
        result.append((names, f"turn-{first}"))
    return result


def tar_of_files(names, directory, path):
    listing = path.with_suffix(".list")
    listing.write_text("\n".join(name.lstrip("/") for name in names))
    command = ["tar", "--create", "--hard-dereference", "--sort=name", "--owner=0", "--group=0", "--directory=/"]
    command += [f"--transform=s,^,{directory}/,S", "--file", path, "--files-from", listing]
    # A file that changed or went meanwhile is no harm: the layer is what was read.
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode > 2:
        sys.exit(f"{command} failed")
    listing.unlink()


def tar_of_large(files, size, path):
    """Eight files of one size, of what large files hold."""
    parts = path.parent / "parts"
    parts.mkdir()
    large = (Path(name).read_bytes() for name, length in files if 1 << 20 < length < 64 << 20)
    for number in range(8):
        with open(parts / f"large-{number}", "wb") as part:
            while part.tell() < size // 8 and (data := next(large, None)):
                part.write(data)
    subprocess.run(["tar", "--create", "--sort=name", "--directory", parts, "--file", path, "."], check=True)
    subprocess.run(["rm", "-r", parts], check=True)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Repository:
    """A repository of a registry on this machine."""

    def __init__(self, port, name):
        self.connection, self.name = http.client.HTTPConnection("127.0.0.1", port), name

    def ask(self, method, path, body=None, kind="application/octet-stream", length=None):
        headers = {"Content-Type": kind}
        if length is not None:
            headers["Content-Length"] = str(length)
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        answer.read()
        if answer.status not in (201, 202):
            sys.exit(f"the registry answers {method} {path} with {answer.status}")
        return answer

    def push(self, body, hexadecimal, length):
        location = self.ask("POST", f"/v2/{self.name}/blobs/uploads/").headers["Location"]
        path = location[location.index("/v2/") :]
        self.ask("PUT", f"{path}{'&' if '?' in path else '?'}digest=sha256:{hexadecimal}", body, length=length)
        return {"digest": f"sha256:{hexadecimal}", "size": length}

    def push_image(self, layers, diff_ids):
        config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        config = json.dumps(config).encode()
        config = self.push(config, hashlib.sha256(config).hexdigest(), len(config))
        config["mediaType"] = "application/vnd.oci.image.config.v1+json"
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
        self.ask("PUT", f"/v2/{self.name}/manifests/1", json.dumps(manifest), kind=MANIFEST)


def compress(tar, kind):
    path = tar.with_suffix("." + kind)
    program = {"gzip": ["gzip", "-6", "-n", "-c"], "zstd": ["zstd", "-q", "-3", "-c"]}[kind]
    with open(path, "wb") as output:
        subprocess.run([*program, tar], stdout=output, check=True)
    return path


def make_image(name, tars, port):
    """Pushes the image with each compression; gives what the benchmark is to know of them."""
    made = []
    diff_ids = ["sha256:" + digest(tar) for tar in tars]
    for kind in ("gzip", "zstd"):
        repository = Repository(port, f"{name}-{kind}")
        layers = []
        for tar in tars:
            blob = compress(tar, kind)
            with open(blob, "rb") as body:
                layer = repository.push(body, digest(blob), blob.stat().st_size)
            layer["mediaType"] = f"application/vnd.oci.image.layer.v1.tar+{kind}"
            layers.append(layer)
            blob.unlink()
        repository.push_image(layers, diff_ids)
        hexadecimals = [layer["digest"].partition(":")[2] for layer in layers]
        sizes = sum(tar.stat().st_size for tar in tars), sum(layer["size"] for layer in layers)
        about = f"{name}, {kind}: {sizes[0] / 1e6:.0f} MB of tar, {sizes[1] / 1e6:.0f} MB compressed"
        made.append({"name": about, "reference": f"{HOST}/{name}-{kind}:1", "layers": hexadecimals, "before": []})
    return made


def make_all(megabytes, port, work):
    """Makes and pushes all images of about `megabytes` each."""
    print("making the images, once", file=sys.stderr)
    size, files, made = megabytes * 1_000_000, files_of_usr(), []
    small = [file for file in files if file[1] <= SMALL]
    tars = [work / f"{number}.tar" for number in range(LAYERS)]
    # In turns, so that no layer has a name twice.
    parts = lists(small, size, 4)
    for (names, directory), tar in zip(parts, tars):
        tar_of_files(names, directory, tar)
    made += make_image("small-files", tars[:4], port)
    tar_of_large(files, size, tars[0])
    made += make_image("large-files", tars[:1], port)
    medium = [file for file in files if file[1] <= MEDIUM]
    for (names, directory), tar in zip(lists(medium, size, LAYERS), tars):
        tar_of_files(names, directory, tar)
    made += make_image("60-layers", tars, port)
    # The same but for the last layer, whose files are those of the first under other names.
    tar_of_files(lists(medium, size, LAYERS)[0][0], "other", tars[-1])
    sharing = make_image("60-layers-one-new", tars, port)
    for image, first in zip(sharing, made[-2:]):
        image["before"] = [first["reference"]]
    return made + sharing
