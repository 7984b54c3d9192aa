//! Disks of the guest: found by virtio-blk serial, mounted where only the agent sees them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use isopod_proto::agent::Verity;
use isopod_proto::{DiskId, ErrorKind};
use parking_lot::Mutex;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::agent::blocking;
use crate::device_mapper;
use crate::error::{Context as _, Error, Result};
use crate::layout::Layout;

/// How long a disk may take to appear after a rescan of the bus. The rescan itself is synchronous.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(10);

/// A disk that was attached.
#[derive(Clone, Debug)]
struct Attached {
    /// Its name in /sys/block.
    device: String,
    /// It is an image, and mounted.
    image: bool,
}

#[derive(Clone, Debug)]
enum Slot {
    Busy,
    Attached(Attached),
}

/// Where disks come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// virtio-blk devices of the guest.
    Virtio,
    /// There are none: who started the agent has put images, as directories, where they would be mounted.
    Directories,
}

/// The disks the daemon attached.
pub struct Disks {
    layout: Layout,
    source: DiskSource,
    disks: Mutex<HashMap<String, Slot>>,
}

impl Disks {
    /// None yet.
    pub fn new(layout: Layout, source: DiskSource) -> Self {
        Self { layout, source, disks: Mutex::default() }
    }

    /// Waits for the disk, and mounts it if it is an image.
    pub async fn attach(&self, id: &str, image: Option<Verity>) -> Result<()> {
        let id = checked(id)?;
        {
            let mut disks = self.disks.lock();
            if disks.contains_key(&id) {
                return Err(Error::new(ErrorKind::AlreadyExists, format!("disk {id} is attached already")));
            }
            disks.insert(id.clone(), Slot::Busy);
        }
        let (layout, name, source) = (self.layout.clone(), id.clone(), self.source);
        let result = blocking(move || {
            if source == DiskSource::Directories {
                check_directory(&layout, &name)?;
                return Ok(Attached { device: String::new(), image: image.is_some() });
            }
            let device = find_device(&name)?;
            if let Some(verity) = &image {
                mount_image(&layout, &name, &device, verity).inspect_err(|_| {
                    // The VMM takes the disk away now; another one may come under its name.
                    let _ = remove_function(&device);
                })?;
            }
            Ok(Attached { device, image: image.is_some() })
        })
        .await;
        let mut disks = self.disks.lock();
        match result {
            Ok(attached) => {
                disks.insert(id, Slot::Attached(attached));
                Ok(())
            }
            Err(error) => {
                disks.remove(&id);
                Err(error)
            }
        }
    }

    /// Unmounts the disk if it is an image, and removes its PCI function. A disk that is not attached is detached already.
    pub async fn detach(&self, id: &str) -> Result<()> {
        let id = checked(id)?;
        let attached = {
            let mut disks = self.disks.lock();
            match disks.insert(id.clone(), Slot::Busy) {
                None => {
                    disks.remove(&id);
                    return Ok(());
                }
                Some(Slot::Busy) => return Err(busy(&id)),
                Some(Slot::Attached(attached)) => attached,
            }
        };
        let (layout, name, source) = (self.layout.clone(), id.clone(), self.source);
        let result = blocking(move || {
            if source == DiskSource::Directories {
                return Ok(());
            }
            if attached.image {
                unmount_image(&layout, &name)?;
            }
            remove_function(&attached.device)
        })
        .await;
        self.disks.lock().remove(&id);
        result
    }

    /// Where an attached image is mounted.
    pub fn image(&self, id: &str) -> Result<PathBuf> {
        match self.disks.lock().get(id) {
            Some(Slot::Attached(Attached { image: true, .. })) => Ok(self.layout.disk(id)),
            Some(Slot::Attached(_)) => Err(Error::precondition(format!("disk {id} is not an image"))),
            Some(Slot::Busy) => Err(busy(id)),
            None => {
                Err(Error::not_found(format!("disk {:?} is not attached", id.chars().take(80).collect::<String>())))
            }
        }
    }

    /// The name below /dev of an attached disk that is no image.
    pub fn device(&self, id: &str) -> Result<String> {
        match self.disks.lock().get(id) {
            Some(Slot::Attached(Attached { image: false, device })) if !device.is_empty() => Ok(device.clone()),
            Some(Slot::Busy) => Err(busy(id)),
            _ => Err(Error::not_found(format!("disk {id:?} is not attached as a device"))),
        }
    }

