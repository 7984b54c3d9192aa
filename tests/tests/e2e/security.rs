//! What confines a container in its guest: seccomp, namespaces, users of its own, devices.

use isopod_cri_server::cri::security_profile::ProfileType;
use isopod_cri_server::cri::{self, LinuxContainerSecurityContext as Context};
use isopod_tests::fixture::{TestContainer, TestPod, shell};
use tonic::Code;

/// A container that sleeps, in a security context.
async fn sleeper(pod: &TestPod, stem: &str, context: Context) -> anyhow::Result<TestContainer> {
    Ok(pod.start(secured(stem, "exec sleep 1000", context)).await?)
}

fn secured(stem: &str, script: &str, context: Context) -> cri::ContainerConfig {
    let mut config = shell(stem, script);
    config.linux.get_or_insert_default().security_context = Some(context);
    config
}

fn profile(kind: ProfileType, path: &str) -> Context {
    let seccomp = cri::SecurityProfile { profile_type: kind.into(), localhost_ref: path.to_owned() };
    Context { seccomp: Some(seccomp), ..Default::default() }
}

fn adding(capability: &str, context: Context) -> Context {
    let add_capabilities = vec![capability.to_owned()];
    Context { capabilities: Some(cri::Capability { add_capabilities, ..Default::default() }), ..context }
}

