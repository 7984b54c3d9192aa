use super::*;

fn id() -> ObjectId {
    ObjectId::from_random([0xab; 32])
}

#[test]
fn the_hierarchy_is_found_among_the_mounts() {
    let mounts =
        "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
    assert_eq!(mounted(mounts), Some("/sys/fs/cgroup".into()));
    assert_eq!(mounted("proc /proc proc rw 0 0\n"), None);
}

#[test]
fn a_sandbox_is_below_its_parent() {
    let path = path_of(Driver::Cgroupfs, "/kubepods/burstable/pod1", &id()).expect("a good parent");
    assert_eq!(path, PathBuf::from(format!("kubepods/burstable/pod1/isopod-{}", id())));
    assert!(path_of(Driver::Cgroupfs, "", &id()).expect("the default").starts_with("isopod"));
}

#[test]
fn only_cgroups_of_unknown_sandboxes_are_orphans() {
    let hierarchy = tempfile::tempdir().expect("a directory");
    let other = ObjectId::from_random([1; 32]);
    for name in [format!("isopod/isopod-{}", id()), format!("isopod/isopod-{other}"), "isopod/isopod-x".into()] {
        std::fs::create_dir_all(hierarchy.path().join(name)).expect("made");
    }
    let expected = hierarchy.path().join(format!("isopod/isopod-{other}"));
    assert_eq!(orphans_below(hierarchy.path(), &[id()]), [expected]);
    assert!(orphans_below(Path::new("/nowhere"), &[]).is_empty());
}

#[tokio::test]
async fn a_restriction_is_lifted_to_what_the_parent_has() {
    let parent = tempfile::tempdir().expect("a directory");
    let path = parent.path().join("pod");
    std::fs::create_dir(&path).expect("made");
    for (file, text) in [("cgroup.procs", ""), ("cgroup.subtree_control", "cpu\n"), ("cpuset.cpus.effective", "0-3\n")]
    {
        std::fs::write(parent.path().join(file), text).expect("written");
    }
    let read = |path: &Path, file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
    restrict(&path, &CpuSets::default()).await.expect("nothing to do");
    assert_eq!(read(parent.path(), "cgroup.subtree_control"), "cpu\n");
    let sets = CpuSets { cpus: CpuSet::parse("1-2"), mems: None };
    restrict(&path, &sets).await.expect("restricted");
    assert_eq!((read(&path, "cpuset.cpus").as_str(), path.join("cpuset.mems").exists()), ("1-2", false));
    assert_eq!(read(parent.path(), "cgroup.subtree_control"), "+cpuset");
    restrict(&path, &CpuSets::default()).await.expect("lifted");
    assert_eq!(read(&path, "cpuset.cpus").trim(), "0-3");
}

#[test]
fn a_parent_outside_the_hierarchy_is_refused() {
    for bad in ["relative", "/a/../../etc", ".."] {
        assert!(matches!(path_of(Driver::Cgroupfs, bad, &id()), Err(CgroupError::BadParent { .. })), "{bad}");
    }
}

#[test]
fn a_scope_is_below_its_slice_and_below_nothing_else() {
    let path = |parent: &str| path_of(Driver::Systemd, parent, &id());
    let name = format!("isopod-{}.scope", id());
    let pod = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice";
    for parent in ["kubepods-burstable-pod1_2.slice".to_owned(), format!("/{pod}")] {
        assert_eq!(path(&parent).expect("a slice"), Path::new(pod).join(&name));
    }
    assert_eq!(path("").expect("the default"), Path::new("isopod.slice").join(&name));
    assert_eq!(path("-.slice").expect("the root"), Path::new(&name));
    let bad = [
        "/kubepods/burstable/pod1",
        "/kubepods-burstable.slice",
        "a.slice/../b.slice",
        "/other.slice/a-b.slice",
        "a--b.slice",
        "-a.slice",
        "a-.slice",
        ".slice",
        "a.scope",
        "a b.slice",
        "a\0.slice",
    ];
    for bad in bad {
        assert!(matches!(path(bad), Err(CgroupError::NoSlice { .. })), "{bad:?}");
    }
}

#[test]
fn a_kill_for_want_of_memory_is_seen() {
    let cgroup = tempfile::tempdir().expect("a directory");
    assert_eq!(oom_killed(cgroup.path()), None);
    for (count, killed) in [(0, false), (2, true)] {
        let events = format!("low 0\nhigh 0\nmax 7\noom 1\noom_kill {count}\noom_group_kill 0\n");
        std::fs::write(cgroup.path().join("memory.events"), events).expect("written");
        assert_eq!(oom_killed(cgroup.path()), Some(killed));
    }
}
