//! What the agent and a stub say to each other over their socket. Both are the same binary, so nothing here is versioned.

/// What a stub is to become. Sent once, with the descriptors that `descriptors` names, in that order.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Launch {
    /// Which kind of process it will be.
    #[prost(enumeration = "Role", tag = "1")]
    pub role: i32,
    /// What each descriptor that comes along is, as [`Descriptor`] values.
    #[prost(enumeration = "Descriptor", repeated, tag = "2")]
    pub descriptors: Vec<i32>,
    /// It is process 1 of a PID namespace of its own.
    #[prost(bool, tag = "3")]
    pub new_pid_namespace: bool,
    /// It has an IPC namespace of its own.
    #[prost(bool, tag = "4")]
    pub new_ipc_namespace: bool,
    /// Where, in the agent's mount namespace, the stub may mount what becomes its root.
    #[prost(string, tag = "5")]
    pub mount_point: String,
    /// What is mounted in the container, in this order.
    #[prost(message, repeated, tag = "6")]
    pub mounts: Vec<PlannedMount>,
    /// Device nodes in /dev.
    #[prost(message, repeated, tag = "7")]
    pub devices: Vec<Device>,
    /// The root file system gets read-only once everything is mounted.
    #[prost(bool, tag = "8")]
    pub readonly_rootfs: bool,
    /// Paths that are hidden under /dev/null or an empty directory.
    #[prost(string, repeated, tag = "9")]
    pub masked_paths: Vec<String>,
    /// Paths that get read-only.
    #[prost(string, repeated, tag = "10")]
    pub readonly_paths: Vec<String>,
    /// The program, absent for [`Role::PodInit`].
    #[prost(message, optional, tag = "11")]
    pub program: Option<Program>,
    /// In a user namespace: whom the program's standard streams are to belong to, as the agent sees it.
    #[prost(message, optional, tag = "140")]
    pub stream_owner: Option<Owner>,
}

/// A user and a group.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Owner {
    /// User id.
    #[prost(uint32, tag = "1")]
    pub uid: u32,
    /// Group id.
    #[prost(uint32, tag = "2")]
    pub gid: u32,
}

/// Which kind of process a stub becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Role {
    /// The first process of a container.
    Container = 0,
    /// A further process of a running container.
    Exec = 1,
    /// Process 1 of the PID namespace that containers of the pod share.
    PodInit = 2,
    /// Nothing but what holds a new user namespace until it has its ids and the agent has a descriptor of it.
    UserNamespace = 3,
}

/// What a descriptor that comes with [`Launch`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Descriptor {
    /// The cgroup's directory.
    Cgroup = 0,
    /// The mount of the container's root file system, not yet attached anywhere.
    RootMount = 1,
    /// pidfd of a process whose PID namespace is joined.
    PidNamespace = 2,
    /// pidfd of the container's first process, all of whose namespaces are joined.
    Namespaces = 3,
    /// Standard input.
    Stdin = 4,
    /// Standard output.
    Stdout = 5,
    /// Standard error.
    Stderr = 6,
    /// The user namespace that is entered, and whose ids files have in idmapped mounts.
    UserNamespace = 7,
}

/// One mount of a container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PlannedMount {
    /// Absolute path in the container.
    #[prost(string, tag = "1")]
    pub destination: String,
    /// Mounted there: a path in the agent's mount namespace, or a new file system.
    #[prost(oneof = "Source", tags = "2, 3")]
    pub source: Option<Source>,
    /// No writing.
    #[prost(bool, tag = "4")]
    pub readonly: bool,
    /// No device nodes.
    #[prost(bool, tag = "5")]
    pub nodev: bool,
    /// Nothing to execute.
    #[prost(bool, tag = "6")]
    pub noexec: bool,
    /// No set-user-id.
    #[prost(bool, tag = "7")]
    pub nosuid: bool,
    /// In a container with a user namespace its files belong to whom they belong to in the container: the mount is idmapped.
    /// The file system must know idmapped mounts. Without a user namespace it says nothing.
    #[prost(bool, tag = "140")]
    pub idmap: bool,
}

/// What is mounted.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Source {
    /// A file or directory of the agent's mount namespace.
    #[prost(string, tag = "2")]
    Bind(String),
    /// A new instance of a file system.
    #[prost(message, tag = "3")]
    Filesystem(Filesystem),
}

