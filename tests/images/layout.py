"""Writes layers and OCI image layouts. The same input gives the same bytes.

Only Python's standard library is used, and the `zstd` program for layers of that kind.
"""

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile

EPOCH = 1_700_000_000
TAR = "application/vnd.oci.image.layer.v1.tar"


class Layer:
    """A tar in the making; `kind` is its compression: "", "gzip" or "zstd"."""

    def __init__(self, kind="gzip"):
        self.kind = kind
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w", format=tarfile.PAX_FORMAT)

    @classmethod
    def from_tar(cls, data, kind):
        """A layer of a finished tar, for what Python's tarfile does not write, such as sparse files."""
        layer = cls(kind)
        layer.tar, layer.buffer = None, io.BytesIO(data)
        return layer

    def add(self, name, kind, data=b"", mode=0o644, uid=0, gid=0, mtime=EPOCH, link="", device=(0, 0), xattrs=None):
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, uid, gid, mtime
        info.linkname, info.size = link, len(data)
        info.devmajor, info.devminor = device
        for key, value in (xattrs or {}).items():
            info.pax_headers["SCHILY.xattr." + key] = value.decode("utf-8", "surrogateescape")
        self.tar.addfile(info, io.BytesIO(data))

    def dir(self, name, mode=0o755, **rest):
        self.add(name, tarfile.DIRTYPE, mode=mode, **rest)

    def file(self, name, data=b"", **rest):
        self.add(name, tarfile.REGTYPE, data if isinstance(data, bytes) else data.encode(), **rest)

    def symlink(self, name, target, **rest):
        self.add(name, tarfile.SYMTYPE, mode=0o777, link=target, **rest)

    def hardlink(self, name, target):
        # As tar writes it: containerd sets the file's mode by that of its last link.
        modes = {info.name: info.mode for info in self.tar.getmembers()}
        self.add(name, tarfile.LNKTYPE, mode=modes.get(target, 0o644), link=target)

    def whiteout(self, name):
        head, tail = os.path.split(name)
        self.file(os.path.join(head, ".wh." + tail))

    def opaque(self, directory):
        self.file(os.path.join(directory, ".wh..wh..opq"))

    def plain(self):
        """The finished tar."""
        if self.tar:
            self.tar.close()
            self.tar = None
        return self.buffer.getvalue()

    def blob(self):
        """Media type and compressed bytes."""
        data = self.plain()
        if self.kind == "gzip":
            return TAR + "+gzip", gzip.compress(data, 6, mtime=0)
        if self.kind == "zstd":
            command = ["zstd", "-q", "-9", "--single-thread", "--content-size", "-c"]
            return TAR + "+zstd", subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout
        return TAR, data


class Layout:
    """An OCI image layout directory with several named images that share blobs."""

    def __init__(self, root):
        self.root = root
        self.manifests = []
        self.blobs = {}
        os.makedirs(os.path.join(root, "blobs/sha256"))

    def blob(self, media_type, data):
        digest = hashlib.sha256(data).hexdigest()
        with open(os.path.join(self.root, "blobs/sha256", digest), "wb") as out:
            out.write(data)
        return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(data)}

    def layer(self, layer):
        """The descriptor and the diff id of a layer; a layer that several images share is written once."""
        if id(layer) not in self.blobs:
            diff_id = "sha256:" + hashlib.sha256(layer.plain()).hexdigest()
            # The layer is kept with them, so that its id is not given to another one.
            self.blobs[id(layer)] = (self.blob(*layer.blob()), diff_id, layer)
        return self.blobs[id(layer)][:2]

    def image(self, name, layers, config=None, diff_ids=None):
        """Adds an image; `diff_ids` overrides the true ones."""
        made = [self.layer(layer) for layer in layers]
        config = {
            "architecture": "amd64",
            "os": "linux",
            "created": "2023-11-14T22:13:20Z",
            "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], **(config or {})},
            "rootfs": {"type": "layers", "diff_ids": diff_ids or [diff_id for _, diff_id in made]},
        }
        config = self.blob("application/vnd.oci.image.config.v1+json", json.dumps(config).encode())
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [descriptor for descriptor, _ in made],
        }
        descriptor = self.blob(manifest["mediaType"], json.dumps(manifest).encode())
        descriptor["annotations"] = {"org.opencontainers.image.ref.name": name}
        self.manifests.append(descriptor)

    def close(self):
        index = {"schemaVersion": 2, "manifests": self.manifests}
        with open(os.path.join(self.root, "index.json"), "w") as out:
            json.dump(index, out)
        with open(os.path.join(self.root, "oci-layout"), "w") as out:
            json.dump({"imageLayoutVersion": "1.0.0"}, out)
