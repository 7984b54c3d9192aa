# What the scripts that run in the node share; sourced by them. Needs: everything in out/ (make all, tests/setup/fixtures).

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
registry_port=5000
socket=/run/isopod/isopod.sock
# Where the daemon's log goes: out/node/isopod.log on the build machine.
node_out=/node-out
[[ -d $node_out ]] || node_out=$(mktemp -d)

# wait_until SECONDS WHAT COMMAND...: tries the command until it succeeds.
wait_until() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || { printf 'no %s in time\n' "$what" >&2; return 1; }
    sleep 0.2
  done
}

port_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1"); }

# start_registry STORAGE
start_registry() {
  "$repo/tests/registry/serve" "$1" "$registry_port" >"$node_out/registry.log" 2>&1 &
  wait_until 60 registry port_open "$registry_port"
}

# write_config FILE: the daemon's configuration, with every registry the tests name sent to the one on loopback.
write_config() {
  cat >"$1" <<CONFIG
socket = "unix://$socket"
root = "/var/lib/isopod"
state = "/run/isopod"
log_level = "${ISOPOD_LOG:-info}"

[vmm]
binary = "$(realpath "$repo/out/isopod-vmm")"
file_server = "$(realpath "$repo/out/isopod-fs")"
kernel = "$(realpath "$repo/out/vmlinux")"
initramfs = "$(realpath "$repo/out/initramfs.cpio")"
boot_deadline_seconds = 120
scratch_mib = 1024
verbose_console = ${ISOPOD_VERBOSE_CONSOLE:-false}

[cni]
config_directory = "/run/isopod/net.d"

[images]
max_layer_mib = 256
progress_timeout_seconds = 10

[images.mirrors]
$(printf '"%s" = "http://127.0.0.1:'"$registry_port"'"\n' docker.io registry.k8s.io k8s.gcr.io gcr.io public.ecr.aws)
# Nothing listens there.
"down.example" = "http://127.0.0.1:1"
CONFIG
}

# start_daemon CONFIG: sets daemon_pid.
start_daemon() {
  "$repo/out/isopod" daemon --config "$1" >>"$node_out/isopod.log" 2>&1 &
  daemon_pid=$!
  if ! wait_until 60 "daemon" crictl version; then
    tail -n 20 "$node_out/isopod.log" >&2
    return 1
  fi
}

# crictl with the test's endpoint and patience; a config file, since the default one may belong to somebody else.
printf 'runtime-endpoint: unix://%s\nimage-endpoint: unix://%s\ntimeout: 120\n' "$socket" "$socket" >/tmp/crictl.yaml
crictl() { "$repo/out/bin/crictl" --config /tmp/crictl.yaml "$@"; }

# snapshot [FOLDER...]: what a pod could leave behind in the node, a line each, sorted: processes, interfaces, routes, namespaces, mounts,
# cgroups, packet filter, and what is in the folders.
snapshot() (
  # What ends while it is being looked at, or is not there, is no failure.
  set +e +o pipefail
  {
    # But for the kernel's, and those of this function.
    ps -eo pid=,ppid=,comm= | awk -v own=$BASHPID '
      { parent[$1] = $2; name[$1] = $3 }
      END { for (p in parent) { for (q = p; q && q != own && q != 2;) q = parent[q]; if (!q) print "process " name[p] } }'
    ip -o link | awk -F'[ :@]+' '{print "link " $2}'
    # The kernel gives the bridge, which stays, its link-local address when it has its first port.
    { ip route show table all; ip rule; ip -6 rule; } | grep -v 'fe80::.* dev isopod0 ' | sed 's/^/route /'
    for kind in net mnt pid ipc uts user; do
      readlink /proc/[0-9]*/ns/$kind 2>/dev/null | sort -u | sed 's/^/namespace /'
    done
    ls /run/netns 2>/dev/null | sed 's/^/named namespace /'
    awk '{print "mount " $2}' /proc/self/mounts
    find /sys/fs/cgroup -type d -printf 'cgroup %p\n'
    (($# == 0)) || find "$@" -printf 'file %p\n' 2>/dev/null
    nft list ruleset 2>/dev/null | sed -E 's/ packets [0-9]+ bytes [0-9]+//; s/^[\t ]*//' |
      awk '/^table/ { table = $2 " " $3 } /[^}]/ { print "nft " table ": " $0 }'
  } | sort
)
