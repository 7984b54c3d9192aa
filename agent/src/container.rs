//! A container, from its creation to its removal.
//!
//! ```text
//! create ──> Created ──start──> Starting ──> Running ──exit──> (its process has ended)
//!                                    └─────> Failed                     │
//!   remove, from each of them: kill, unmount, forget  <─────────────────┘
//! ```
//! The first process exists from the creation on, prepared and waiting (see [`crate::stub`]). Whether it has ended is told by
//! the process, not by the state. Removal is the one place that releases what creation made.

mod image_volume;
pub(crate) mod plan;
mod program;
mod rootfs;

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use isopod_proto::ErrorKind;
use isopod_proto::agent::{
    CreateContainerRequest, ExecRequest, Mount, PidMode, PresentContainer, ResolvedUser, mount, present_container,
};
use parking_lot::Mutex;
use rustix::mount::UnmountFlags;

use crate::cgroup::{self, Cgroup};
use crate::device_access;
use crate::error::{Context as _, Error, Result};
use crate::launch::{self, Prepared};
use crate::layout::Layout;
use crate::process::{Ending, Ends, Process, Streams};
use crate::reaper::{Reaper, realtime_nanos};
use crate::stats::CpuRate;
use crate::stub::message::{Descriptor, Device, Launch, Role};
use crate::user_namespace::UserNamespace;
use crate::users;
use crate::volume::Volumes;

/// A container that exists.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its first process.
    pub init: Arc<Process>,
    /// Its cgroup.
    pub cgroup: Arc<Cgroup>,
    /// Its CPU time.
    pub cpu_rate: CpuRate,
    root: OwnedFd,
    user_namespace: Option<Arc<UserNamespace>>,
    stage: Mutex<Stage>,
}

enum Stage {
    Created(Prepared),
    Starting,
    /// Since when: CLOCK_REALTIME in nanoseconds.
    Running(i64),
    Failed,
}

/// What a container is made from besides the request.
pub struct Parts {
    /// Where things are.
    pub layout: Layout,
    /// Watches its processes.
    pub reaper: Arc<Reaper>,
    /// Where its image is mounted.
    pub image: PathBuf,
    /// Where the images that are its volumes are mounted, by their disks.
    pub image_volumes: HashMap<String, PathBuf>,
    /// The pod's own volumes.
    pub volumes: Arc<Volumes>,
    /// Device nodes besides those that every container has.
    pub devices: Vec<Device>,
    /// A process whose PID namespace it joins.
    pub pid_namespace: Option<OwnedFd>,
    /// The user namespace it is in, unless that is the guest's.
    pub user_namespace: Option<Arc<UserNamespace>>,
}

/// Makes a container; if that fails, nothing is left of it. Blocks; must be called on a thread of the runtime.
pub fn create(parts: &Parts, request: &CreateContainerRequest) -> Result<(Arc<Container>, ResolvedUser)> {
    build(parts, request).inspect_err(|_| {
        // The error that is reported is the first one; what could not be released here goes with the pod.
        let _ = release(&parts.layout, &request.id);
    })
}

fn build(parts: &Parts, request: &CreateContainerRequest) -> Result<(Arc<Container>, ResolvedUser)> {
    let Parts { layout, reaper, image, devices, pid_namespace, user_namespace, .. } = parts;
    let settings = cgroup::settings(&request.resources.clone().unwrap_or_default())?;
    let wanted = request.process.as_ref().ok_or_else(|| Error::invalid("the container has no process"))?;
    let sources = make_sources(parts, request)?;
    let mounts = plan::mounts(request, layout, &sources)?;

    let scratch = layout.container_scratch(&request.id);
    let root = match user_namespace {
        None => rootfs::mount_overlay(image, &scratch, request.privileged)?,
        Some(namespace) => {
            let staging = layout.container_files(&request.id).join("image");
            rootfs::mount_mapped_overlay(image, &scratch, &staging, namespace)?
        }
    };
    let identity = users::resolve(root.as_fd(), &wanted.user.clone().unwrap_or_default())?;
    let stream_owner = user_namespace.as_ref().map(|namespace| namespace.owner_of(&identity)).transpose()?;
    let program = program::resolve(wanted, &identity)?;
    let cgroup = Arc::new(Cgroup::create(layout.cgroup_parent(), &request.id)?);
    cgroup.apply(&settings)?;
    let devices = plan::devices(request.privileged && user_namespace.is_none(), devices);
    let cgroup_directory = cgroup.clone_directory()?;
    // A privileged container has all of the guest.
    if !request.privileged {
        device_access::restrict(cgroup_directory.as_fd(), &devices)?;
    }

    let mut launch = Launch {
        role: Role::Container as i32,
        new_pid_namespace: request.pid_mode() == PidMode::Container,
        new_ipc_namespace: request.ipc_private,
        mount_point: path_text(layout.mount_point()),
        mounts,
        devices,
        readonly_rootfs: request.readonly_rootfs,
        masked_paths: request.masked_paths.clone(),
        readonly_paths: request.readonly_paths.clone(),
        program: Some(program),
        stream_owner,
        ..Launch::default()
    };
    let mut descriptors = vec![(Descriptor::Cgroup, &cgroup_directory), (Descriptor::RootMount, &root)];
    descriptors.extend(pid_namespace.iter().map(|target| (Descriptor::PidNamespace, target)));
    descriptors.extend(user_namespace.iter().map(|target| (Descriptor::UserNamespace, &target.descriptor)));
    let (mut prepared, streams) = prepare(reaper, &mut launch, descriptors, wanted.terminal, wanted.stdin)?;

    let pidfd = prepared.watched.pidfd.take();
    let (init, ending) = Process::new(&request.id, &request.id, pidfd, streams, Arc::clone(&cgroup), 0);
    follow(&mut prepared, ending, Arc::clone(&cgroup), true);
    let user = ResolvedUser { uid: identity.uid, gid: identity.gid, supplemental_groups: identity.groups };
    let stage = Mutex::new(Stage::Created(prepared));
    let (id, user_namespace) = (request.id.clone(), user_namespace.clone());
    Ok((Arc::new(Container { id, init, cgroup, root, user_namespace, cpu_rate: CpuRate::default(), stage }), user))
}

