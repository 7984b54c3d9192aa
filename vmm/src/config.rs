//! The configuration of a VM, from the bytes the daemon sent to values that are known to make sense.
//!
//! Every mistake in a configuration is reported, not only the first.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use isopod_proto::vmm::{self as wire, VmConfig};
use isopod_proto::{DiskId, ErrorKind};
use prost::Message;

use crate::devices::block::Segment;
use crate::jail::User;
use crate::memory::Reserve;
use crate::{memory, sys};

/// Most bytes a configuration may have.
pub const MAX_BYTES: u64 = 1 << 20;
const MAX_VCPUS: u32 = 64;
const MIN_CID: u64 = 3;
/// Least MTU of IPv4 (RFC 791), and the most a frame can have.
const MTUS: std::ops::RangeInclusive<u32> = 68..=65_535;
const SECTOR: u64 = 512;
/// Room for the exit record and the log of a VM without a disk.
const LEAST_FILE: u64 = 16 << 20;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Its descriptor cannot be read to the end.
    #[error("cannot read the configuration from descriptor {fd}")]
    Read {
        /// The descriptor.
        fd: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Too long.
    #[error("the configuration is longer than {MAX_BYTES} bytes")]
    TooLong,
    /// Not a `VmConfig`.
    #[error("the configuration of {length} bytes is not a VmConfig")]
    Malformed {
        /// Its length.
        length: usize,
        /// Why.
        #[source]
        source: prost::DecodeError,
    },
    /// Values that make no sense, each with its field.
    #[error("the configuration is wrong: {}", .0.join("; "))]
    Invalid(Vec<String>),
}

impl ConfigError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { .. } => ErrorKind::Internal,
            Self::TooLong | Self::Malformed { .. } | Self::Invalid(_) => ErrorKind::InvalidArgument,
        }
    }
}

/// A VM to be made.
#[derive(Debug)]
pub struct Config {
    /// Those at the boot: 1 to 64.
    pub vcpus: u8,
    /// Those that there are: `vcpus` to 64.
    pub max_vcpus: u8,
    /// At the boot; checked by [`memory::check_size`].
    pub memory_bytes: u64,
    /// What may come into it later.
    pub reserve: Option<Reserve>,
    /// An uncompressed ELF vmlinux, by the daemon's word; it is checked when it is loaded.
    pub kernel: File,
    /// The initramfs.
    pub initramfs: File,
    /// Appended to the VMM's own kernel arguments.
    pub cmdline: String,
    /// Let the kernel print everything to the serial console.
    pub verbose_console: bool,
    /// Where the daemon connects to control the VM.
    pub control: UnixListener,
    /// Whom the process becomes.
    pub user: User,
    /// The devices.
    pub devices: Devices,
}

/// The devices of a VM to be made.
#[derive(Debug)]
pub struct Devices {
    /// Where the daemon connects to reach the guest's vsock ports.
    pub vsock: UnixListener,
    /// The guest's context id.
    pub guest_cid: u64,
    /// Disks there from the start.
    pub disks: Vec<DiskConfig>,
    /// Network interfaces.
    pub interfaces: Vec<InterfaceConfig>,
}

/// A disk to be made.
#[derive(Debug)]
pub struct DiskConfig {
    /// Its serial.
    pub id: DiskId,
    /// Whether writes are refused.
    pub readonly: bool,
    /// At least one.
    pub segments: Vec<Segment>,
}

/// A network interface to be made.
#[derive(Debug)]
pub struct InterfaceConfig {
    /// A tap with IFF_VNET_HDR.
    pub tap: OwnedFd,
    /// The guest's address.
    pub mac: [u8; 6],
    /// Bytes of the largest packet.
    pub mtu: u16,
}

/// Reads a configuration from the inherited descriptor `fd` until its end.
pub fn read(fd: RawFd) -> Result<VmConfig, ConfigError> {
    let file = sys::take_inherited_fd(fd).map_err(|source| ConfigError::Read { fd, source })?;
    let mut bytes = vec![];
    File::from(file).take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|source| ConfigError::Read { fd, source })?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ConfigError::TooLong);
    }
    let length = bytes.len();
    VmConfig::decode(bytes.as_slice()).map_err(|source| ConfigError::Malformed { length, source })
}