#[tokio::test]
async fn seccomp_profiles_are_enforced() -> anyhow::Result<()> {
    let pod = TestPod::run("seccomp").await?;
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name).display().to_string();
    let refuse = |call: &str| {
        format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":[{call}],"action":"SCMP_ACT_ERRNO"}}]}}"#)
    };
    std::fs::write(path("chmod.json"), refuse(r#""chmod","fchmodat""#))?;
    std::fs::write(path("hostname.json"), refuse(r#""sethostname""#))?;
    std::fs::write(path("unknown.json"), refuse(r#""sethostnam""#))?;
    std::fs::write(path("bad.json"), "{")?;
    let mode = "grep Seccomp: /proc/self/status";

    let plain = sleeper(&pod, "nil", Context::default()).await?;
    assert_eq!(plain.sh(mode).await?, "Seccomp:\t0\n", "none asked for is none");
    plain.sh("chmod 700 /tmp && unshare -U true").await?;

    let own = cri::NamespaceOption { pid: cri::NamespaceMode::Container.into(), ..Default::default() };
    let context = Context { namespace_options: Some(own), ..profile(ProfileType::RuntimeDefault, "") };
    let default = sleeper(&pod, "default", context).await?;
    assert_eq!(default.sh(mode).await?, "Seccomp:\t2\n", "exec has the filter too");
    assert_eq!(default.sh("cat /proc/1/status | grep Seccomp:").await?, "Seccomp:\t2\n");
    let refused = default.exec(&["unshare", "-U", "true"]).await?;
    assert!(refused.code != 0 && refused.stderr.contains("Operation not permitted"), "{refused:?}");
    default.sh("chmod 700 /tmp && (sleep 0 & wait) && date && ps >/dev/null").await?;

    // What the kernel would refuse or not by the capability alone, the default profile lets through with it.
    let admin = sleeper(&pod, "admin", adding("SYS_ADMIN", profile(ProfileType::RuntimeDefault, ""))).await?;
    admin.sh("hostname $(hostname) && unshare -U true").await?;

    let local = sleeper(&pod, "local", profile(ProfileType::Localhost, &path("chmod.json"))).await?;
    assert_eq!(local.sh(mode).await?, "Seccomp:\t2\n");
    let refused = local.exec(&["chmod", "700", "/tmp"]).await?;
    assert!(refused.code != 0 && refused.stderr.contains("Operation not permitted"), "{refused:?}");

    #[expect(deprecated, reason = "clients may still set the old field")]
    let old = Context { seccomp_profile_path: format!("localhost/{}", path("hostname.json")), ..Default::default() };
    let old = adding("SYS_ADMIN", old);
    let refused = pod.script_with("hostname x", |config| {
        config.linux.get_or_insert_default().security_context = Some(old.clone());
    });
    assert!(refused.await.is_err(), "a profile counts although the capability is there");
    pod.script_with("hostname $(hostname); grep 'Seccomp:.0' /proc/self/status", |config| {
        config.linux.get_or_insert_default().security_context = Some(Context { privileged: true, ..old });
    })
    .await?;

    for (name, problem) in [
        ("missing.json", "No such file"),
        ("bad.json", "not a seccomp profile"),
        ("unknown.json", "sethostnam"),
        ("", "not a regular file"),
    ] {
        let context = profile(ProfileType::Localhost, &path(name));
        let error = pod.create(secured("bad", "true", context)).await.expect_err(name);
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(problem) && error.message().contains(&path(name)), "{error}");
    }
    pod.remove().await?;
    Ok(())
}

fn namespaces(options: cri::NamespaceOption) -> Context {
    Context { namespace_options: Some(options), ..Default::default() }
}

#[tokio::test]
async fn ipc_and_pid_namespaces_are_of_the_pod_the_container_or_the_guest() -> anyhow::Result<()> {
    let pod = TestPod::run("namespaces").await?;
    let own = |pid, ipc| cri::NamespaceOption { pid, ipc, ..Default::default() };
    let (container, node) = (cri::NamespaceMode::Container.into(), cri::NamespaceMode::Node.into());

    let shared = sleeper(&pod, "shared", namespaces(own(container, 0))).await?;
    shared.sh("echo hello > /dev/shm/file; touch /dev/mqueue/queue").await?;
    let ipc = shared.sh("readlink /proc/self/ns/ipc").await?;
    let seen = "cat /dev/shm/file; ls /dev/mqueue; readlink /proc/self/ns/ipc";
    let in_pod = pod.script_with(seen, |config| {
        config.linux.get_or_insert_default().security_context = Some(namespaces(own(container, 0)));
    });
    assert_eq!(in_pod.await?, format!("hello\nqueue\n{ipc}"));
    let private = sleeper(&pod, "private", namespaces(own(container, container))).await?;
    private.sh("touch /dev/shm/own /dev/mqueue/own").await?;
    assert_eq!(private.sh("ls /dev/shm /dev/mqueue").await?, "/dev/mqueue:\nown\n\n/dev/shm:\nown\n");
    assert_ne!(private.sh("readlink /proc/self/ns/ipc").await?, ipc);
    assert_eq!(shared.sh("ls /dev/shm").await?, "file\n");

    // All of the guest: the agent is its process 1, and every container's processes are there. Nothing of the machine is.
    let all = sleeper(&pod, "all", namespaces(own(node, 0))).await?;
    let seen = all.sh("cat /proc/1/comm; ps | grep -c '[s]leep 1000'; ps | grep -c '[i]sopod-vmm'; true").await?;
    assert_eq!(seen, "init\n3\n0\n");
    let signalled = all.exec(&["sh", "-c", "kill -KILL 1; echo $?; readlink /proc/1/exe || cat /proc/1/mem"]).await?;
    assert_eq!(signalled.stdout, "0\n", "the agent is there and shows nothing of itself: {signalled:?}");
    all.sh("true").await?;

    let context = namespaces(own(0, node));
    let refused = pod.create(secured("host-ipc", "true", context)).await.expect_err("IPC of the host");
    assert_eq!(refused.code(), Code::Unimplemented, "{refused}");
    for (network, ipc, named) in [(node, 0, "network"), (0, node, "ipc")] {
        let mut config = TestPod::config("refused");
        let options = cri::NamespaceOption { network, ipc, ..Default::default() };
        config.linux.get_or_insert_default().security_context =
            Some(cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
        let error = TestPod::run_with(&pod.cri, config).await.expect_err(named);
        let error = error.downcast::<tonic::Status>()?;
        assert_eq!(error.code(), Code::Unimplemented);
        assert!(error.message().contains(named), "{error}");
    }
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn privileges_and_sysctls_are_the_guests() -> anyhow::Result<()> {
    let mut config = TestPod::config("privileges");
    let sysctls = [("net.ipv4.ip_forward", "1"), ("kernel.shm_rmid_forced", "1"), ("vm.overcommit_memory", "1")];
    let linux = config.linux.get_or_insert_default();
    linux.sysctls = sysctls.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let cri = isopod_tests::fixture::Cri::shared().await?;
    cri.pull(isopod_tests::fixture::BUSYBOX).await?;
    let pod = TestPod::run_with(&cri, config).await?;

    // Process 1 of the container has what its user was given, and so has what it runs.
    let ambient =
        cri::Capability { add_ambient_capabilities: vec!["NET_BIND_SERVICE".to_owned()], ..Default::default() };
    let user = Some(cri::Int64Value { value: 1000 });
    let context = Context { run_as_user: user, capabilities: Some(ambient), no_new_privs: true, ..Default::default() };
    let plain = sleeper(&pod, "ambient", context).await?;
    let bind = "0000000000000400";
    let seen = plain.sh("grep -E 'Cap(Eff|Amb)|NoNewPrivs' /proc/self/status | tr -d '\\t'").await?;
    assert_eq!(seen, format!("CapEff:{bind}\nCapAmb:{bind}\nNoNewPrivs:1\n"));
    let seen =
        plain.sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced /proc/sys/vm/overcommit_memory");
    assert_eq!(seen.await?, "1\n1\n1\n");
    let refused = plain.exec(&["sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward"]).await?;
    assert_ne!(refused.code, 0);

    let privileged = sleeper(&pod, "privileged", Context { privileged: true, ..Default::default() }).await?;
    let seen = privileged.sh("grep CapEff /proc/self/status | tr -d '\\t'; ls /dev | grep -c '^vd[a-z]$'; brctl addbr br7; ls -d /sys/class/net/br7; brctl delbr br7");
    assert_eq!(seen.await?.lines().next(), Some("CapEff:000001ffffffffff"), "all of the guest");
    privileged
        .sh("mount -t tmpfs none /mnt 2>/dev/null || mount -t tmpfs none /tmp; echo 0 > /proc/sys/net/ipv4/ip_forward")
        .await?;
    assert_eq!(plain.sh("cat /proc/sys/net/ipv4/ip_forward").await?, "0\n", "the pod has one network");
    assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward")?.trim(), "1", "and the machine another");
    pod.remove().await?;
    Ok(())
}

fn mapped(mode: cri::NamespaceMode, ids: &[(u32, u32, u32)]) -> cri::NamespaceOption {
    let ids: Vec<_> =
        ids.iter().map(|&(container_id, host_id, length)| cri::IdMapping { host_id, container_id, length }).collect();
    let userns = cri::UserNamespace { mode: mode.into(), uids: ids.clone(), gids: ids };
    cri::NamespaceOption {
        pid: cri::NamespaceMode::Container.into(),
        userns_options: Some(userns),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_pod_has_a_user_namespace_with_the_ids_it_was_given() -> anyhow::Result<()> {
    let cri = isopod_tests::fixture::Cri::shared().await?;
    cri.pull(isopod_tests::fixture::BUSYBOX).await?;
    let with = |options: cri::NamespaceOption| {
        let mut config = TestPod::config("userns");
        config.linux.get_or_insert_default().security_context =
            Some(cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
        config
    };
    use cri::NamespaceMode::{Container, Node, Pod, Target};
    for options in [
        mapped(Pod, &[(0, 1000, 100_000), (0, 2000, 100_000)]),
        mapped(Pod, &[(1, 1000, 100_000)]),
        mapped(Pod, &[]),
        mapped(Container, &[]),
        mapped(Target, &[]),
    ] {
        let error = TestPod::run_with(&cri, with(options.clone())).await.expect_err("refused");
        let error = error.downcast::<tonic::Status>()?;
        assert_eq!(error.code(), Code::InvalidArgument, "{options:?}: {error}");
    }
    let status = cri.runtime.clone().status(cri::StatusRequest { verbose: false }).await?.into_inner();
    let told = |handler: &cri::RuntimeHandler| handler.features.is_some_and(|features| features.user_namespaces);
    assert!(!status.runtime_handlers.is_empty() && status.runtime_handlers.iter().all(told));

    let options = mapped(Pod, &[(0, 1000, 100_000)]);
    let pod = TestPod::run_with(&cri, with(options.clone())).await?;
    let ids = "tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map";
    let mut config = secured("root", "echo mine > /file; chown 33:33 /file; exec sleep 1000", namespaces(options));
    config.linux.get_or_insert_default().resources =
        Some(cri::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() });
    let root = pod.start(config).await?;
    assert_eq!(root.sh(ids).await?, " 0 1000 100000\n 0 1000 100000\n");
    let seen = root.sh(
        "id -u; stat -c %u:%g / /etc/passwd /home/app /dev/null /dev/shm /etc/hosts /proc/1 | tr '\\n' ' '; echo; cat /sys/fs/cgroup/memory.max
         until [ -e /file ]; do sleep 0.1; done; sleep 1; stat -c %u:%g /file; echo >> /etc/passwd; rm -r /home/app; stat -c %u:%g /etc/passwd
         nc -l -p 80 & sleep 1; kill $! && echo port 80
         mkdir /tmp/m && mount -t tmpfs none /tmp/m 2>/dev/null || echo no mount
         mount -o remount,rw /sys 2>/dev/null || echo no remount
         mknod /disk b 254 0 2>/dev/null || echo no disk",
    );
    assert_eq!(
        seen.await?,
        "0\n0:0 0:0 1000:1000 0:0 0:0 0:0 0:0 \n67108864\n33:33\n0:0\nport 80\nno mount\nno remount\nno disk\n"
    );

    // A container that says nothing is in its pod's; a user, a terminal and more capabilities work in it.
    let context = Context { run_as_user: Some(cri::Int64Value { value: 33 }), ..Default::default() };
    let context = adding("SYS_ADMIN", Context { no_new_privs: false, ..context });
    let mut config = secured("user", "id -u; stat -c %u:%g $(tty); echo out > /dev/stdout; exec sleep 1000", context);
    config.tty = true;
    let user = pod.start(config).await?;
    assert_eq!(user.sh(ids).await?.replace('\r', ""), " 0 1000 100000\n 0 1000 100000\n");
    let lines = user.logged("output", std::time::Duration::from_secs(30), |lines| lines.len() >= 3).await?;
    let text: String = lines.iter().map(isopod_tests::fixture::LogLine::text).collect();
    assert_eq!(text.replace('\r', ""), "33\n33:5\nout\n");
    let context = adding("SYS_ADMIN", profile(ProfileType::RuntimeDefault, ""));
    let seen =
        pod.script_with("mount -t tmpfs none /tmp && echo mounted; grep 'Seccomp:' /proc/self/status", |config| {
            config.linux.get_or_insert_default().security_context = Some(Context { readonly_rootfs: true, ..context });
        });
    assert_eq!(seen.await?, "mounted\nSeccomp:\t2\n");

    let other = namespaces(mapped(Node, &[]));
    let refused = pod.create(secured("other", "true", other)).await.expect_err("not that of its pod");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    pod.remove().await?;
    Ok(())
}