    /// Mounts the disk as the pod's ext4 scratch file system.
    pub async fn mount_scratch(&self, id: &str) -> Result<()> {
        self.attach(id, None).await?;
        let device = match self.disks.lock().get(id) {
            Some(Slot::Attached(attached)) => PathBuf::from("/dev").join(&attached.device),
            _ => return Err(busy(id)),
        };
        let scratch = self.layout.scratch();
        blocking(move || {
            // Nothing on it outlives the pod: no reason to wait for the disk's cache.
            let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
            rustix::mount::mount(&device, &scratch, "ext4", flags, c"nobarrier")
                .context(|| format!("mount the scratch disk {} (ext4)", device.display()))
        })
        .await
    }
}

fn checked(id: &str) -> Result<String> {
    match DiskId::parse(id) {
        Ok(id) => Ok(id.as_str().to_owned()),
        Err(error) => Err(Error::invalid(error.to_string())),
    }
}

fn busy(id: &str) -> Error {
    Error::precondition(format!("another request for disk {id} is under way"))
}

fn check_directory(layout: &Layout, id: &str) -> Result<()> {
    let path = layout.disk(id);
    match path.is_dir() {
        true => Ok(()),
        false => Err(Error::not_found(format!("the image {} is not there", path.display()))),
    }
}

/// The device with this serial. If there is none, the bus is scanned for new functions.
fn find_device(id: &str) -> Result<String> {
    if let Some(device) = device_by_serial(id) {
        return Ok(device);
    }
    fs::write("/sys/bus/pci/rescan", "1").context(|| "scan the PCI bus")?;
    let missing = || Error::new(ErrorKind::DeadlineExceeded, format!("no disk with the serial {id} appeared"));
    poll(|| device_by_serial(id)).ok_or_else(missing)
}

fn device_by_serial(id: &str) -> Option<String> {
    let devices = fs::read_dir("/sys/block").ok()?;
    let mut names = devices.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.find(|name| {
        let serial = fs::read_to_string(Path::new("/sys/block").join(name).join("serial"));
        name.starts_with("vd") && serial.is_ok_and(|serial| serial.trim_end() == id)
    })
}

/// Asks until there is an answer or [`APPEAR_TIMEOUT`] has passed.
fn poll<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Mounts an image through dm-verity; if that fails, neither is left.
fn mount_image(layout: &Layout, id: &str, device: &str, verity: &Verity) -> Result<()> {
    let source = device_mapper::open_verity(id, device, verity)?;
    let target = layout.disk(id);
    let text = || format!("mount the image on disk {id} (EROFS on {}, verified)", source.display());
    let made = fs::create_dir_all(&target).context(text);
    let mounted = made.and_then(|()| {
        rustix::mount::mount(&source, &target, "erofs", MountFlags::RDONLY | MountFlags::NODEV, None)
            .context(text)
            .map_err(|error| error.with_kind(ErrorKind::Corrupt))
    });
    mounted.inspect_err(|_| {
        // The first error is the one to be told.
        let _ = unmount_image(layout, id);
    })
}

/// Detaches what is mounted; a container that still uses it keeps it until its own end.
fn unmount_image(layout: &Layout, id: &str) -> Result<()> {
    let path = layout.disk(id);
    // After a failed mount it is not there.
    let _ = rustix::mount::unmount(&path, UnmountFlags::DETACH);
    let _ = fs::remove_dir(path);
    device_mapper::close(id)
}

/// Removes the PCI function that the block device belongs to: /sys/block/X is .../<function>/virtioN/block/X.
fn remove_function(device: &str) -> Result<()> {
    let text = || format!("remove the PCI function of {device}");
    let block = fs::canonicalize(Path::new("/sys/block").join(device)).context(text)?;
    let function = block.ancestors().nth(3).filter(|path| path.join("vendor").exists() && path.join("remove").exists());
    let function = function.ok_or_else(|| Error::new(ErrorKind::Internal, text()))?;
    fs::write(function.join("remove"), "1").context(text)
}
