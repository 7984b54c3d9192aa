//! What a container's process is given: identity, capabilities, limits, files.

use isopod_cri_server::cri;
use isopod_tests::fixture::{TestPod, shell};

/// Puts a security context into a container's configuration.
fn secured(security: cri::LinuxContainerSecurityContext) -> impl FnOnce(&mut cri::ContainerConfig) {
    move |config| config.linux.get_or_insert_default().security_context = Some(security)
}

#[tokio::test]
async fn users_and_groups_are_those_asked_for() -> anyhow::Result<()> {
    let pod = TestPod::run("users").await?;
    let id = "id -u; id -g; id -G";
    let number = |value| Some(cri::Int64Value { value });

    assert_eq!(pod.script(id).await?, "0\n0\n0\n");
    let by_number = cri::LinuxContainerSecurityContext { run_as_user: number(4321), ..Default::default() };
    assert_eq!(pod.script_with(id, secured(by_number)).await?, "4321\n0\n0\n");
    let both = cri::LinuxContainerSecurityContext {
        run_as_user: number(4321),
        run_as_group: number(77),
        ..Default::default()
    };
    assert_eq!(pod.script_with(id, secured(both)).await?, "4321\n77\n77\n");
    // app has the groups users and extra in the image's /etc/group.
    let by_name = cri::LinuxContainerSecurityContext {
        run_as_username: "app".to_owned(),
        supplemental_groups: vec![5555],
        ..Default::default()
    };
    let seen = pod.script_with(id, secured(by_name.clone())).await?;
    let mut groups: Vec<&str> = seen.lines().nth(2).unwrap_or_default().split(' ').collect();
    groups.sort_unstable();
    assert_eq!(groups, ["100", "1000", "2000", "5555"], "{seen}");
    let strict = cri::LinuxContainerSecurityContext {
        supplemental_groups_policy: cri::SupplementalGroupsPolicy::Strict.into(),
        ..by_name
    };
    assert_eq!(pod.script_with(id, secured(strict)).await?, "1000\n1000\n1000 5555\n");

    let mut config = shell("user", "sleep 1000");
    let security = cri::LinuxContainerSecurityContext { run_as_username: "app".to_owned(), ..Default::default() };
    secured(security)(&mut config);
    let user = pod.start(config).await?.status().await?.user.and_then(|user| user.linux).unwrap_or_default();
    assert_eq!((user.uid, user.gid), (1000, 1000), "the status tells the user");
    let mut groups = user.supplemental_groups;
    groups.sort_unstable();
    assert_eq!(groups, [100, 1000, 2000], "and its groups, its own among them");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn the_images_user_is_used_unless_another_one_is_asked_for() -> anyhow::Result<()> {
    let pod = TestPod::run("image-user").await?;
    for (name, expected) in
        [("user-uid", "1002\n0\n"), ("user-username", "33\n33\n"), ("user-uid-group", "1003\n100\n")]
    {
        let image = format!("gcr.io/k8s-staging-cri-tools/test-image-{name}:latest");
        pod.cri.pull(&image).await?;
        let seen = pod
            .script_with("id -u; id -g", |config| config.image.get_or_insert_default().image = image.clone())
            .await?;
        assert_eq!(seen, expected, "{name}");
    }
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn capabilities_are_the_default_ones_with_what_is_added_and_dropped() -> anyhow::Result<()> {
    let pod = TestPod::run("caps").await?;
    let show = "grep -E 'CapPrm|CapEff|CapBnd|NoNewPrivs' /proc/self/status | tr -d '\\t'";
    // CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE SETFCAP
    let default = "00000000a80425fb";
    let seen = pod.script(show).await?;
    assert_eq!(seen, format!("CapPrm:{default}\nCapEff:{default}\nCapBnd:{default}\nNoNewPrivs:0\n"));

    let list = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let changed = cri::LinuxContainerSecurityContext {
        capabilities: Some(cri::Capability {
            add_capabilities: list(&["NET_ADMIN"]),
            drop_capabilities: list(&["CHOWN"]),
            ..Default::default()
        }),
        no_new_privs: true,
        ..Default::default()
    };
    let seen = pod.script_with(show, secured(changed)).await?;
    assert_eq!(seen, "CapPrm:00000000a80435fa\nCapEff:00000000a80435fa\nCapBnd:00000000a80435fa\nNoNewPrivs:1\n");

    let none = cri::LinuxContainerSecurityContext {
        capabilities: Some(cri::Capability { drop_capabilities: list(&["ALL"]), ..Default::default() }),
        ..Default::default()
    };
    let seen = pod.script_with(show, secured(none)).await?;
    assert!(seen.starts_with("CapPrm:0000000000000000\nCapEff:0000000000000000\nCapBnd:0000000000000000\n"), "{seen}");

    let user =
        cri::LinuxContainerSecurityContext { run_as_user: Some(cri::Int64Value { value: 1000 }), ..Default::default() };
    let seen = pod.script_with(show, secured(user)).await?;
    assert!(
        seen.starts_with("CapPrm:0000000000000000\nCapEff:0000000000000000\n"),
        "a user that is not root has none: {seen}"
    );
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn masked_and_read_only_paths_cannot_be_seen_or_written() -> anyhow::Result<()> {
    let pod = TestPod::run("masked").await?;
    let security = cri::LinuxContainerSecurityContext {
        masked_paths: vec!["/bin/ls".to_owned(), "/var/www".to_owned(), "/no/such".to_owned()],
        readonly_paths: vec!["/tmp".to_owned()],
        ..Default::default()
    };
    let mut config = shell("masked", "sleep 1000");
    secured(security)(&mut config);
    let container = pod.start(config).await?;
    // With its path, as the shell has an ls of its own.
    let masked = container.exec(&["sh", "-c", "/bin/ls /"]).await?;
    assert_ne!(masked.code, 0);
    assert_eq!(masked.stdout, "");
    assert!(masked.stderr.contains("Permission denied"), "{masked:?}");
    assert!(container.sh("touch /var/www/file").await.is_err(), "a masked directory is read-only");
    let written = container.exec(&["touch", "/tmp/file"]).await?;
    assert!(written.code != 0 && written.stderr.contains("Read-only"), "{written:?}");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn environment_directory_and_arguments_are_those_asked_for() -> anyhow::Result<()> {
    let pod = TestPod::run("env").await?;
    let image = "docker.io/isopod/multi:latest";
    pod.cri.pull(image).await?;
    let seen = pod
        .script_with(
            "pwd; echo $COLOUR $OWN; echo $0 $1; echo $PATH | grep -c /bin; cat /proc/$$/cmdline | tr '\\0' '|'",
            |config| {
                config.image.get_or_insert_default().image = image.to_owned();
                config.args = vec!["zero".to_owned(), "one two".to_owned()];
                config.envs = vec![cri::KeyValue { key: "OWN".to_owned(), value: "a=b c".into() }];
            },
        )
        .await?;
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[..4], ["/data/dir", "green a=b c", "zero one two", "1"]);
    assert!(lines[4].ends_with("|zero|one two|"), "{}", lines[4]);

    let made = pod.script_with("pwd", |config| config.working_dir = "/made/for/it".to_owned()).await?;
    assert_eq!(made, "/made/for/it\n");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_container_has_the_usual_file_systems_and_devices() -> anyhow::Result<()> {
    let pod = TestPod::run("files").await?;
    let seen = pod
        .script(
            "awk '$2 ~ \"^/(proc|sys|dev|dev/shm|dev/pts|dev/mqueue|sys/fs/cgroup)$\" {print $2, $3}' /proc/mounts | sort
            for d in null zero full random urandom tty; do [ -c /dev/$d ] || echo no $d; done
            readlink /dev/stdout
            readlink /dev/fd
            touch /sys/x 2>/dev/null || echo /sys cannot be written",
        )
        .await?;
    let expected = "/dev tmpfs\n/dev/mqueue mqueue\n/dev/pts devpts\n/dev/shm tmpfs\n/proc proc\n/sys sysfs\n/sys/fs/cgroup cgroup2\n\
                    /proc/self/fd/1\n/proc/self/fd\n/sys cannot be written\n";
    assert_eq!(seen, expected);
    pod.remove().await?;
    Ok(())
}