impl Config {
    /// Checks `wire` and takes the descriptors it names but `exit_fd`, which is the caller's.
    pub fn from_wire(wire: VmConfig) -> Result<Self, ConfigError> {
        let VmConfig {
            vcpus,
            memory_bytes,
            kernel_fd,
            initramfs_fd,
            cmdline,
            control_fd,
            vsock_fd,
            guest_cid,
            disks,
            interfaces,
            exit_fd,
            verbose_console,
            user,
            max_vcpus,
            max_memory_bytes,
        } = wire;
        let mut checker = Checker { mistakes: vec![], taken: BTreeMap::new() };
        checker.taken.insert(exit_fd, "exit_fd".into());

        if !(1..=MAX_VCPUS).contains(&vcpus) {
            checker.mistake(format!("vcpus: {vcpus} is not between 1 and {MAX_VCPUS}"));
        }
        let max_vcpus = if max_vcpus == 0 { vcpus } else { max_vcpus };
        if !(vcpus..=MAX_VCPUS.max(vcpus)).contains(&max_vcpus) {
            checker.mistake(format!("max_vcpus: {max_vcpus} is not between {vcpus} and {MAX_VCPUS}"));
        }
        let max_memory_bytes = max_memory_bytes.max(memory_bytes);
        if let Err(error) = memory::check_size(memory_bytes) {
            checker.mistake(format!("memory_bytes: {error}"));
        } else if let Err(error) = memory::check_size(max_memory_bytes) {
            checker.mistake(format!("max_memory_bytes: {error}"));
        }
        if !(MIN_CID..u64::from(u32::MAX)).contains(&guest_cid) {
            checker.mistake(format!("guest_cid: {guest_cid} is not between {MIN_CID} and {}", u32::MAX - 1));
        }
        if cmdline.bytes().any(|byte| byte == 0 || byte == b'\n') {
            checker.mistake("cmdline: it has a NUL or a line feed in it".into());
        }
        let user = checker.user(user.unwrap_or_default());
        let kernel = checker.take("kernel_fd", kernel_fd);
        let initramfs = checker.take("initramfs_fd", initramfs_fd);
        let control = checker.take("control_fd", control_fd);
        let vsock = checker.take("vsock_fd", vsock_fd);
        let disks = checker.disks(disks);
        let interfaces = checker.interfaces(interfaces);

        match (kernel, initramfs, control, vsock, checker.mistakes.is_empty()) {
            (Some(kernel), Some(initramfs), Some(control), Some(vsock), true) => Ok(Self {
                vcpus: vcpus as u8,
                max_vcpus: max_vcpus as u8,
                memory_bytes,
                reserve: Reserve::between(memory_bytes, max_memory_bytes),
                kernel: kernel.into(),
                initramfs: initramfs.into(),
                cmdline,
                verbose_console,
                control: control.into(),
                user,
                devices: Devices { vsock: vsock.into(), guest_cid, disks, interfaces },
            }),
            _ => Err(ConfigError::Invalid(checker.mistakes)),
        }
    }
}

impl Config {
    /// Where the last byte of the largest file ends that the VM may write to.
    pub fn largest_file(&self) -> u64 {
        let disks = self.devices.disks.iter().filter(|disk| !disk.readonly);
        let ends = disks.flat_map(|disk| &disk.segments).map(|segment| segment.offset + segment.length);
        ends.chain([LEAST_FILE]).max().unwrap_or_default()
    }
}

impl DiskConfig {
    /// Checks a disk to be hot-plugged. `files` are the descriptors sent along, to which the segments' numbers are indexes.
    pub fn from_request(disk: wire::Disk, files: &[File]) -> Result<Self, ConfigError> {
        let mut checker = Checker { mistakes: vec![], taken: BTreeMap::new() };
        let checked = checker.disk("disk", disk, &mut |index| {
            let file = usize::try_from(index).ok().and_then(|index| files.get(index));
            file.ok_or_else(|| io::Error::other(format!("there are only {} descriptors", files.len())))?.try_clone()
        });
        match (checked, checker.mistakes.is_empty()) {
            (Some(disk), true) => Ok(disk),
            _ => Err(ConfigError::Invalid(checker.mistakes)),
        }
    }
}

/// Collects what is wrong, and keeps track of descriptors, each of which has one owner.
struct Checker {
    mistakes: Vec<String>,
    taken: BTreeMap<RawFd, String>,
}

impl Checker {
    fn mistake(&mut self, mistake: String) {
        self.mistakes.push(mistake);
    }

