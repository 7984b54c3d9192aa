//! Images: what is pulled is what the guest sees, and what the store tells of it.

use isopod_tests::fixture::{BUSYBOX, Cri, Daemon, TestPod, repository, shell};

const MULTI: &str = "docker.io/isopod/multi:latest";

/// The guest's side of tests/images/oracle.py.
const LISTING: &str = r#"
{
    find /data -type d -print0 | xargs -0 stat -c 'stat %f %u %g %Y %n'
    find /data ! -type d -print0 | xargs -0 stat -c 'stat %f %u %g %Y %s %h %t:%T %n'
    find /data -type l | while read -r link; do echo "link $link $(readlink "$link")"; done
    find /data -type f -print0 | xargs -0 sha256sum | sed 's/^\([0-9a-f]*\)  /sha256 \1 /'
}
"#;

#[tokio::test]
async fn the_guest_sees_exactly_what_the_layers_hold() -> anyhow::Result<()> {
    let pod = TestPod::run("multi").await?;
    pod.cri.pull(MULTI).await?;
    let mut config = shell("multi", "sleep 1000");
    config.image.get_or_insert_default().image = MULTI.to_owned();
    let container = pod.start(config).await?;

    let seen = container.sh(LISTING).await?;
    let mut seen: Vec<&str> = seen.lines().collect();
    seen.sort_unstable();
    let expected = std::fs::read_to_string(repository()?.join("out/images/multi.listing"))?;
    let mut expected: Vec<&str> = expected.lines().collect();
    expected.sort_unstable();
    let short = |line: &&str| line.chars().take(200).collect::<String>();
    let missing: Vec<_> =
        expected.iter().filter(|line| seen.binary_search(line).is_err()).map(short).take(20).collect();
    let surplus: Vec<_> =
        seen.iter().filter(|line| expected.binary_search(line).is_err()).map(short).take(20).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "missing: {missing:#?}\nsurplus: {surplus:#?}");
    assert_eq!(seen.len(), expected.len());

    let attributes = container
        .sh("cd /data/special && getfattr -d -m - -e hex capable xattrs && getfattr -d -m user xattr-dir | wc -c && stat -c %y ../keep")
        .await?;
    for expected in [
        "security.capability=0x0100000200040000000000000000000000000000",
        "user.binary=0xff00fe",
        "user.text=0x76616c7565",
        "user.empty",
    ] {
        assert!(attributes.contains(expected), "{expected} is in {attributes}");
    }
    assert!(attributes.contains("\n3031\n"), "the directory's attribute of 3000 bytes: {attributes}");
    assert!(attributes.contains("22:13:20.123456"), "parts of a second: {attributes}");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn an_image_of_127_layers_is_one_disk_and_one_mount() -> anyhow::Result<()> {
    let pod = TestPod::run("deep").await?;
    let start = async |name: &str| {
        let image = format!("docker.io/isopod/{name}:latest");
        pod.cri.pull(&image).await?;
        let mut config = shell(name, "sleep 1000");
        config.image.get_or_insert_default().image = image;
        pod.start(config).await
    };
    let container = start("deep").await?;
    assert_eq!(container.sh("ls /deep | wc -l; cat /deep/last /deep/001").await?, "64\n125\n1\n");
    assert_eq!(container.sh("ls -d /deep/000 /deep/124 2>/dev/null | wc -l").await?, "0\n");
    // The scratch disk, and the image; the overlay has that alone below it.
    assert_eq!(
        container.sh("ls /sys/block | grep -c ^vd; ls -d /sys/block/vd*/vd* 2>/dev/null | wc -l").await?,
        "2\n0\n"
    );
    let root = container.sh("grep ' / overlay' /proc/self/mounts").await?;
    assert_eq!(root.matches("lowerdir").count(), 1, "{root}");

    // A directory that a layer only implies is what the layer below says.
    let container = start("implicit-parent").await?;
    assert_eq!(container.sh("stat -c '%a %u %g' /data/private; cat /data/private/new").await?, "700 1000 1000\nnew\n");
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn an_image_from_pull_to_remove() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    // Nobody else uses this one.
    let [one, two, three] = [1, 2, 3].map(|tag| format!("gcr.io/k8s-staging-cri-tools/test-image-tags:{tag}"));
    assert_eq!(cri.image(&one).await?, None);
    let reference = cri.pull(&one).await?;
    assert_eq!(cri.pull(&two).await?, reference, "the same image under another name");
    cri.pull(&three).await?;
    let image = cri.image(&one).await?.unwrap_or_default();
    assert!(image.size > 0);
    let mut tags = image.repo_tags.clone();
    tags.sort();
    assert_eq!(tags, [one.clone(), two.clone(), three.clone()]);
    assert_eq!(image.repo_digests.len(), 1, "{:?}", image.repo_digests);
    // By digest it is the same image.
    assert_eq!(cri.image(&image.repo_digests[0]).await?.map(|image| image.id), Some(image.id.clone()));
    assert_eq!(cri.image(&image.id).await?.map(|image| image.id), Some(image.id.clone()));

    let listed =
        cri.images.clone().list_images(isopod_cri_server::cri::ListImagesRequest::default()).await?.into_inner().images;
    assert_eq!(listed.iter().filter(|listed| listed.id == image.id).count(), 1);
    cri.remove_image(&image.id).await?;
    for name in [&one, &two, &three, &image.id] {
        assert_eq!(cri.image(name).await?, None, "{name}");
    }
    cri.remove_image(&one).await?;
    Ok(())
}

