"""Applies layers as the OCI image specification says and lists the result, independently of isopod.

The listing has one line for each object below /data, sorted; the guest's side of it is in tests/tests/images.rs.
"""

import hashlib
import io
import stat
import tarfile

KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def remove(tree, path):
    for name in [name for name in tree if name == path or name.startswith(path + "/")]:
        del tree[name]


def apply(tree, plain):
    """Changes `tree` (path to entry) by one uncompressed layer."""
    own = {}
    hidden = []
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        for info in tar:
            path = "/" + info.name.removeprefix("./").strip("/")
            head, _, tail = path.rpartition("/")
            if tail == ".wh..wh..opq":
                hidden.append((head, True))
            elif tail.startswith(".wh."):
                hidden.append((head + "/" + tail[4:], False))
            elif info.islnk():
                own[path] = own["/" + info.linkname.removeprefix("./").strip("/")]
            else:
                own[path] = entry(tar, info)
    for path, opaque in hidden:
        for name in [n for n in tree if n.startswith(path + "/") or (n == path and not opaque)]:
            del tree[name]
    for path, new in own.items():
        if path in tree and not (stat.S_ISDIR(new["mode"]) and stat.S_ISDIR(tree[path]["mode"])):
            remove(tree, path)
        tree[path] = new


def entry(tar, info):
    data = tar.extractfile(info).read() if info.isfile() else b""
    return {
        "mode": KINDS[info.type] | info.mode,
        "uid": info.uid,
        "gid": info.gid,
        "size": len(info.linkname.encode()) if info.issym() else len(data),
        "mtime": int(info.mtime),
        "device": (info.devmajor, info.devminor) if info.isdev() and not info.isfifo() else (0, 0),
        "link": info.linkname,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def listing(layers):
    tree = {}
    for layer in layers:
        apply(tree, layer.plain())
    lines = []
    for path, made in tree.items():
        if not (path + "/").startswith("/data/"):
            continue
        name = path.encode("utf-8", "surrogateescape").decode("utf-8")
        common = f"{made['mode']:x} {made['uid']} {made['gid']} {made['mtime']}"
        if stat.S_ISDIR(made["mode"]):
            # Size and link count of a directory are the file system's own business.
            lines.append(f"stat {common} {name}")
            continue
        links = sum(1 for other in tree.values() if other is made)
        major, minor = made["device"]
        lines.append(f"stat {common} {made['size']} {links} {major:x}:{minor:x} {name}")
        if stat.S_ISLNK(made["mode"]):
            lines.append(f"link {name} {made['link']}")
        elif stat.S_ISREG(made["mode"]):
            lines.append(f"sha256 {made['sha256']} {name}")
    return "".join(line + "\n" for line in sorted(lines))
