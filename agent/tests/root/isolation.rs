//! What a container sees and what it may not do.

use isopod_proto::agent::{
    Capabilities, CreateContainerRequest, ExecRequest, IdMapping, Mount, PodVolume, Process, Rlimit, SignalRequest,
    StartContainerRequest, StreamKind, UserNamespace, mount,
};

use crate::fixture::{fixture, new_id, request};

#[tokio::test]
async fn root_what_a_container_changes_is_its_own() {
    let Some(mut fixture) = fixture().await else { return };
    let (_, output) = fixture.complete("rm /etc/group; echo >> /etc/passwd; rm -r /tmp; ls /etc").await;
    assert!(!output.contains("group"), "{output}");
    let (_, output) = fixture.complete("ls -d /etc/group /tmp; wc -l < /etc/passwd").await;
    assert_eq!(output, "/etc/group\n/tmp\n2\n");
}

#[tokio::test]
async fn root_the_pods_identity_is_seen() {
    let Some(mut fixture) = fixture().await else { return };
    let (_, output) = fixture.complete("hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf; pwd").await;
    assert_eq!(output, "pod-1\npod-1\n127.0.0.1 localhost\nnameserver 10.0.0.1\n/\n");
}

#[tokio::test]
async fn root_devices_and_special_file_systems_are_there() {
    let Some(mut fixture) = fixture().await else { return };
    let script = "ls /dev; echo x > /dev/null; head -c 3 /dev/zero | wc -c; cat /proc/self/cgroup | tail -n 1; \
        for mount in /sys /sys/fs/cgroup; do grep \" $mount [a-z0-9]* ro,\" /proc/self/mounts | cut -d' ' -f2; done; echo x >/dev/full || echo full";
    let (_, output) = fixture.complete(script).await;
    let lines: Vec<&str> = output.lines().collect();
    for name in [
        "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
        "urandom", "zero",
    ] {
        assert!(lines.contains(&name), "{name} in {output}");
    }
    assert!(output.ends_with("3\n0::/\n/sys\n/sys/fs/cgroup\nfull\n"), "{output}");
}

#[tokio::test]
async fn root_masked_and_readonly_paths_are_so() {
    let Some(mut fixture) = fixture().await else { return };
    let request = CreateContainerRequest {
        masked_paths: vec!["/proc/meminfo".into(), "/bin/../srv".into(), "/missing".into()],
        readonly_paths: vec!["/proc/sys".into(), "/tmp".into(), "/missing".into()],
        ..request(
            "wc -c < /proc/meminfo; ls /srv | wc -l; touch /tmp/x 2>/dev/null || echo readonly; touch /srv/x 2>/dev/null || echo masked",
        )
    };
    assert_eq!(fixture.output_of(request).await, "0\n0\nreadonly\nmasked\n");
}

#[tokio::test]
async fn root_a_readonly_root_has_writable_mounts() {
    let Some(mut fixture) = fixture().await else { return };
    let tmpfs = Mount {
        destination: "/data/deep".into(),
        source: Some(mount::Source::TmpfsSizeBytes(1 << 20)),
        mode: 0o1777,
        ..Mount::default()
    };
    let script = "touch /x 2>/dev/null || echo root; touch /etc/hosts 2>/dev/null || echo hosts; touch /data/deep/x && echo data; \
        touch /dev/shm/x && echo shm; stat -c %a /data/deep";
    let request = CreateContainerRequest { readonly_rootfs: true, mounts: vec![tmpfs], ..request(script) };
    assert_eq!(fixture.output_of(request).await, "root\nhosts\ndata\nshm\n1777\n");
}

#[tokio::test]
async fn root_volumes_are_shared_and_files_are_given() {
    let Some(mut fixture) = fixture().await else { return };
    let written = fixture.volume("data", "", "/v", 0o2777).await;
    let read = Mount { destination: "/w/x".into(), readonly: true, ..written.clone() };
    let file = Mount {
        destination: "/etc/resolv.conf".into(),
        source: Some(mount::Source::FileContents(b"mine\n".to_vec())),
        mode: 0o600,
        ..Mount::default()
    };
    let writer = CreateContainerRequest { mounts: vec![written], ..request("echo shared > /v/f") };
    assert_eq!(fixture.output_of(writer).await, "");
    let reader = CreateContainerRequest {
        mounts: vec![read, file],
        ..request("cat /w/x/f /etc/resolv.conf; stat -c %a /etc/resolv.conf; touch /w/x/f 2>/dev/null || echo readonly")
    };
    assert_eq!(fixture.output_of(reader).await, "shared\nmine\n600\nreadonly\n");
}

