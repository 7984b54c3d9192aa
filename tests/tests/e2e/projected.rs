//! ConfigMap, Secret, projected and downward-API volumes of the kubelet: they are in guest memory, follow the host's, and
//! inotify tells of their changes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use isopod_cri_server::cri;
use isopod_tests::fixture::{BUSYBOX, Daemon, Kubelet, TestContainer, TestPod, eventually, shell};
use rustix::process::Signal;

/// busybox with inotifywait.
const INOTIFY: &str = "docker.io/isopod/inotify:latest";
const PATIENCE: Duration = Duration::from_secs(60);

/// Changes a volume as the kubelet's atomic writer does: to files of these names that hold `version`.
fn write(volume: &Path, version: &str, names: &[&str]) -> anyhow::Result<()> {
    let stamp = format!("..2024_01_01_00_00_00.{version}");
    let directory = volume.join(&stamp);
    fs::create_dir(&directory)?;
    for name in names {
        let path = directory.join(name);
        fs::write(&path, format!("{version}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o440))?;
        chown(&path, None, Some(2000))?;
    }
    let old = fs::read_link(volume.join("..data")).ok();
    symlink(&stamp, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    for name in names {
        if fs::symlink_metadata(volume.join(name)).is_err() {
            symlink(format!("..data/{name}"), volume.join(name))?;
        }
    }
    for entry in fs::read_dir(volume)? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        if !name.starts_with("..") && !names.contains(&name.as_str()) {
            fs::remove_file(volume.join(name))?;
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old))?;
    }
    Ok(())
}

fn mount(host: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        readonly: true,
        ..Default::default()
    }
}

/// Waits until `script` prints `wanted` in the container.
async fn until(container: &TestContainer, script: &str, wanted: &str) -> anyhow::Result<()> {
    let mut last = String::new();
    let result = eventually("change in the container", PATIENCE, async || {
        last = match container.sh(script).await {
            Ok(text) => text,
            Err(error) => error.to_string(),
        };
        (last == wanted).then_some(())
    })
    .await;
    ensure!(result.is_ok(), "{script:?} prints {last:?}, not {wanted:?}");
    Ok(())
}

/// Waits until the container has printed a line with `words`.
async fn printed(container: &TestContainer, words: &str) -> anyhow::Result<()> {
    let mut all = String::new();
    let result = eventually("line", PATIENCE, async || {
        all = container.logs().ok()?.iter().map(|line| line.text()).collect();
        all.lines().any(|line| line.contains(words)).then_some(())
    })
    .await;
    ensure!(result.is_ok(), "no line {words:?} in {all:?}");
    Ok(())
}

#[tokio::test]
async fn volumes_of_the_kubelet_follow_the_host_and_inotify_tells() -> anyhow::Result<()> {
    let kubelet = Kubelet::new("1234-uid")?;
    let config = kubelet.volume("configmap", "config")?;
    write(&config, "one", &["a", "b"])?;
    let secret = kubelet.volume("secret", "secret")?;
    kubelet.tmpfs(&secret, "")?;
    write(&secret, "hush", &["token"])?;
    let odd = kubelet.volume("projected", "odd")?;
    write(&odd, "odd", &["file"])?;
    ensure!(Command::new("mkfifo").arg(odd.join("fifo")).status()?.success());

    let mut daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(INOTIFY).await?;
    cri.pull(BUSYBOX).await?;
    let pod = TestPod::run_with(&cri, TestPod::config("projected")).await?;
    let watch = "inotifywait -m --format 'directory %f %e' -e create,moved_to,delete /config &
        inotifywait -m --format 'file %e' -e attrib,delete_self /config/a & wait; sleep 1000";
    let mut watcher = shell("watcher", watch);
    watcher.image = Some(cri::ImageSpec { image: INOTIFY.to_owned(), ..Default::default() });
    watcher.mounts = vec![
        mount(&config, "/config"),
        mount(&secret, "/secret"),
        mount(&odd, "/odd"),
        cri::Mount { readonly: false, ..mount(&config, "/writable") },
    ];
    let watcher = pod.start(watcher).await?;

    // What the kubelet made, and nothing to write.
    assert_eq!(
        watcher.sh("cat /config/a /secret/token /odd/file; readlink /config/a; stat -Lc '%a %u:%g' /config/b").await?,
        "one\nhush\nodd\n..data/a\n440 0:2000\n"
    );
    let types = watcher.sh("awk '$2 ~ /^.(config|secret|odd|writable)$/ {print $2, $3}' /proc/mounts").await?;
    assert_eq!(types, "/config tmpfs\n/secret tmpfs\n/odd virtiofs\n/writable virtiofs\n");
    let refused = watcher.exec(&["sh", "-c", "touch /config/x; rm /config/a; touch /secret/..data/token"]).await?;
    assert_eq!(refused.stderr.matches("Read-only file system").count(), 3, "{}", refused.stderr);
    assert!(daemon.log().contains("inotify will not tell") && daemon.log().contains("fifo"), "{}", daemon.log());
    eventually("watches", PATIENCE, async || {
        let lines = watcher.logs().ok()?;
        (lines.iter().filter(|line| line.text().contains("Watches established")).count() == 2).then_some(())
    })
    .await?;

    // Another container of the pod has the same.
    let mut second = shell("second", "exec sleep 1000");
    second.mounts = vec![mount(&config, "/config")];
    let second = pod.start(second).await?;
    write(&config, "two", &["a", "c"])?;
    for container in [&watcher, &second] {
        until(container, "cat /config/a /config/c; ls /config", "two\ntwo\na\nc\n").await?;
    }
    for line in
        ["directory ..data MOVED_TO", "directory c CREATE", "directory b DELETE", "file ATTRIB", "file DELETE_SELF"]
    {
        printed(&watcher, line).await?;
    }
    // A change of the mode alone.
    fs::set_permissions(config.join("..data/a"), fs::Permissions::from_mode(0o400))?;
    until(&watcher, "stat -Lc %a /config/a", "400\n").await?;
    // One container less changes nothing for the other.
    watcher.stop(0).await?;
    watcher.remove().await?;
    write(&config, "three", &["a"])?;
    until(&second, "cat /config/a", "three\n").await?;

    // What changes while the daemon is away arrives, and what changes afterwards.
    daemon.end(Signal::KILL).await?;
    write(&config, "four", &["a"])?;
    daemon.restart().await?;
    until(&second, "cat /config/a", "four\n").await?;
    write(&config, "five", &["a"])?;
    until(&second, "cat /config/a", "five\n").await?;

    // The last container takes it away; the next has it anew, though the kubelet has made the volume anew as well.
    second.stop(0).await?;
    second.remove().await?;
    fs::remove_dir_all(&config)?;
    fs::create_dir(&config)?;
    write(&config, "six", &["a"])?;
    let mut third = shell("third", "cat /config/a");
    third.mounts = vec![mount(&config, "/config")];
    let (status, lines) = pod.run_to_end(third).await?;
    assert_eq!((status.exit_code, lines[0].text()), (0, "six\n".to_owned()));
    let log = daemon.log();
    assert!(!log.contains("the guest keeps a volume") && !log.contains("stays as it was"), "{log}");
    pod.remove().await?;
    Ok(())
}
