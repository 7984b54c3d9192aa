"""Makes the test images from Debian packages: generate.py OUT PACKAGE.deb...

OUT becomes an OCI image layout; beside the images it gets multi.listing, what the image `multi` holds below /data.
"""

import io
import os
import re
import subprocess
import sys
import tarfile

import multi
import oracle
from layout import Layer, Layout

LIBRARY = re.compile(r"(usr/)?lib(64|/x86_64-linux-gnu)/[^/]*\.so(\.[^/]*)?$")

PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
app:x:1000:1000:app:/home/app:/bin/sh
nobody:x:65534:65534:nobody:/home:/bin/false
"""

GROUP = """root:x:0:
daemon:x:1:
tty:x:5:
disk:x:6:
www-data:x:33:
users:x:100:app
app:x:1000:
extra:x:2000:app,www-data
nogroup:x:65534:
"""

NGINX = """user www-data;
worker_processes 1;
error_log /var/log/nginx/error.log warn;
pid /run/nginx.pid;
events { worker_connections 64; }
http {
  access_log /var/log/nginx/access.log;
  server {
    listen PORT;
    root /var/www/html;
  }
}
"""


class Packages:
    """The files of .deb packages, by package name."""

    def __init__(self, paths):
        self.trees = {}
        for path in paths:
            data = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE, check=True).stdout
            self.trees[os.path.basename(path).split("_")[0]] = tarfile.open(fileobj=io.BytesIO(data))

    def copy(self, layer, package, wanted):
        """Adds to `layer` the files and links of a package for whose path `wanted` is true, and their directories."""
        made = set()
        tree = self.trees[package]
        for info in tree:
            path = info.name.removeprefix("./")
            if info.isdir() or not wanted(path):
                continue
            parts = path.split("/")[:-1]
            for parent in ("/".join(parts[: n + 1]) for n in range(len(parts))):
                if parent not in made:
                    made.add(parent)
                    layer.dir(parent)
            if info.issym():
                layer.symlink(path, info.linkname)
            else:
                layer.file(path, tree.extractfile(info).read(), mode=info.mode)

    def read(self, package, path):
        return self.trees[package].extractfile(path).read()


def busybox_layer(packages):
    layer = Layer("gzip")
    binary = packages.read("busybox-static", "./bin/busybox")
    layer.dir("bin")
    layer.file("bin/busybox", binary, mode=0o755)
    applets = subprocess.run(["busybox", "--list"], stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    for applet in sorted(set(applets) - {"busybox"}):
        layer.hardlink("bin/" + applet, "bin/busybox")
    for name in ("etc", "home", "usr", "usr/bin", "usr/sbin", "var", "var/www", "run", "lib"):
        layer.dir(name)
    layer.dir("home/app", mode=0o750, uid=1000, gid=1000)
    layer.dir("root", mode=0o700)
    layer.dir("tmp", mode=0o1777)
    layer.symlink("usr/bin/env", "/bin/env")
    layer.file("etc/passwd", PASSWD)
    layer.file("etc/group", GROUP)
    return layer


def e2e_busybox_layer(packages):
    """What critest runs in its default image. It masks /bin/ls and wants the shell to say so, which the shell of
    busybox-static does not: that one has ls built in. Neither has pgrep and ipcs."""
    layer = Layer("gzip")
    layer.file("bin/busybox", packages.read("busybox", "./bin/busybox"), mode=0o755)
    names = subprocess.run(["busybox", "--list"], stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    for applet in sorted(set(names) - {"busybox"}):
        layer.hardlink("bin/" + applet, "bin/busybox")
    layer.file("usr/bin/ipcs", packages.read("util-linux", "./usr/bin/ipcs"), mode=0o755)
    layer.file("usr/bin/pgrep", '#!/bin/sh\nexec pidof "$@"\n', mode=0o755)
    return layer


def library_layer(packages):
    layer = Layer("zstd")
    for package in ("libc6", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g", "libattr1", "libselinux1"):
        packages.copy(layer, package, LIBRARY.match)
    return layer


def nginx_layer(packages):
    layer = Layer("gzip")
    packages.copy(layer, "nginx", lambda path: path == "usr/sbin/nginx")
    for name in ("etc/nginx", "var/lib", "var/lib/nginx", "var/log", "var/log/nginx", "var/www/html"):
        layer.dir(name)
    layer.file("etc/nginx/nginx.conf", NGINX.replace("PORT", "80"))
    layer.file("var/www/html/index.html", "This page is served by nginx in a microVM.\n")
    layer.symlink("var/log/nginx/access.log", "/dev/stdout")
    layer.symlink("var/log/nginx/error.log", "/dev/stderr")
    # Where critest looks for nginx.pid.
    layer.symlink("var/run", "/run")
    return layer


def critest_images(layout, packages, busybox, library):
    """The other images of critest, under whose names Debian has nothing."""
    layout.image("e2e-busybox", [busybox, library, e2e_busybox_layer(packages)], {"Cmd": ["sh"]})

    httpd = Layer("gzip")
    httpd.dir("var/www/html")
    httpd.file("var/www/html/index.html", "It works!\n")
    serve = "echo httpd serves port 80; exec httpd -f -p 80 -h /var/www/html"
    layout.image("httpd", [busybox, httpd], {"Cmd": ["sh", "-c", serve]})

    escalate = Layer("gzip")
    escalate.file("usr/bin/effective-id", packages.read("coreutils", "./usr/bin/id"), mode=0o4755)
    say = 'echo "Effective uid: $(effective-id -u)"'
    layout.image("nonewprivs", [busybox, library, escalate], {"Cmd": ["sh", "-c", say]})

    layout.image("pause", [busybox], {"Entrypoint": ["/bin/sleep", "infinity"]})


def user_images(layout, busybox):
    """critest's images with a USER."""
    users = {
        "user-uid": "1002",
        "user-username": "www-data",
        "user-uid-group": "1003:users",
        "user-username-group": "www-data:www-data",
        "user-missing": "nobody-knows",
    }
    for name, user in users.items():
        layout.image(name, [busybox], {"Cmd": ["sh"], "User": user})

    # As the Dockerfile of critest's image makes it.
    grouped = Layer("gzip")
    grouped.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home:/bin/sh\n")
    groups = ["root:x:0:", "default-user:x:1000:", "group-defined-in-image:x:50000:default-user"]
    grouped.file("etc/group", "".join(f"{group}\n" for group in groups))
    layout.image("predefined-group", [busybox, grouped], {"Cmd": ["sh"], "User": "1000"})


