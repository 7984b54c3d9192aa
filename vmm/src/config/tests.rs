use std::os::fd::IntoRawFd;

use isopod_proto::vmm::{Disk, NetworkInterface, Segment, User};

use super::*;

/// A descriptor that the code under test will own.
fn fd() -> RawFd {
    tempfile::tempfile().expect("a temporary file").into_raw_fd()
}

fn valid() -> VmConfig {
    VmConfig {
        vcpus: 2,
        memory_bytes: 128 << 20,
        kernel_fd: fd(),
        initramfs_fd: fd(),
        control_fd: fd(),
        vsock_fd: fd(),
        guest_cid: 3,
        user: Some(User { uid: 0x7000_0000, gid: 0x7000_0000 }),
        exit_fd: fd(),
        ..VmConfig::default()
    }
}

fn disk(id: &str, segments: &[(RawFd, u64, u64)]) -> Disk {
    let segments = segments.iter().map(|&(fd, offset, length)| Segment { fd, offset, length }).collect();
    Disk { id: id.into(), readonly: true, segments }
}

fn mistakes(config: VmConfig) -> Vec<String> {
    match Config::from_wire(config) {
        Err(ConfigError::Invalid(mistakes)) => mistakes,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_valid_configuration_is_taken_with_its_devices() {
    let shared = fd();
    let config = VmConfig {
        disks: vec![disk("img-1", &[(shared, 0, 512), (shared, 512, 1024)]), disk("scratch", &[(fd(), 0, 4096)])],
        interfaces: vec![NetworkInterface { tap_fd: fd(), mac: vec![2, 0, 0, 0, 0, 1], mtu: 1500 }],
        ..valid()
    };
    let config = Config::from_wire(config).expect("valid");
    assert_eq!(config.vcpus, 2);
    let disks: Vec<_> = config.devices.disks.iter().map(|disk| (disk.id.as_str(), disk.segments.len())).collect();
    assert_eq!(disks, [("img-1", 2), ("scratch", 1)]);
    assert_eq!(config.devices.interfaces[0].mtu, 1500);
}

#[test]
fn each_bad_value_is_named_by_its_field() {
    let cases: Vec<(&str, VmConfig)> = vec![
        ("vcpus", VmConfig { vcpus: 0, ..valid() }),
        ("vcpus", VmConfig { vcpus: 65, ..valid() }),
        ("memory_bytes", VmConfig { memory_bytes: 12345, ..valid() }),
        ("max_vcpus", VmConfig { vcpus: 2, max_vcpus: 1, ..valid() }),
        ("max_vcpus", VmConfig { max_vcpus: 65, ..valid() }),
        ("max_memory_bytes", VmConfig { max_memory_bytes: u64::MAX, ..valid() }),
        ("guest_cid", VmConfig { guest_cid: 2, ..valid() }),
        ("guest_cid", VmConfig { guest_cid: u64::MAX, ..valid() }),
        ("cmdline", VmConfig { cmdline: "a\0b".into(), ..valid() }),
        ("user.uid", VmConfig { user: Some(User { uid: 0, gid: 1 }), ..valid() }),
        ("user.gid", VmConfig { user: Some(User { uid: 1, gid: 0 }), ..valid() }),
        ("user.uid", VmConfig { user: Some(User { uid: u32::MAX, gid: 1 }), ..valid() }),
        ("kernel_fd", VmConfig { kernel_fd: -1, ..valid() }),
        ("initramfs_fd", VmConfig { initramfs_fd: 1_000_000, ..valid() }),
        ("control_fd", VmConfig { control_fd: 0, ..valid() }),
        ("disks[0].id", VmConfig { disks: vec![disk("a/b", &[(fd(), 0, 512)])], ..valid() }),
        ("disks[0].segments", VmConfig { disks: vec![disk("a", &[])], ..valid() }),
        ("disks[0].segments[0]", VmConfig { disks: vec![disk("a", &[(fd(), 1, 512)])], ..valid() }),
        ("disks[0].segments[0]", VmConfig { disks: vec![disk("a", &[(fd(), 0, 0)])], ..valid() }),
        ("disks[0].segments[0]", VmConfig { disks: vec![disk("a", &[(fd(), u64::MAX - 511, 512)])], ..valid() }),
        (
            "disks[1].id",
            VmConfig { disks: vec![disk("a", &[(fd(), 0, 512)]), disk("a", &[(fd(), 0, 512)])], ..valid() },
        ),
        ("interfaces[0].mac", interface(vec![2, 0, 0, 0, 0], 1500)),
        ("interfaces[0].mac", interface(vec![1, 0, 0, 0, 0, 1], 1500)),
        ("interfaces[0].mtu", interface(vec![2, 0, 0, 0, 0, 1], 67)),
        ("interfaces[0].mtu", interface(vec![2, 0, 0, 0, 0, 1], 65_536)),
    ];
    for (field, config) in cases {
        let mistakes = mistakes(config);
        assert_eq!(mistakes.len(), 1, "{field}: {mistakes:?}");
        assert!(mistakes[0].starts_with(&format!("{field}:")), "{field}: {mistakes:?}");
    }
}

fn interface(mac: Vec<u8>, mtu: u32) -> VmConfig {
    VmConfig { interfaces: vec![NetworkInterface { tap_fd: fd(), mac, mtu }], ..valid() }
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let mistakes = mistakes(VmConfig { vcpus: 0, memory_bytes: 1, guest_cid: 0, ..valid() });
    assert_eq!(mistakes.len(), 3, "{mistakes:?}");
}

#[test]
fn a_descriptor_cannot_be_two_things() {
    let config = valid();
    let both = VmConfig { initramfs_fd: config.kernel_fd, ..config };
    assert!(mistakes(both)[0].contains("that of kernel_fd already"));
    let config = valid();
    let exit = VmConfig { kernel_fd: config.exit_fd, ..config };
    assert!(mistakes(exit)[0].contains("that of exit_fd already"));
}

#[test]
fn a_hot_plugged_disk_uses_indexes_into_the_descriptors_sent_along() {
    let files = [tempfile::tempfile().expect("a temporary file")];
    let added = DiskConfig::from_request(disk("a", &[(0, 0, 512), (0, 512, 512)]), &files).expect("valid");
    assert_eq!(added.segments.len(), 2);
    for bad in [1, -1, i32::MAX] {
        let error = DiskConfig::from_request(disk("a", &[(bad, 0, 512)]), &files).expect_err("no such descriptor");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}

#[test]
fn a_configuration_is_read_to_its_end_and_bounded() {
    use std::io::{Seek, Write};
    let with = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(bytes).expect("room");
        file.rewind().expect("seekable");
        file.into_raw_fd()
    };
    let wire = VmConfig { vcpus: 3, ..VmConfig::default() };
    assert_eq!(read(with(&wire.encode_to_vec())).expect("valid"), wire);
    assert!(matches!(read(with(&[0xff; 16])), Err(ConfigError::Malformed { length: 16, .. })));
    assert!(matches!(read(with(&vec![0; MAX_BYTES as usize + 1])), Err(ConfigError::TooLong)));
    assert!(matches!(read(1_000_000), Err(ConfigError::Read { .. })));
}