/// Starts a stub with its standard streams.
fn prepare(
    reaper: &Arc<Reaper>,
    launch: &mut Launch,
    descriptors: Vec<(Descriptor, &OwnedFd)>,
    terminal: bool,
    stdin: bool,
) -> Result<(Prepared, Streams)> {
    if terminal {
        let mut prepared = launch::prepare(reaper, launch, &descriptors)?;
        let master = prepared.terminal.take();
        let master = master.ok_or_else(|| Error::new(ErrorKind::Internal, "a stub sent no terminal"))?;
        return Ok((prepared, Streams::terminal(master, stdin)?));
    }
    let (streams, ends): (Streams, Ends) = Streams::pipes(stdin)?;
    let all: Vec<_> = descriptors.into_iter().chain(ends.iter().map(|(what, end)| (*what, end))).collect();
    Ok((launch::prepare(reaper, launch, &all)?, streams))
}

/// Announces the process's end when it comes. With the first process of a container all others of it end.
fn follow(prepared: &mut Prepared, ending: Ending, cgroup: Arc<Cgroup>, first: bool) {
    let (_, nobody) = tokio::sync::oneshot::channel();
    let exit = std::mem::replace(&mut prepared.watched.exit, nobody);
    // The task ends with the process; the reaper is there as long as the agent.
    tokio::spawn(async move {
        if let Ok(exit) = exit.await {
            if first {
                cgroup.kill();
            }
            ending.announce(exit, &cgroup);
        }
    });
}

/// Makes the agent's side of the requested mounts; the path of each that has one.
fn make_sources(parts: &Parts, request: &CreateContainerRequest) -> Result<Vec<Option<String>>> {
    let Parts { layout, image_volumes, volumes, .. } = parts;
    let files = layout.container_files(&request.id);
    fs::create_dir(&files).context(|| format!("make {}", files.display()))?;
    let source = |(number, mount): (usize, &Mount)| match &mount.source {
        Some(mount::Source::Volume(volume)) => volumes.bind(volume, &files.join(number.to_string())).map(Some),
        Some(mount::Source::FileContents(contents)) => {
            let path = files.join(number.to_string());
            write_file(&path, contents, if mount.mode == 0 { 0o644 } else { mount.mode })?;
            Ok(Some(path_text(path)))
        }
        Some(mount::Source::Share(name)) => crate::shares::path(layout, name).map(Some),
        Some(mount::Source::Mirror(name)) => crate::mirror::path(layout, name).map(Some),
        Some(mount::Source::Image(image)) => {
            let root = image_volumes.get(&image.disk).ok_or_else(|| Error::not_found("an image volume has no disk"))?;
            image_volume::path(root, &image.sub_path).map(Some)
        }
        Some(mount::Source::TmpfsSizeBytes(_)) | None => Ok(None),
    };
    request.mounts.iter().enumerate().map(source).collect()
}

/// Writes a file of the agent's with exactly these permission bits.
pub fn write_file(path: &Path, contents: &[u8], mode: u32) -> Result<()> {
    let text = || format!("write {}", path.display());
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path).context(text)?;
    file.write_all(contents).context(text)?;
    file.set_permissions(fs::Permissions::from_mode(mode & 0o7777)).context(text)
}