def numbered_images(layout, busybox):
    for number in range(1, 5):
        layer = Layer("gzip")
        layer.file("number", f"{number}\n")
        layout.image(f"number-{number}", [busybox, layer], {"Cmd": ["sh"]})


def hostile_images(layout, busybox):
    """Images that a pull has to refuse, each for one reason."""
    climb = Layer("gzip")
    climb.file("../../climbed", "out of the tree\n")
    layout.image("bad-dot-dot", [busybox, climb])

    link = Layer("gzip")
    link.hardlink("stolen", "../../../../etc/shadow")
    layout.image("bad-hardlink", [busybox, link])

    through = Layer("gzip")
    through.symlink("door", "/etc")
    through.file("door/passwd", "through a link\n")
    layout.image("symlink-parent", [busybox, through])

    layout.image("bad-diff-id", [busybox], diff_ids=["sha256:" + "0" * 64])

    # 384 MiB of zeros in less than 400 KiB.
    bomb = Layer("gzip")
    bomb.file("zeros", bytes(384 << 20))
    layout.image("bomb", [bomb])

    whole = Layer("gzip")
    whole.file("noise", multi.noise(99, 300_000))
    media_type, data = whole.blob()
    cut = Layer.from_tar(b"", "gzip")
    cut.blob = lambda: (media_type, data[: len(data) // 2])
    layout.image("bad-truncated", [busybox, cut], diff_ids=None)


def deep_layer(number):
    """One of many: a file of its own, one that all have, and what the one before had is removed."""
    layer = Layer("gzip")
    layer.file(f"deep/{number:03}", f"{number}\n")
    layer.file("deep/last", f"{number}\n")
    if number % 2:
        layer.whiteout(f"deep/{number - 1:03}")
    return layer


def main():
    out, packages = sys.argv[1], Packages(sys.argv[2:])
    layout = Layout(out)
    busybox, library, nginx = busybox_layer(packages), library_layer(packages), nginx_layer(packages)
    layout.image("busybox", [busybox], {"Cmd": ["sh"]})

    service = {"Cmd": ["nginx", "-g", "daemon off;"], "StopSignal": "SIGQUIT", "ExposedPorts": {"80/tcp": {}}}
    layout.image("nginx", [busybox, library, nginx], service)
    hostnet = Layer("gzip")
    hostnet.file("etc/nginx/nginx.conf", NGINX.replace("PORT", "12003"))
    layout.image("hostnet-nginx", [busybox, library, nginx, hostnet], service)

    attr = Layer("zstd")
    packages.copy(attr, "attr", lambda path: path == "usr/bin/getfattr")
    layers = multi.layers()
    layout.image("multi", [busybox, library, attr, *layers], {"Cmd": ["sh"], "WorkingDir": "/data/dir", "Env": ["COLOUR=green"]})
    with open(os.path.join(out, "multi.listing"), "w", encoding="utf-8") as listing:
        listing.write(oracle.listing([busybox, library, attr, *layers]))

    inotify = Layer("gzip")
    packages.copy(inotify, "inotify-tools", lambda path: path == "usr/bin/inotifywait")
    packages.copy(inotify, "libinotifytools0", LIBRARY.match)
    layout.image("inotify", [busybox, library, inotify], {"Cmd": ["sh"]})

    below, above = Layer("gzip"), Layer("gzip")
    below.dir("data")
    below.dir("data/private", mode=0o700, uid=1000, gid=1000)
    above.file("data/private/new", "new\n")
    layout.image("implicit-parent", [busybox, below, above], {"Cmd": ["sh"]})

    layout.image("deep", [busybox, *map(deep_layer, range(126))], {"Cmd": ["sh"]})

    # Each block of the file says which it is, so that a test finds it on the host's disk.
    marked = Layer("gzip")
    marked.file("marked", "".join(f"block {number:06}\n".ljust(4096, "-") for number in range(2048)))
    marked.file("unmarked", "right\n")
    layout.image("marked", [busybox, marked], {"Cmd": ["sh"]})

    critest_images(layout, packages, busybox, library)
    user_images(layout, busybox)
    numbered_images(layout, busybox)
    hostile_images(layout, busybox)
    layout.close()


main()
