//! Pods' network namespaces: made for CNI, kept by a mount of each at a path of its own.
//!
//! A thread moves into a namespace for good, so each piece of work in one has a thread of its own, which ends with it. The
//! daemon's other threads never leave the node's namespace.

use std::fs::{DirBuilder, File};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

use super::NetworkError;

/// The thread's own namespace.
const OWN: &str = "/proc/thread-self/ns/net";

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> NetworkError {
    let path = path.to_owned();
    move |source| NetworkError::Namespace { doing, path, source }
}

/// Makes a namespace at `path`. One that is there already is used.
pub async fn make(path: PathBuf) -> Result<(), NetworkError> {
    if is_mounted(&path) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed("make", parent))?;
    }
    File::create(&path).map_err(failed("make", &path))?;
    let error_path = path.clone();
    let work = move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET)?;
        rustix::mount::mount_bind(OWN, &path)?;
        Ok(())
    };
    on_thread(work).await?.map_err(failed("make", &error_path))
}

/// Whether there is a namespace at `path`: a file of nsfs, which is none of the directory's file system.
fn is_mounted(path: &Path) -> bool {
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|found| found.f_type == NSFS_MAGIC)
}

/// Takes the namespace at `path` away; it goes with the last who uses it. Nothing to take is a success.
pub fn remove(path: &Path) -> Result<(), NetworkError> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH) {
        // Nothing is there, or nothing is mounted there.
        Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
        Err(errno) => return Err(failed("remove", path)(errno.into())),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Does `work` in the namespace at `path`, on a thread with an async runtime of its own.
pub async fn run_in<T, F>(path: &Path, work: impl FnOnce() -> F + Send + 'static) -> Result<T, NetworkError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, NetworkError>>,
{
    let namespace = File::open(path).map_err(failed("open", path))?;
    let path = path.to_owned();
    on_thread(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|errno| failed("enter", &path)(errno.into()))?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed("work in", &path))?;
        runtime.block_on(work())
    })
    .await?
}

async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, NetworkError> {
    let (sender, receiver) = oneshot::channel();
    let run = move || {
        // Whoever asked may have given up.
        let _ = sender.send(work());
    };
    std::thread::Builder::new().name("netns".to_owned()).spawn(run).map_err(NetworkError::Thread)?;
    receiver.await.map_err(|_| NetworkError::Thread(std::io::Error::other("it panicked")))
}