/// A file system to make an instance of.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Filesystem {
    /// Its type, such as "tmpfs".
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its options; one with an empty value is a flag.
    #[prost(message, repeated, tag = "2")]
    pub options: Vec<FilesystemOption>,
}

/// One option of a file system.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FilesystemOption {
    /// Such as "size".
    #[prost(string, tag = "1")]
    pub key: String,
    /// Such as "65536k".
    #[prost(string, tag = "2")]
    pub value: String,
}

/// A device node.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Device {
    /// Path below /dev, without a leading slash.
    #[prost(string, tag = "1")]
    pub path: String,
    /// A block device; otherwise a character device.
    #[prost(bool, tag = "2")]
    pub block: bool,
    /// Major number.
    #[prost(uint32, tag = "3")]
    pub major: u32,
    /// Minor number.
    #[prost(uint32, tag = "4")]
    pub minor: u32,
    /// Permission bits.
    #[prost(uint32, tag = "5")]
    pub mode: u32,
}

/// A program with all that it starts with. Names are resolved and values checked.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Program {
    /// The arguments; the first names the executable.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub args: Vec<Vec<u8>>,
    /// "NAME=value"
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub env: Vec<Vec<u8>>,
    /// Absolute; made if missing.
    #[prost(string, tag = "3")]
    pub cwd: String,
    /// User id.
    #[prost(uint32, tag = "4")]
    pub uid: u32,
    /// Group id.
    #[prost(uint32, tag = "5")]
    pub gid: u32,
    /// Supplemental groups.
    #[prost(uint32, repeated, tag = "6")]
    pub groups: Vec<u32>,
    /// Capabilities.
    #[prost(message, optional, tag = "7")]
    pub capabilities: Option<CapabilityBits>,
    /// Sets no_new_privs.
    #[prost(bool, tag = "8")]
    pub no_new_privs: bool,
    /// Resource limits.
    #[prost(message, repeated, tag = "9")]
    pub rlimits: Vec<ResourceLimit>,
    /// Its standard streams are a new terminal.
    #[prost(bool, tag = "10")]
    pub terminal: bool,
    /// Classic BPF; empty for none.
    #[prost(bytes = "vec", tag = "11")]
    pub seccomp_filter: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_ bits it is loaded with.
    #[prost(uint32, tag = "140")]
    pub seccomp_flags: u32,
    /// -1000 to 1000.
    #[prost(int32, tag = "12")]
    pub oom_score_adj: i32,
}

/// Capability sets, one bit for each capability.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct CapabilityBits {
    /// The bounding set.
    #[prost(uint64, tag = "1")]
    pub bounding: u64,
    /// The effective set.
    #[prost(uint64, tag = "2")]
    pub effective: u64,
    /// The permitted set.
    #[prost(uint64, tag = "3")]
    pub permitted: u64,
    /// The inheritable set.
    #[prost(uint64, tag = "4")]
    pub inheritable: u64,
    /// The ambient set.
    #[prost(uint64, tag = "5")]
    pub ambient: u64,
}

/// A resource limit.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ResourceLimit {
    /// RLIMIT_ number of x86-64 Linux.
    #[prost(uint32, tag = "1")]
    pub resource: u32,
    /// The soft limit; u64::MAX is none.
    #[prost(uint64, tag = "2")]
    pub soft: u64,
    /// The hard limit; u64::MAX is none.
    #[prost(uint64, tag = "3")]
    pub hard: u64,
}

/// What a stub reports.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Report {
    /// Which report it is.
    #[prost(oneof = "Event", tags = "1, 2, 3, 4")]
    pub event: Option<Event>,
}

/// One report of a stub.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Event {
    /// The process that goes on has this id in the agent's PID namespace.
    #[prost(int32, tag = "1")]
    Forked(i32),
    /// Everything is prepared; the master of the terminal, if there is one, comes along.
    #[prost(bool, tag = "2")]
    Ready(bool),
    /// The next thing is execve; if the socket now closes, it has succeeded.
    #[prost(bool, tag = "3")]
    Executing(bool),
    /// It failed, and the stub ends.
    #[prost(message, tag = "4")]
    Failed(Failure),
}

/// Why a stub failed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failure {
    /// [`isopod_proto::ErrorKind`] as its number.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    /// The whole text.
    #[prost(string, tag = "2")]
    pub message: String,
}