    fn user(&mut self, wire::User { uid, gid }: wire::User) -> User {
        for (field, id) in [("user.uid", uid), ("user.gid", gid)] {
            // All ones means "no change" to the kernel.
            if id == 0 || id == u32::MAX {
                self.mistake(format!("{field}: {id} is nobody whom a VMM may be"));
            }
        }
        User { uid, gid }
    }

    /// Takes the inherited descriptor `fd` for `field`.
    fn take(&mut self, field: &str, fd: RawFd) -> Option<OwnedFd> {
        if let Some(other) = self.taken.get(&fd) {
            self.mistakes.push(format!("{field}: descriptor {fd} is that of {other} already"));
            return None;
        }
        match sys::take_inherited_fd(fd) {
            Ok(owned) => {
                self.taken.insert(fd, field.to_owned());
                Some(owned)
            }
            Err(error) => {
                self.mistakes.push(format!("{field}: descriptor {fd} cannot be taken: {error}"));
                None
            }
        }
    }

    fn disks(&mut self, disks: Vec<wire::Disk>) -> Vec<DiskConfig> {
        // Segments may share a descriptor: they lie one after the other in it.
        let mut files: BTreeMap<RawFd, File> = BTreeMap::new();
        let mut checked: Vec<DiskConfig> = vec![];
        for (index, disk) in disks.into_iter().enumerate() {
            let field = format!("disks[{index}]");
            for segment in &disk.segments {
                if !files.contains_key(&segment.fd)
                    && let Some(fd) = self.take(&format!("{field}.segments"), segment.fd)
                {
                    files.insert(segment.fd, fd.into());
                }
            }
            let mut open = |fd| files.get(&fd).ok_or(io::ErrorKind::NotFound)?.try_clone();
            let Some(disk) = self.disk(&field, disk, &mut open) else { continue };
            if checked.iter().any(|other| other.id == disk.id) {
                self.mistake(format!("{field}.id: {} is that of another disk already", disk.id));
            }
            checked.push(disk);
        }
        checked
    }

    fn disk(
        &mut self,
        field: &str,
        disk: wire::Disk,
        open: &mut dyn FnMut(RawFd) -> io::Result<File>,
    ) -> Option<DiskConfig> {
        let wire::Disk { id, readonly, segments } = disk;
        let before = self.mistakes.len();
        let id = DiskId::parse(&id).map_err(|error| self.mistake(format!("{field}.id: {error}"))).ok();
        if segments.is_empty() {
            self.mistake(format!("{field}.segments: there is none"));
        }
        let mut checked = vec![];
        for (index, wire::Segment { fd, offset, length }) in segments.into_iter().enumerate() {
            let field = format!("{field}.segments[{index}]");
            if !offset.is_multiple_of(SECTOR) || !length.is_multiple_of(SECTOR) || length == 0 {
                self.mistake(format!("{field}: {length} bytes at {offset} are not whole sectors of {SECTOR} bytes"));
            }
            if offset.checked_add(length).is_none_or(|end| end > i64::MAX as u64) {
                self.mistake(format!("{field}: {length} bytes at {offset} are past the end of any file"));
            }
            match open(fd) {
                Ok(file) => checked.push(Segment { file, offset, length }),
                Err(error) => self.mistake(format!("{field}: descriptor {fd} cannot be used: {error}")),
            }
        }
        (self.mistakes.len() == before).then_some(DiskConfig { id: id?, readonly, segments: checked })
    }

    fn interfaces(&mut self, interfaces: Vec<wire::NetworkInterface>) -> Vec<InterfaceConfig> {
        let mut checked = vec![];
        for (index, wire::NetworkInterface { tap_fd, mac, mtu }) in interfaces.into_iter().enumerate() {
            let field = format!("interfaces[{index}]");
            let tap = self.take(&format!("{field}.tap_fd"), tap_fd);
            let address: Option<[u8; 6]> = mac.as_slice().try_into().ok();
            if address.is_none_or(|address| address[0] & 1 != 0) {
                self.mistake(format!("{field}.mac: {mac:02x?} is not a unicast address of 6 bytes"));
            }
            if !MTUS.contains(&mtu) {
                self.mistake(format!("{field}.mtu: {mtu} is not between {} and {}", MTUS.start(), MTUS.end()));
            }
            if let (Some(tap), Some(mac)) = (tap, address) {
                checked.push(InterfaceConfig { tap, mac, mtu: mtu as u16 });
            }
        }
        checked
    }
}

#[cfg(test)]
mod tests;