fn path_text(path: PathBuf) -> String {
    path.into_os_string().into_string().expect("the agent's own paths are ASCII")
}

impl Container {
    /// Runs the program of the first process. Blocks.
    pub fn start(&self) -> Result<()> {
        let mut prepared = {
            let mut stage = self.stage.lock();
            match std::mem::replace(&mut *stage, Stage::Starting) {
                Stage::Created(prepared) if !self.init.has_ended() => prepared,
                Stage::Created(_) => {
                    *stage = Stage::Failed;
                    return Err(Error::precondition(format!("container {} was killed before its start", self.id)));
                }
                other => {
                    let error = Error::precondition(format!("container {} was started before", self.id));
                    *stage = other;
                    return Err(error);
                }
            }
        };
        let result = prepared.go();
        *self.stage.lock() = if result.is_ok() { Stage::Running(realtime_nanos()) } else { Stage::Failed };
        result
    }

    /// How far it is; none while its start is under way.
    pub fn present(&self) -> Option<PresentContainer> {
        let (stage, started_at_nanos) = match &*self.stage.lock() {
            Stage::Starting => return None,
            Stage::Created(_) => (present_container::Stage::Created, 0),
            Stage::Running(since) => (present_container::Stage::Started, *since),
            Stage::Failed => (present_container::Stage::Failed, 0),
        };
        Some(PresentContainer { id: self.id.clone(), stage: stage.into(), started_at_nanos })
    }

    /// Starts a further process in the container. Blocks; must be called on a thread of the runtime.
    pub fn exec(&self, reaper: &Arc<Reaper>, request: &ExecRequest) -> Result<Arc<Process>> {
        let not_running = || Error::precondition(format!("container {} is not running", self.id));
        if !matches!(*self.stage.lock(), Stage::Running(_)) {
            return Err(not_running());
        }
        let wanted = request.process.as_ref().ok_or_else(|| Error::invalid("the exec request has no process"))?;
        let target = self.init.pidfd().map_err(|_| not_running())?;
        let identity = users::resolve(self.root.as_fd(), &wanted.user.clone().unwrap_or_default())?;
        let program = program::resolve(wanted, &identity)?;
        let namespace = self.user_namespace.as_ref();
        let stream_owner = namespace.map(|namespace| namespace.owner_of(&identity)).transpose()?;
        let mut launch = Launch { role: Role::Exec as i32, program: Some(program), stream_owner, ..Launch::default() };
        // A cgroup of its own, so that all it starts can be killed with it.
        let cgroup = Arc::new(self.cgroup.create_child(&request.process_id)?);
        let cgroup_directory = cgroup.clone_directory()?;
        let mut descriptors = vec![(Descriptor::Cgroup, &cgroup_directory), (Descriptor::Namespaces, target)];
        descriptors.extend(namespace.map(|target| (Descriptor::UserNamespace, &target.descriptor)));
        let prepared = prepare(reaper, &mut launch, descriptors, wanted.terminal, wanted.stdin);
        let (mut prepared, streams) = prepared.inspect_err(|_| cgroup.remove_if_empty())?;
        let pidfd = prepared.watched.pidfd.take();
        let (process, ending) =
            Process::new(&request.process_id, &self.id, pidfd, streams, cgroup, self.cgroup.oom_kills());
        follow(&mut prepared, ending, Arc::clone(&self.cgroup), false);
        let mut run = || {
            if wanted.terminal && wanted.terminal_columns != 0 && wanted.terminal_rows != 0 {
                process.resize(wanted.terminal_columns, wanted.terminal_rows)?;
            }
            prepared.go()
        };
        run().inspect_err(|_| {
            process.kill();
            process.abandon_output();
        })?;
        Ok(process)
    }
}

/// Unmounts the volumes that were made in `directory`.
fn unmount_all(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        // What is no mount is not one of them.
        let _ = rustix::mount::unmount(entry.path(), UnmountFlags::DETACH);
    }
}

/// Removes what a container has in the guest, whether all of it is there or some. Its [`Container`] should be dropped
/// before, so that its file system is not in use. Blocks.
pub fn release(layout: &Layout, id: &str) -> Result<()> {
    let cgroup = layout.cgroup_parent().join(id);
    if cgroup.exists() {
        Cgroup::open(cgroup)?.remove()?;
    }
    unmount_all(&layout.container_files(id));
    for directory in [layout.container_scratch(id), layout.container_files(id)] {
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", directory.display()), error));
            }
            _ => {}
        }
    }
    Ok(())
}