#[tokio::test]
async fn an_image_pulled_by_digest_has_no_tag() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    cri.pull(BUSYBOX).await?;
    let digest = cri.image(BUSYBOX).await?.unwrap_or_default().repo_digests.first().cloned().unwrap_or_default();
    cri.remove_image(BUSYBOX).await?;
    cri.pull(&digest).await?;
    let image = cri.image(&digest).await?.unwrap_or_default();
    assert!(image.repo_tags.is_empty(), "{:?}", image.repo_tags);
    assert_eq!(image.repo_digests, [digest]);
    Ok(())
}

#[tokio::test]
async fn the_images_user_is_told() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    let name = |kind: &str| format!("gcr.io/k8s-staging-cri-tools/test-image-{kind}:latest");
    for kind in ["user-uid", "user-username", "user-uid-group", "user-username-group"] {
        cri.pull(&name(kind)).await?;
    }
    for kind in ["user-uid", "user-uid-group"] {
        let image = cri.image(&name(kind)).await?.unwrap_or_default();
        let expected = if kind == "user-uid" { 1002 } else { 1003 };
        assert_eq!((image.uid.map(|uid| uid.value), image.username.as_str()), (Some(expected), ""), "{kind}");
    }
    for kind in ["user-username", "user-username-group"] {
        let image = cri.image(&name(kind)).await?.unwrap_or_default();
        assert_eq!((image.uid, image.username.as_str()), (None, "www-data"), "{kind}");
    }
    Ok(())
}

#[tokio::test]
async fn every_layer_in_the_store_is_accepted_by_fsck_erofs() -> anyhow::Result<()> {
    let daemon = Daemon::start(|_| ()).await?;
    let cri = daemon.cri().await?;
    for image in [MULTI, BUSYBOX, "docker.io/library/nginx:latest"] {
        cri.pull(image).await?;
    }
    let found =
        std::process::Command::new("find").arg(daemon.directory.path()).args(["-type", "f", "-size", "+3"]).output()?;
    let mut checked = 0;
    for path in String::from_utf8(found.stdout)?.lines() {
        let mut start = vec![0; 1028];
        let mut file = std::fs::File::open(path)?;
        // EROFS_SUPER_MAGIC_V1, little-endian, at byte 1024.
        if std::io::Read::read_exact(&mut file, &mut start).is_err() || start[1024..] != [0xe2, 0xe1, 0xf5, 0xe0] {
            continue;
        }
        let result = std::process::Command::new("fsck.erofs").arg(path).output()?;
        assert!(result.status.success(), "{path}: {}", String::from_utf8_lossy(&result.stderr));
        checked += 1;
    }
    // busybox, the libraries, getfattr, nginx, and the five layers of multi; and the metadata of the three images.
    assert_eq!(checked, 9 + 3);
    Ok(())
}

#[tokio::test]
async fn the_file_system_of_the_images_is_told() -> anyhow::Result<()> {
    let cri = Cri::shared().await?;
    cri.pull(BUSYBOX).await?;
    let info =
        cri.images.clone().image_fs_info(isopod_cri_server::cri::ImageFsInfoRequest::default()).await?.into_inner();
    let usage = info.image_filesystems.first().cloned().unwrap_or_default();
    assert!(usage.timestamp > 0 && usage.used_bytes.is_some_and(|used| used.value > 1 << 20), "{info:?}");
    let mountpoint = usage.fs_id.map(|id| id.mountpoint).unwrap_or_default();
    assert!(std::path::Path::new(&mountpoint).is_dir(), "{mountpoint}");
    Ok(())
}
