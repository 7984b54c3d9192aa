//! The agent's life, in a guest or beside one.

use std::path::Path;
use std::sync::Arc;

use rustix::system::RebootCommand;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::Agent;
use crate::disk::DiskSource;
use crate::error::{Context as _, Error, Result};
use crate::layout::Layout;
use crate::reaper::Reaper;
use crate::server::{self, Sockets};
use crate::{boot, console, hello, sys};

/// Threads for what blocks: one request each, so that no container waits for another's.
const BLOCKING_THREADS: usize = 64;
/// Stack of such a thread.
const STACK_BYTES: usize = 512 * 1024;

/// Process 1: boots the guest, serves, and powers it off. Does not return.
pub fn run_in_guest() -> ! {
    // Process 1 must not end by a panic's abort without a word; the kernel then panics, and the VMM reports that.
    std::panic::set_hook(Box::new(|panic| console::say(&format!("panic: {panic}"))));
    if let Err(error) = serve_guest() {
        console::say(&format!("fatal: {}", error.chain()));
    }
    power_off()
}

fn serve_guest() -> Result<()> {
    sys::use_one_heap();
    let layout = Layout::guest();
    boot::set_up(&layout)?;
    runtime()?.block_on(async {
        let agent = start_agent(layout, DiskSource::Virtio)?;
        let sockets = Sockets::vsock().context(|| "listen on vsock")?;
        let serving = tokio::spawn(server::serve(agent, sockets));
        hello::send().await.context(|| "say hello to the host")?;
        match serving.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Error::io("serve requests", std::io::Error::other(error))),
            Err(error) => Err(Error::io("serve requests", std::io::Error::other(error))),
        }
    })
}

/// Serves on Unix sockets in `directory`, in the namespaces the caller has made. The agent's own files are in
/// `directory/run`, the containers' cgroups in `cgroup_parent`. Returns at a shutdown.
///
/// # Errors
/// A text that says what could not be done.
pub fn run_on_unix_sockets(directory: &Path, cgroup_parent: &Path) -> std::result::Result<(), String> {
    let layout = Layout::new(directory.join("run"), cgroup_parent);
    let serve = || -> Result<()> {
        boot::make_directories(&layout)?;
        runtime()?.block_on(async {
            let agent = start_agent(layout.clone(), DiskSource::Directories)?;
            let sockets = Sockets::unix(directory).context(|| "listen on Unix sockets")?;
            server::serve(agent, sockets)
                .await
                .map_err(|error| Error::io("serve requests", std::io::Error::other(error)))
        })
    };
    serve().map_err(|error| error.chain())
}

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(STACK_BYTES)
        .build()
        .context(|| "start the runtime")
}

fn start_agent(layout: Layout, disks: DiskSource) -> Result<Arc<Agent>> {
    let reaper = Arc::new(Reaper::default());
    let children = signal(SignalKind::child()).context(|| "watch for the ends of children")?;
    // It runs as long as the runtime.
    tokio::spawn(Arc::clone(&reaper).run(children));
    Ok(Agent::new(layout, disks, reaper))
}

fn power_off() -> ! {
    rustix::fs::sync();
    match rustix::system::reboot(RebootCommand::PowerOff) {
        Ok(()) => console::say("the power is off, yet the agent runs"),
        Err(error) => console::say(&format!("cannot power off: {error}")),
    }
    // Process 1 that ends makes the kernel panic, which ends the VM too.
    std::process::exit(1)
}
