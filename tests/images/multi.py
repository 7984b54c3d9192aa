"""The image `multi`: layers of each compression that use all that a layer can hold, below /data."""

import os
import random
import subprocess
import tempfile

from layout import EPOCH, Layer

# struct vfs_cap_data of version 2 with the effective flag: CAP_NET_BIND_SERVICE permitted.
NET_BIND_SERVICE = bytes.fromhex("0100000200040000000000000000000000000000")
LONG_NAME = "n" * 255
DEEP = "/".join(["d" * 100] * 5)


def noise(seed, size):
    return random.Random(seed).randbytes(size)


def base():
    layer = Layer("")
    layer.dir("data/", mtime=EPOCH + 1)
    layer.file("data/keep", "kept\n", mtime=EPOCH + 0.123456789)
    layer.file("data/removed", "gone\n")
    layer.file("data/replaced", "old\n")
    layer.file("data/returns", "first\n")
    layer.dir("data/dir", mode=0o750, uid=1000, gid=100)
    layer.file("data/dir/a", "a")
    layer.file("data/dir/b", "b")
    layer.dir("data/dir/sub", mode=0o700)
    layer.file("data/dir/sub/c", "c")
    for name in ("opaque", "opaque-last", "whited-and-remade", "dir-to-file"):
        layer.dir("data/" + name)
        layer.file(f"data/{name}/old", "old\n")
    layer.file("data/file-to-dir", "a file\n")
    layer.symlink("data/link-to-dir", "dir")
    sizes(layer)
    names(layer)
    special(layer)
    return layer


def sizes(layer):
    layer.dir("data/sizes")
    for size in (0, 1, 4095, 4096, 4097, 65536, 1048577):
        layer.file(f"data/sizes/{size}", noise(size, size))
    layer.file("data/sizes/zeros", bytes(1 << 20))
    layer.file("data/sizes/big", noise(7, 6 << 20))
    layer.dir("data/many")
    for number in range(1200):
        layer.file(f"data/many/file-{number:05}", str(number))


def names(layer):
    layer.dir("data/names")
    layer.file("data/names/" + LONG_NAME, "long name\n")
    path = "data/names"
    for part in DEEP.split("/"):
        path += "/" + part
        layer.dir(path)
    layer.file(path + "/deep", "deep\n")
    layer.symlink("data/names/long-link", "t" * 3000)
    layer.file("data/names/with space and 'quotes\"", "odd\n")
    layer.file("data/names/äöü-日本", "unicode\n")
    layer.file("data/names/..two-dots", "not a parent\n")
    layer.file("data/names/.wharf", "not a whiteout\n")
    layer.symlink("data/names/absolute", "/data/keep")
    layer.symlink("data/names/relative", "../keep")
    layer.symlink("data/names/dangling", "no/such/file")
    layer.symlink("data/names/outside", "../../../../../../etc/passwd")


def special(layer):
    import tarfile

    layer.dir("data/special", mode=0o1777)
    layer.file("data/special/setuid", "s", mode=0o4755)
    layer.file("data/special/setgid", "s", mode=0o2755, gid=50)
    layer.file("data/special/no-mode", "m", mode=0)
    layer.file("data/special/large-ids", "i", uid=4_000_000_000, gid=3_000_000_000)
    layer.file("data/special/old", "o", mtime=1)
    layer.file("data/special/future", "f", mtime=4_102_444_800)
    layer.add("data/special/null", tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    layer.add("data/special/minor", tarfile.CHRTYPE, mode=0o600, device=(300, 70000))
    layer.add("data/special/loop", tarfile.BLKTYPE, mode=0o660, gid=6, device=(7, 0))
    layer.add("data/special/fifo", tarfile.FIFOTYPE, mode=0o600)
    layer.file("data/special/linked", "three names\n")
    layer.hardlink("data/special/linked-2", "data/special/linked")
    layer.hardlink("data/names/linked-3", "data/special/linked")
    layer.file("data/special/capable", "c", mode=0o755, xattrs={"security.capability": NET_BIND_SERVICE})
    layer.file("data/special/xattrs", "x", xattrs={"user.text": b"value", "user.binary": b"\xff\x00\xfe", "user.empty": b""})
    layer.dir("data/special/xattr-dir", xattrs={"user.dir": b"d" * 3000})


def changes():
    layer = Layer("gzip")
    layer.dir("data/", mtime=EPOCH + 2)
    layer.whiteout("data/removed")
    layer.whiteout("data/returns")
    layer.file("data/replaced", "new\n", mode=0o600)
    layer.dir("data/dir", mode=0o755, uid=1000, gid=100)
    layer.whiteout("data/dir/a")
    layer.dir("data/dir/sub", mode=0o711, uid=7)
    layer.dir("data/opaque", mode=0o700)
    layer.opaque("data/opaque")
    layer.file("data/opaque/new", "new\n")
    layer.dir("data/opaque-last")
    layer.file("data/opaque-last/new", "new\n")
    # After the directory's other entries, which it must not hide.
    layer.opaque("data/opaque-last")
    layer.whiteout("data/whited-and-remade")
    layer.dir("data/whited-and-remade")
    layer.file("data/whited-and-remade/new", "new\n")
    layer.file("data/dir-to-file", "a file now\n")
    layer.dir("data/file-to-dir")
    layer.file("data/file-to-dir/inside", "inside\n")
    return layer


def returns():
    layer = Layer("zstd")
    layer.dir("./data/", mtime=EPOCH + 3)
    layer.file("./data/returns", "second\n")
    layer.file("./data/again", "once\n")
    # The last entry of a name counts.
    layer.file("./data/again", "twice\n")
    layer.dir("data/hard")
    layer.file("data/hard/one", "linked\n")
    layer.hardlink("data/hard/two", "data/hard/one")
    return layer


def sparse(name, kind, format_options):
    """A layer made by GNU tar with two holes and data at the file's start, middle and end."""
    with tempfile.TemporaryDirectory() as root:
        path = os.path.join(root, "data/sparse", name)
        os.makedirs(os.path.dirname(path))
        with open(path, "wb") as out:
            out.write(noise(11, 4096))
            out.seek(5 << 20)
            out.write(noise(12, 10000))
            out.seek((12 << 20) - 512)
            out.write(noise(13, 512))
        for made in (path, os.path.dirname(path), os.path.join(root, "data")):
            os.chmod(made, 0o644 if made == path else 0o755)
        command = ["tar", "-C", root, "-c", "--sparse", "--hole-detection=raw", "--sort=name", "--owner=0", "--group=0"]
        command += ["--numeric-owner", f"--mtime=@{EPOCH + 4}", *format_options, "data"]
        return Layer.from_tar(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout, kind)


def layers():
    pax = ["--format=pax", "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"]
    return [
        base(),
        changes(),
        returns(),
        sparse("gnu", "gzip", ["--format=gnu"]),
        sparse("pax", "zstd", pax),
    ]
