//! Volumes: directories and files of the host, read-only ones, mounts that spread.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use isopod_cri_server::cri::{self, MountPropagation};
use isopod_tests::fixture::{BUSYBOX, TestPod, eventually, shell, unique};
use tonic::Code;

/// A directory of the host's, removed with all that is mounted in it.
struct HostDirectory(PathBuf);

impl HostDirectory {
    fn new(stem: &str) -> anyhow::Result<Self> {
        let path = PathBuf::from(format!("/tmp/{}", unique(stem)));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// One that is a mount of its own, which spreads what is mounted in it.
    fn shared(stem: &str) -> anyhow::Result<Self> {
        let directory = Self::new(stem)?;
        mount(&["-t", "tmpfs", "none"], &directory.0)?;
        mount(&["--make-shared"], &directory.0)?;
        Ok(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for HostDirectory {
    fn drop(&mut self) {
        // It may be no mount.
        let _ = Command::new("umount").args(["-R", "-l"]).arg(&self.0).stderr(std::process::Stdio::null()).status();
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn mount(arguments: &[&str], place: &Path) -> anyhow::Result<()> {
    let status = Command::new("mount").args(arguments).arg(place).status()?;
    ensure!(status.success(), "mount {arguments:?} {}: {status}", place.display());
    Ok(())
}

fn volume(host: &Path, container: &str) -> cri::Mount {
    cri::Mount { host_path: host.display().to_string(), container_path: container.to_owned(), ..Default::default() }
}

#[tokio::test]
async fn directories_and_files_of_the_host_are_the_hosts_own() -> anyhow::Result<()> {
    let host = HostDirectory::new("share")?;
    fs::write(host.path("file"), "from the host\n")?;
    fs::set_permissions(host.path("file"), fs::Permissions::from_mode(0o640))?;
    fs::create_dir(host.path("sub"))?;
    fs::write(host.path("sub/deep"), "deep\n")?;
    symlink(host.path("sub"), host.path("link"))?;
    symlink("/etc/hostname", host.path("escape"))?;
    fs::write(host.path("hosts"), "10.1.2.3 kubelet\n")?;
    fs::write(host.path("termination"), "")?;
    let pod = TestPod::run("share").await?;
    let mut config = shell("share", "exec sleep 1000");
    config.mounts = vec![
        volume(&host.0, "/data"),
        volume(&host.path("link"), "/linked"),
        volume(&host.path("not/there"), "/made"),
        volume(&host.path("hosts"), "/etc/hosts"),
        volume(&host.path("termination"), "/dev/termination-log"),
        cri::Mount { readonly: true, ..volume(&host.0, "/ro") },
    ];
    let container = pod.start(config.clone()).await?;
    assert_eq!(container.status().await?.mounts, config.mounts, "as they were asked for");

    // What the host has.
    assert_eq!(
        container.sh("cat /data/file; stat -c %a /data/file; cat /linked/deep").await?,
        "from the host\n640\ndeep\n"
    );
    assert_eq!(container.sh("cat /etc/hosts").await?, "10.1.2.3 kubelet\n");
    assert!(host.path("not/there").is_dir(), "a missing host path is made");
    // A link is the guest's to follow: in the container, not on the host.
    assert_eq!(container.sh("cat /data/escape").await?, container.sh("cat /etc/hostname").await?);

    // What the container writes.
    container.sh("echo told > /dev/termination-log; echo more >> /etc/hosts; echo x > /made/x").await?;
    assert_eq!(fs::read_to_string(host.path("termination"))?, "told\n");
    assert_eq!(fs::read_to_string(host.path("hosts"))?, "10.1.2.3 kubelet\nmore\n");
    container.sh("mkdir /data/dir; echo 1 > /data/dir/a; mv /data/dir/a /data/dir/b; ln -s b /data/dir/l; chown 7:8 /data/dir/b").await?;
    let made = fs::metadata(host.path("dir/b"))?;
    assert_eq!((made.uid(), made.gid()), (7, 8));
    assert_eq!(fs::read_link(host.path("dir/l"))?, Path::new("b"));
    container.sh("dd if=/dev/urandom of=/data/big bs=1M count=5 2>/dev/null; cp /data/big /big; cmp /data/big /big; rm /data/dir/b").await?;
    assert_eq!(fs::metadata(host.path("big"))?.len(), 5 << 20);
    let sum = container.sh("md5sum < /big").await?;
    let on_host = Command::new("md5sum").stdin(fs::File::open(host.path("big"))?).output()?;
    assert_eq!(sum.as_bytes(), on_host.stdout);
    assert!(!host.path("dir/b").exists());

    // What the host changes meanwhile: at once, in the same file and in one that takes its name.
    fs::write(host.path("file"), "changed\n")?;
    assert_eq!(container.sh("cat /data/file").await?, "changed\n");
    fs::write(host.path("new"), "replaced\n")?;
    fs::rename(host.path("new"), host.path("file"))?;
    fs::remove_file(host.path("sub/deep"))?;
    assert_eq!(container.sh("cat /data/file; ls /linked | wc -l").await?, "replaced\n0\n");

    // Read-only is refused, and the file stays.
    let refused =
        container.exec(&["sh", "-c", "echo no > /ro/file; mkdir /ro/x; rm /ro/file; chmod 777 /ro/file"]).await?;
    assert_eq!(refused.stderr.matches("Read-only file system").count(), 4, "{}", refused.stderr);
    assert_eq!(fs::read_to_string(host.path("file"))?, "replaced\n");
    let options = container.sh("grep ' /ro ' /proc/mounts").await?;
    assert!(options.contains(" ro,"), "{options}");

    // FIFOs and sockets are the guest's; device nodes are not made.
    container.sh("mkfifo /data/fifo; (echo through > /data/fifo &) ; cat /data/fifo").await?;
    let node = container.exec(&["mknod", "/data/null", "c", "1", "3"]).await?;
    assert!(node.code != 0 && !host.path("null").exists(), "{node:?}");
    // mmap, and running what is there.
    fs::copy("/bin/busybox", host.path("busybox"))?;
    assert_eq!(container.sh("/data/busybox echo run").await?, "run\n");

    container.stop(0).await?;
    container.remove().await?;
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn read_only_is_of_one_mount_or_of_all_and_mounts_spread_where_asked() -> anyhow::Result<()> {
    let host = HostDirectory::shared("mounts")?;
    for name in ["tmpfs", "later"] {
        fs::create_dir(host.path(name))?;
    }
    mount(&["-t", "tmpfs", "none"], &host.path("tmpfs"))?;
    let pod = TestPod::run("mounts").await?;
    let mut config = shell("mounts", "exec sleep 1000");
    config.mounts = vec![
        cri::Mount { readonly: true, ..volume(&host.0, "/ro") },
        cri::Mount { readonly: true, recursive_read_only: true, ..volume(&host.0, "/rro") },
        cri::Mount { propagation: MountPropagation::PropagationHostToContainer.into(), ..volume(&host.0, "/slave") },
        volume(&host.0, "/private"),
    ];
    let container = pod.start(config).await?;
    let touch = async |path: &str| container.exec(&["touch", path]).await;
    assert!(touch("/ro/x").await?.stderr.contains("Read-only file system"));
    assert_eq!(touch("/ro/tmpfs/x").await?.code, 0, "a mount below is as it is on the host");
    assert!(host.path("tmpfs/x").exists());
    assert!(touch("/rro/x").await?.stderr.contains("Read-only file system"));
    assert!(touch("/rro/tmpfs/y").await?.stderr.contains("Read-only file system"));
    assert!(!host.path("tmpfs/y").exists());

    mount(&["-t", "tmpfs", "none"], &host.path("later"))?;
    fs::write(host.path("later/flag"), "")?;
    assert_eq!(container.sh("ls /slave/later").await?, "flag\n");
    assert_eq!(container.sh("ls /private/later; ls /rro/later").await?, "");
    // What is mounted in the container stays there.
    let status = container.status().await?;
    assert_eq!(status.mounts[2].propagation(), MountPropagation::PropagationHostToContainer);

    // When the container is gone, nothing of it holds the host's mounts.
    container.stop(0).await?;
    container.remove().await?;
    for name in ["later", "tmpfs"] {
        let path = host.path(name);
        eventually("end of a mount", Duration::from_secs(20), async || {
            let status = Command::new("umount").arg(&path).stderr(std::process::Stdio::null()).status();
            status.ok().filter(std::process::ExitStatus::success)
        })
        .await?;
    }
    // The next container of the pod has the file server's services too.
    let mut config = shell("next", "cat /data/x");
    fs::write(host.path("x"), "next\n")?;
    config.mounts = vec![volume(&host.0, "/data")];
    let (status, lines) = pod.run_to_end(config).await?;
    assert_eq!((status.exit_code, lines[0].text()), (0, "next\n".to_owned()));
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_volume_that_cannot_be_had_is_refused_by_its_name() -> anyhow::Result<()> {
    let host = HostDirectory::new("refused")?;
    fs::write(host.path("file"), "")?;
    let pod = TestPod::run("refused").await?;
    let hostile = cri::Mount { readonly: true, recursive_read_only: true, ..volume(&host.0, "/data") };
    let private = HostDirectory::new("private")?;
    mount(&["-t", "tmpfs", "none"], &private.0)?;
    mount(&["--make-private"], &private.0)?;
    let to_container = MountPropagation::PropagationHostToContainer.into();
    for (mount, code, word) in [
        (volume(&host.0, "/proc/x"), Code::InvalidArgument, "/proc/x"),
        (volume(&host.0, "/a/../.."), Code::InvalidArgument, "/a/../.."),
        (volume(Path::new("relative"), "/data"), Code::InvalidArgument, "host_path"),
        (volume(&host.path("file/below"), "/data"), Code::NotFound, "file/below"),
        (cri::Mount { propagation: 2, ..volume(&host.0, "/data") }, Code::Unimplemented, "PROPAGATION_BIDIRECTIONAL"),
        (cri::Mount { propagation: to_container, ..hostile.clone() }, Code::InvalidArgument, "recursive_read_only"),
        (cri::Mount { readonly: false, ..hostile }, Code::InvalidArgument, "recursive_read_only"),
        (cri::Mount { propagation: to_container, ..volume(&private.0, "/data") }, Code::FailedPrecondition, "shared"),
    ] {
        let mut config = shell("refused", "true");
        config.mounts = vec![mount];
        let status = pod.create(config).await.err().context("refused")?;
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(word), "{status}");
    }
    // Nothing is left behind that would be in the way.
    assert_eq!(pod.script("echo fine").await?, "fine\n");
    pod.remove().await?;
    Ok(())
}

const MULTI: &str = "docker.io/isopod/multi:latest";

fn image_volume(image: &str, sub_path: &str, container: &str) -> cri::Mount {
    cri::Mount {
        image: Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() }),
        image_sub_path: sub_path.to_owned(),
        container_path: container.to_owned(),
        readonly: true,
        ..Default::default()
    }
}

#[tokio::test]
async fn images_are_volumes_and_block_devices_are_devices() -> anyhow::Result<()> {
    let pod = TestPod::run("images").await?;
    pod.cri.pull(MULTI).await?;
    let host = HostDirectory::new("device")?;
    fs::write(host.path("disk"), [b"on the host's disk\n".as_slice(), &vec![0; 1 << 20]].concat())?;
    let found = Command::new("losetup").args(["--show", "-f"]).arg(host.path("disk")).output()?;
    ensure!(found.status.success(), "losetup: {}", String::from_utf8_lossy(&found.stderr));
    let disk = String::from_utf8(found.stdout)?.trim().to_owned();
    let device = |container: &str, host: &str, permissions: &str| cri::Device {
        container_path: container.to_owned(),
        host_path: host.to_owned(),
        permissions: permissions.to_owned(),
    };
    let mut config = shell("images", "exec sleep 1000");
    config.mounts = vec![
        image_volume(BUSYBOX, "", "/busybox"),
        image_volume(MULTI, "data", "/multi"),
        image_volume(MULTI, "data/link-to-dir", "/linked"),
    ];
    config.devices = vec![
        device("/dev/data/disk", &disk, "rwm"),
        device("/dev/readonly", &disk, "r"),
        device("/dev/net/tun", "/dev/net/tun", "rwm"),
    ];
    let container = pod.start(config).await?;

    // As in a container, but nothing to write.
    assert_eq!(
        container.sh("/busybox/bin/busybox echo run; cat /multi/keep; ls /multi/removed 2>&1 | wc -l").await?,
        "run\nkept\n1\n"
    );
    assert_eq!(container.sh("ls -d /multi/replaced /linked/sub").await?, "/linked/sub\n/multi/replaced\n");
    for path in ["/busybox/x", "/multi/x", "/linked/x"] {
        let refused = container.exec(&["touch", path]).await?;
        assert!(refused.stderr.contains("Read-only file system"), "{path}: {}", refused.stderr);
    }
    let mounts = container.status().await?.mounts;
    let image = mounts[1].image.clone().context("an image")?;
    assert!(image.image.starts_with("sha256:"), "the kubelet looks for the id: {image:?}");
    assert_eq!(image.user_specified_image, MULTI);

    // The host's bytes, and the host gets what is written.
    assert_eq!(
        container.sh("head -n 1 /dev/data/disk; head -n 1 /dev/readonly").await?,
        "on the host's disk\n".repeat(2)
    );
    let refused = container.exec(&["sh", "-c", "echo no > /dev/readonly"]).await?;
    assert_ne!(refused.code, 0, "{refused:?}");
    container.sh("printf guest | dd of=/dev/data/disk conv=notrunc,fsync 2>/dev/null").await?;
    let node = container.sh("ls -l /dev/net/tun").await?;
    assert!(node.starts_with('c') && node.contains(" 200 "), "{node}");
    container.stop(0).await?;
    container.remove().await?;
    assert!(fs::read(&disk)?.starts_with(b"gueste host's disk"));

    // With the container everything is given back, so that it can be had again.
    let status = Command::new("losetup").args(["-d", &disk]).status()?;
    assert!(status.success());
    let mut config = shell("again", "cat /multi/keep");
    config.mounts = vec![image_volume(MULTI, "data", "/multi")];
    let (status, lines) = pod.run_to_end(config).await?;
    assert_eq!((status.exit_code, lines[0].text()), (0, "kept\n".to_owned()));

    for (devices, mounts, code, word) in [
        (vec![device("/dev/x", "/dev/kmsg", "rwm")], vec![], Code::Unimplemented, "/dev/kmsg"),
        (vec![device("/dev/x", "/dev/no-such", "rwm")], vec![], Code::NotFound, "/dev/no-such"),
        (vec![device("/data", "/dev/null", "rwm")], vec![], Code::InvalidArgument, "container_path"),
        (vec![], vec![image_volume("no.example/such:image", "", "/x")], Code::NotFound, "no.example"),
        (vec![], vec![image_volume(MULTI, "no/such/path", "/x")], Code::NotFound, "no/such/path"),
        (
            vec![],
            vec![cri::Mount { readonly: false, ..image_volume(MULTI, "", "/x") }],
            Code::InvalidArgument,
            "readonly",
        ),
    ] {
        let mut config = shell("refused", "true");
        (config.devices, config.mounts) = (devices, mounts);
        let status = pod.create(config).await.err().context("refused")?;
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(word), "{status}");
    }
    pod.remove().await?;
    Ok(())
}