#[tokio::test]
async fn root_a_sub_path_of_a_volume_is_what_is_there_or_a_new_directory() {
    let Some(mut fixture) = fixture().await else { return };
    let all = fixture.volume("data", "", "/v", 0o2770).await;
    let script =
        "echo one > /v/file; ln -s /etc /v/out; ln -s ../../../run /v/up; mkdir /v/out-is-not-out; ln -s file /v/link";
    assert_eq!(fixture.output_of(CreateContainerRequest { mounts: vec![all.clone()], ..request(script) }).await, "");
    let mut mounts = vec![all];
    for (destination, path) in
        [("/new", "a/b"), ("/file", "file"), ("/linked", "link"), ("/out", "out"), ("/up", "up/x"), ("/dots", "../..")]
    {
        mounts.push(fixture.volume("data", path, destination, 0).await);
    }
    let script = "touch /new/x; echo two >> /file; cat /linked; stat -c '%a %u:%g' /v /v/a /v/a/b /v/a/b/x; \
        touch /out/made /up/made /dots/top; cd /v; find etc run top | sort | tr '\\n' ' '";
    let seen = fixture.output_of(CreateContainerRequest { mounts, ..request(script) }).await;
    let modes = "2770 0:2000\n2770 0:2000\n2770 0:2000\n644 0:2000\n";
    assert_eq!(seen, format!("one\ntwo\n{modes}etc etc/made run run/x run/x/made top "));
    // What a volume was made with, it keeps; what is no volume, nobody has.
    let other = PodVolume { name: "other".into(), sub_path: String::new() };
    let mount = Mount { destination: "/o".into(), source: Some(mount::Source::Volume(other)), ..Mount::default() };
    let missing = CreateContainerRequest { mounts: vec![mount], ..request("true") };
    assert_eq!(fixture.client.create_container(missing).await.unwrap_err().code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn root_a_link_in_the_image_does_not_lead_a_mount_out() {
    let Some(mut fixture) = fixture().await else { return };
    let mount = Mount {
        destination: "/srv/out/volume".into(),
        source: Some(mount::Source::TmpfsSizeBytes(4096)),
        ..Mount::default()
    };
    let request =
        CreateContainerRequest { mounts: vec![mount], ..request("grep -c ' /escaped/volume ' /proc/self/mounts") };
    assert_eq!(fixture.output_of(request).await, "1\n");
    assert!(!std::path::Path::new("/escaped").exists());
}

#[tokio::test]
async fn root_privileges_are_those_that_were_given() {
    let Some(mut fixture) = fixture().await else { return };
    let script = "grep -E 'Cap|NoNew|Seccomp:' /proc/self/status | tr -s '\\t' ' '; ulimit -n; umask; cat /proc/self/oom_score_adj";
    let mut request = request(script);
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<String>>();
    let process = request.process.as_mut().unwrap();
    process.user.as_mut().unwrap().user = "web".into();
    process.capabilities = Some(Capabilities {
        bounding: names(&["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]),
        effective: names(&["CAP_NET_BIND_SERVICE"]),
        permitted: names(&["CAP_NET_BIND_SERVICE"]),
        inheritable: names(&["CAP_NET_BIND_SERVICE"]),
        ambient: names(&["CAP_NET_BIND_SERVICE"]),
    });
    process.no_new_privs = true;
    process.oom_score_adj = 321;
    process.rlimits = vec![Rlimit { name: "RLIMIT_NOFILE".into(), soft: 100, hard: 200 }];
    // BPF_RET | BPF_K with SECCOMP_RET_ALLOW.
    process.seccomp_filter = [0x06, 0, 0, 0, 0, 0, 0xff, 0x7f].to_vec();
    let bind = "0000000000000400";
    let expected = format!(
        "CapInh: {bind}\nCapPrm: {bind}\nCapEff: {bind}\nCapBnd: 0000000000000401\nCapAmb: {bind}\nNoNewPrivs: 1\nSeccomp: 2\n100\n0022\n321\n"
    );
    assert_eq!(fixture.output_of(request).await, expected);
}

#[tokio::test]
async fn root_a_filter_is_loaded_last_and_for_every_process() {
    let Some(mut fixture) = fixture().await else { return };
    let mut request =
        request("grep -E 'Cap(Prm|Eff|Amb)|NoNew|Seccomp:' /proc/self/status | tr -s '\\t' ' '; exec sleep 100");
    let process = request.process.as_mut().unwrap();
    process.user.as_mut().unwrap().user = "web".into();
    let bind = vec!["CAP_NET_BIND_SERVICE".to_owned()];
    let capabilities = process.capabilities.as_mut().unwrap();
    *capabilities = Capabilities {
        bounding: bind.clone(),
        effective: bind.clone(),
        permitted: bind.clone(),
        inheritable: bind.clone(),
        ambient: bind,
    };
    // setgroups, setresuid, setresgid and close_range end the process:
    // what a process needs to become its user happens before.
    let refused = [116, 117, 119, 436];
    let mut filter = vec![(0x20u16, 0u8, 0u8, 0u32)];
    for (at, number) in (0u8..).zip(refused) {
        filter.push((0x15, 4 - at, 0, number));
    }
    filter.extend([(0x06, 0, 0, 0x7fff_0000), (0x06, 0, 0, 0x8000_0000)]);
    let bytes =
        |(code, yes, no, k): (u16, u8, u8, u32)| [&code.to_ne_bytes()[..], &[yes, no], &k.to_ne_bytes()].concat();
    process.seccomp_filter = filter.into_iter().flat_map(bytes).collect();
    let first = process.clone();
    let id = request.id.clone();
    fixture.client.create_container(request).await.unwrap();
    fixture.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap();

    let bind = "0000000000000400";
    let expected = format!("CapPrm: {bind}\nCapEff: {bind}\nCapAmb: {bind}\nNoNewPrivs: 0\nSeccomp: 2\n");
    let script = first.args[2].replace("exec sleep 100", "");
    let process = Process { args: vec!["sh".into(), "-c".into(), script], ..first };
    let process_id = new_id();
    let request = ExecRequest { container_id: id, process_id: process_id.clone(), process: Some(process) };
    fixture.client.exec(request).await.unwrap();
    let output = fixture.output(&process_id, StreamKind::Stdout).await;
    assert_eq!(String::from_utf8(output).unwrap(), expected);
}

#[tokio::test]
async fn root_a_missing_working_directory_is_made_for_its_user() {
    let Some(mut fixture) = fixture().await else { return };
    let mut request = request("pwd; stat -c %u .; touch here && echo writable");
    let process = request.process.as_mut().unwrap();
    process.cwd = "/made/for/web".into();
    process.user.as_mut().unwrap().user = "web".into();
    assert_eq!(fixture.output_of(request).await, "/made/for/web\n33\nwritable\n");
}

#[tokio::test]
async fn root_nothing_of_the_agent_leaks_into_a_container() {
    let Some(mut fixture) = fixture().await else { return };
    let script = "ls /proc/self/fd | wc -l; grep -c isopod /proc/self/mountinfo; env | grep -vE '^(PATH|HOME|PWD|SHLVL|_)='; \
        grep -E 'Sig(Blk|Ign)' /proc/self/status | tr -s '\\t' ' '";
    let (_, output) = fixture.complete(script).await;
    // 0, 1, 2 and the one ls has open; the bind mounts show the paths inside the agent's file systems, not its directories.
    assert!(output.starts_with("4\n"), "{output}");
    assert!(output.ends_with("SigBlk: 0000000000000000\nSigIgn: 0000000000000000\n"), "{output}");
}

#[tokio::test]
async fn root_devices_that_are_not_in_dev_cannot_be_used() {
    let Some(mut fixture) = fixture().await else { return };
    // The tun device: it exists everywhere, and opening it needs no privilege.
    let script = "mknod /dev/tun c 10 200 && (head -c 1 /dev/tun || true) 2>&1; echo x > /dev/null && head -c 2 /dev/zero | wc -c; : < /dev/ptmx";
    let restricted = fixture.output_of(request(script)).await;
    assert_eq!(restricted, "head: /dev/tun: Operation not permitted\n2\n");
    let privileged = CreateContainerRequest {
        privileged: true,
        ..request(script.replace("mknod", "rm -f /dev/tun; mknod").as_str())
    };
    let free = fixture.output_of(privileged).await;
    assert!(!free.contains("not permitted") && free.ends_with("2\n"), "{free}");
}

#[tokio::test]
async fn root_a_user_namespace_has_its_ids_and_its_files() {
    let Some(mut fixture) = fixture().await else { return };
    let ids = vec![IdMapping { container_id: 0, guest_id: 200_000, length: 65_536 }];
    let namespace = UserNamespace { uids: ids.clone(), gids: ids };
    let volume = fixture.volume("mapped", "", "/v", 0o755).await;
    let tmpfs =
        Mount { destination: "/t/deep".into(), source: Some(mount::Source::TmpfsSizeBytes(4096)), ..Mount::default() };
    let script = "tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map; id -u
        stat -c %u:%g / /etc/passwd /v /t /t/deep /dev /dev/null /dev/shm /etc/hosts | tr '\\n' ' '; echo
        touch /file /etc/passwd /v/file /t/deep/file /dev/shm/file && mkdir /tmp/mine && chown 33:34 /file && chmod 4755 /file
        stat -c %u:%g /file /etc/passwd /v/file /t/deep/file /dev/shm/file /tmp/mine | tr '\\n' ' '; echo
        echo x > /dev/null && head -c 3 /dev/zero | wc -c; mknod /tmp/disk b 254 0 2>/dev/null || echo no disk
        echo 1 > /proc/sys/vm/swappiness 2>/dev/null || echo no sysctl
        touch /sys/kernel/x 2>/dev/null || echo no sysfs
        echo again > /dev/stdout; cat /proc/self/cgroup | tail -n 1; ls /srv | wc -l; touch /tmp/done; exec sleep 100";
    let first = CreateContainerRequest {
        mounts: vec![volume.clone(), tmpfs],
        user_namespace: Some(namespace.clone()),
        masked_paths: vec!["/proc/meminfo".into(), "/srv".into()],
        readonly_paths: vec!["/proc/sys".into()],
        ..request(script)
    };
    let id = first.id.clone();
    fixture.client.create_container(first).await.unwrap();
    fixture.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap();

    let map = "0 200000 65536";
    let (_, seen) = fixture
        .exec(&id, "until [ -e /tmp/done ]; do sleep 0.1; done; tr -s ' ' < /proc/self/uid_map; stat -c %u /file; touch /by-exec; stat -c %u:%g /by-exec")
        .await;
    assert_eq!(seen.lines().map(str::trim).collect::<Vec<_>>(), [map, "33", "0:0"], "exec joins it");
    // On the disk a volume's files have the container's ids, so that a container without a user namespace shares them.
    let plain = CreateContainerRequest { mounts: vec![volume.clone()], ..request("stat -c %u:%g /v/file") };
    assert_eq!(fixture.output_of(plain).await, "0:0\n");

    // Another container of the pod is in the same namespace; a user of it is what /etc/passwd says.
    let mut second = CreateContainerRequest {
        mounts: vec![volume],
        user_namespace: Some(namespace.clone()),
        ..request(
            "id -u; id -G; stat -c %u /v/file; touch /v/x 2>/dev/null || echo denied; echo y > /dev/stdout; readlink /proc/self/ns/user",
        )
    };
    second.process.as_mut().unwrap().user.as_mut().unwrap().user = "web".into();
    let seen = fixture.output_of(second).await;
    let (_, first) = fixture.exec(&id, "readlink /proc/self/ns/user").await;
    assert_eq!(seen, format!("33\n34 6\n0\ndenied\ny\n{first}"));

    let mut nobody = CreateContainerRequest { user_namespace: Some(namespace), ..request("true") };
    nobody.process.as_mut().unwrap().user.as_mut().unwrap().user = "65536".into();
    let error = fixture.client.create_container(nobody).await.unwrap_err();
    assert!(error.message().contains("user 65536 is not mapped"), "{error}");

    let other = vec![IdMapping { container_id: 0, guest_id: 300_000, length: 10 }];
    let other = UserNamespace { uids: other.clone(), gids: other };
    let third = CreateContainerRequest { user_namespace: Some(other), ..request("true") };
    assert!(fixture.client.create_container(third).await.unwrap_err().message().contains("other ids"));
    fixture.client.signal(SignalRequest { process_id: id.clone(), signal: 9, all: true }).await.unwrap();
    let output = String::from_utf8(fixture.output(&id, StreamKind::Stdout).await).unwrap();
    let lines: Vec<&str> = output.lines().map(str::trim).collect();
    assert_eq!(
        lines,
        [
            map,
            map,
            "0",
            "0:0 0:0 0:2000 0:0 0:0 0:0 0:0 0:0 0:0",
            "33:34 0:0 0:0 0:0 0:0 0:0",
            "3",
            "no disk",
            "no sysctl",
            "no sysfs",
            "again",
            "0::/",
            "0"
        ]
    );
}

#[tokio::test]
async fn root_a_terminal_in_a_user_namespace_is_its_users() {
    let Some(mut fixture) = fixture().await else { return };
    let ids = vec![IdMapping { container_id: 0, guest_id: 200_000, length: 65_536 }];
    let script = "tty; stat -c %u:%g $(tty); stat -c %u /dev/console; echo out > /dev/stdout; ls /nothing-else";
    let mut request = CreateContainerRequest {
        user_namespace: Some(UserNamespace { uids: ids.clone(), gids: ids }),
        ..request(script)
    };
    let process = request.process.as_mut().unwrap();
    process.terminal = true;
    process.user.as_mut().unwrap().user = "33".into();
    let id = request.id.clone();
    fixture.client.create_container(request).await.unwrap();
    fixture.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap();
    let output = String::from_utf8(fixture.output(&id, StreamKind::TerminalOutput).await).unwrap();
    assert_eq!(output.lines().take(4).collect::<Vec<_>>(), ["/dev/pts/0", "33:5", "33", "out"], "{output}");
}
