//! Being told when a directory of the host changes: one inotify instance for the daemon, as a host has few of them.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// All that changes a directory or what it shows of its files.
const CHANGES: WatchFlags = WatchFlags::ATTRIB
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);
/// Bytes of events that are taken at once.
const BUFFER: usize = 16 * 1024;
/// Until events are read again after that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// The daemon's watches. Its task ends with it.
pub struct Watches {
    /// None: the host has no inotify instance to spare.
    shared: Option<Arc<Shared>>,
    task: Option<JoinHandle<()>>,
}

struct Shared {
    inotify: OwnedFd,
    /// By watch descriptor, who is to be told. Watches are added and removed with this lock held, so that it is complete.
    told: Mutex<HashMap<i32, Vec<Arc<Notify>>>>,
}

impl Drop for Watches {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Watches {
    /// To be called in the runtime, which reads the events. Without inotify every subscription is one that is told nothing, and
    /// knows it.
    pub fn start() -> Self {
        match Self::open() {
            Ok(watches) => watches,
            Err(error) => {
                tracing::warn!(%error, "no inotify instance: changes of ConfigMaps and the like reach containers late");
                Self { shared: None, task: None }
            }
        }
    }

    fn open() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        #[expect(
            deprecated,
            reason = "sound for an OwnedFd, which stays what it is; the replacement is an unsafe function"
        )]
        let readable = AsyncFd::with_interest(inotify.try_clone()?, Interest::READABLE)?;
        let shared = Arc::new(Shared { inotify, told: Mutex::default() });
        let task = tokio::spawn(run(readable, Arc::clone(&shared)));
        Ok(Self { shared: Some(shared), task: Some(task) })
    }

    /// A subscription that watches nothing yet.
    pub fn subscribe(&self) -> Subscription {
        Subscription { shared: self.shared.clone(), changed: Arc::default(), blind: AtomicBool::new(false) }
    }
}

/// What one volume's task wants to be told of. Dropped, its watches go.
pub struct Subscription {
    shared: Option<Arc<Shared>>,
    changed: Arc<Notify>,
    /// Something could not be watched.
    blind: AtomicBool,
}

impl Subscription {
    /// Watches the directory until it is removed. To be called before it is read, so that no change is missed.
    pub fn watch(&self, directory: BorrowedFd<'_>) {
        if let Err(error) = self.try_watch(directory)
            && !self.blind.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "a volume cannot be watched; it is looked at now and then");
        }
    }

    fn try_watch(&self, directory: BorrowedFd<'_>) -> io::Result<()> {
        let shared = self.shared.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let mut told = shared.told.lock();
        let watch = inotify::add_watch(&shared.inotify, path, CHANGES)?;
        let all = told.entry(watch).or_default();
        if !all.iter().any(|other| Arc::ptr_eq(other, &self.changed)) {
            all.push(Arc::clone(&self.changed));
        }
        Ok(())
    }

    /// Whether some change may not be told.
    pub fn is_blind(&self) -> bool {
        self.blind.load(Ordering::Relaxed)
    }

    /// Waits for a change since the last one that was told.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let Some(shared) = &self.shared else { return };
        shared.told.lock().retain(|watch, all| {
            all.retain(|other| !Arc::ptr_eq(other, &self.changed));
            if all.is_empty() {
                // It fails if the directory has been removed, and the watch with it.
                let _ = inotify::remove_watch(&shared.inotify, *watch);
            }
            !all.is_empty()
        });
    }
}

async fn run(readable: AsyncFd<OwnedFd>, shared: Arc<Shared>) {
    loop {
        let Ok(mut ready) = readable.readable().await else { return };
        // Not readable after all: it is waited for again.
        if let Ok(Err(error)) = ready.try_io(|inotify| shared.tell(inotify.get_ref().as_fd()).map_err(io::Error::from))
        {
            tracing::error!(%error, "cannot read what happened to volumes");
            shared.told.lock().values().flatten().for_each(|changed| changed.notify_one());
            sleep(PAUSE).await;
        }
    }
}

impl Shared {
    /// Tells of all events there are; AGAIN, as the kernel says, when there are no more.
    fn tell(&self, inotify: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut events = Reader::new(inotify, &mut buffer);
        loop {
            let event = events.next()?;
            let (watch, flags) = (event.wd(), event.events());
            let mut told = self.told.lock();
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                // Nobody knows what was lost.
                told.values().flatten().for_each(|changed| changed.notify_one());
                continue;
            }
            told.get(&watch).into_iter().flatten().for_each(|changed| changed.notify_one());
            if flags.contains(ReadFlags::IGNORED) {
                told.remove(&watch);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use tokio::time::timeout;

    use super::*;

    async fn is_told(subscription: &Subscription) -> bool {
        let told = timeout(Duration::from_secs(10), subscription.changed()).await.is_ok();
        // A change may be several events.
        while timeout(Duration::from_millis(100), subscription.changed()).await.is_ok() {}
        told
    }

    async fn is_quiet(subscription: &Subscription) -> bool {
        timeout(Duration::from_millis(200), subscription.changed()).await.is_err()
    }

    #[tokio::test]
    async fn who_watches_a_directory_is_told_until_it_unsubscribes() {
        let watches = Watches::start();
        let (one, other) = (tempfile::tempdir().expect("made"), tempfile::tempdir().expect("made"));
        let (first, second, third) = (watches.subscribe(), watches.subscribe(), watches.subscribe());
        let directory = File::open(one.path()).expect("opened");
        first.watch(directory.as_fd());
        second.watch(directory.as_fd());
        third.watch(File::open(other.path()).expect("opened").as_fd());
        fs::write(one.path().join("f"), "x").expect("written");
        assert!(is_told(&first).await && is_told(&second).await && is_quiet(&third).await);
        drop(first);
        fs::rename(one.path().join("f"), one.path().join("g")).expect("renamed");
        assert!(is_told(&second).await);
        fs::remove_file(one.path().join("g")).expect("removed");
        assert!(is_told(&second).await && !second.is_blind());
        let told = |watches: &Watches| watches.shared.as_ref().expect("inotify").told.lock().len();
        assert_eq!(told(&watches), 2);
        drop(second);
        assert_eq!(told(&watches), 1);
        // The end of a directory is a change, and its watch goes.
        drop(other);
        assert!(is_told(&third).await);
        assert_eq!(told(&watches), 0);
    }

    #[tokio::test]
    async fn without_inotify_a_subscription_says_that_it_is_blind() {
        let watches = Watches { shared: None, task: None };
        let subscription = watches.subscribe();
        assert!(!subscription.is_blind());
        subscription.watch(File::open("/").expect("opened").as_fd());
        assert!(subscription.is_blind());
    }
}
