//! Is this host ready to run microVMs, and if not, what is there to do?

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::{cgroup, tools};

/// What was found out about one need of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub subject: &'static str,
    /// Whether it is as it must be, and if not, what is wrong and what to do.
    pub verdict: Verdict,
}

/// Whether a need is met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Good,
    /// Pods run, with a layer less around them.
    Weaker {
        /// What is missing.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
    /// Pods cannot run.
    NoPods {
        /// What is wrong.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
    /// Pods cannot have a network.
    NoNetwork {
        /// What is wrong.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
}

impl Finding {
    /// Whether the need is met, if not in the best way.
    pub fn is_good(&self) -> bool {
        matches!(self.verdict, Verdict::Good | Verdict::Weaker { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Good => write!(f, "ok    {}", self.subject),
            Verdict::Weaker { problem, remedy } => {
                write!(f, "WARN  {}: {problem}\n      -> {remedy}", self.subject)
            }
            Verdict::NoPods { problem, remedy } | Verdict::NoNetwork { problem, remedy } => {
                write!(f, "FAIL  {}: {problem}\n      -> {remedy}", self.subject)
            }
        }
    }
}

/// The first problem that keeps pods from running, or from having a network.
pub fn first_problem(findings: &[Finding], network: bool) -> Option<String> {
    findings.iter().find_map(|finding| match &finding.verdict {
        Verdict::NoPods { problem, .. } if !network => Some(format!("{}: {problem}", finding.subject)),
        Verdict::NoNetwork { problem, .. } if network => Some(format!("{}: {problem}", finding.subject)),
        Verdict::Good | Verdict::Weaker { .. } | Verdict::NoPods { .. } | Verdict::NoNetwork { .. } => None,
    })
}

/// Looks at everything the daemon needs of the host. Opens devices and files, changes nothing.
pub fn host(config: &Config) -> Vec<Finding> {
    let pods = |subject, result: Result<(), (String, String)>| Finding {
        subject,
        verdict: result.map_or_else(|(problem, remedy)| Verdict::NoPods { problem, remedy }, |()| Verdict::Good),
    };
    let network = |subject, result: Result<(), (String, String)>| Finding {
        subject,
        verdict: result.map_or_else(|(problem, remedy)| Verdict::NoNetwork { problem, remedy }, |()| Verdict::Good),
    };
    let virtualization = check_cpu().map_err(|problem| {
        let remedy =
            "use a machine with hardware virtualization, or switch on nested virtualization in the host of this one";
        (problem, remedy.to_owned())
    });
    vec![
        pods("/dev/kvm", kvm(Path::new("/dev/kvm"))),
        pods("CPU virtualization", virtualization),
        pods("VMM program", program(&config.vmm.binary)),
        pods("guest kernel", kernel(&config.vmm.kernel)),
        pods("guest initramfs", readable(&config.vmm.initramfs)),
        pods("cgroup v2", cgroups()),
        pods("the VMM's jail", jail(Path::new("/proc"))),
        Finding { subject: "Landlock", verdict: landlock(Path::new("/sys/kernel/security/lsm")) },
        pods("mkfs.ext4", tool("mkfs.ext4", "e2fsprogs")),
        network("/dev/net/tun", tun(Path::new("/dev/net/tun"))),
        network("nft", tool("nft", "nftables")),
    ]
}

fn kvm(path: &Path) -> Result<(), (String, String)> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(path);
    opened.map(drop).map_err(|error| match error.kind() {
        ErrorKind::NotFound => (
            format!("{} does not exist", path.display()),
            "load the module kvm_intel or kvm_amd; switch virtualization on in the firmware, or for a virtual machine \
             in its host"
                .to_owned(),
        ),
        ErrorKind::PermissionDenied => (
            format!("{} may not be opened", path.display()),
            "run the daemon as root, and in a container allow it the device".to_owned(),
        ),
        _ => (format!("{} cannot be opened: {error}", path.display()), "see dmesg for messages of kvm".to_owned()),
    })
}

/// Whether the CPU has what KVM needs to run Linux; otherwise says what it lacks.
pub fn check_cpu() -> Result<(), String> {
    virtualization(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn virtualization(cpuinfo: &str) -> Result<(), String> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    match flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        true => Ok(()),
        false => {
            Err("the CPU has neither vmx nor svm (/proc/cpuinfo): whatever /dev/kvm is, it cannot run a Linux guest"
                .to_owned())
        }
    }
}

fn program(path: &Path) -> Result<(), (String, String)> {
    let remedy = || "install isopod's files there, or set vmm.binary".to_owned();
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => Ok(()),
        Ok(_) => Err((format!("{} is not an executable file", path.display()), remedy())),
        Err(error) => Err((format!("{}: {error}", path.display()), remedy())),
    }
}

fn readable(path: &Path) -> Result<(), (String, String)> {
    File::open(path)
        .map(drop)
        .map_err(|error| (format!("{}: {error}", path.display()), "install isopod's guest files there".to_owned()))
}

fn kernel(path: &Path) -> Result<(), (String, String)> {
    check_kernel(path).map_err(|problem| {
        (problem, "install isopod's guest kernel, or set vmm.kernel to an uncompressed ELF vmlinux".to_owned())
    })
}

/// Whether there is an ELF file at `path`; otherwise says what there is.
pub fn check_kernel(path: &Path) -> Result<(), String> {
    let mut magic = [0; 4];
    let mut file = File::open(path).map_err(|error| format!("guest kernel {}: {error}", path.display()))?;
    match file.read_exact(&mut magic) {
        Ok(()) if magic == *b"\x7fELF" => Ok(()),
        Ok(()) => Err(format!("{} is not a kernel: an uncompressed ELF vmlinux is needed", path.display())),
        Err(error) => Err(format!("{} is not a kernel: {error}", path.display())),
    }
}

fn cgroups() -> Result<(), (String, String)> {
    let controllers: PathBuf = cgroup::root().map_or_else(PathBuf::new, |root| root.join("cgroup.controllers"));
    let remedy = "boot with the unified hierarchy (systemd.unified_cgroup_hierarchy=1)".to_owned();
    match std::fs::read_to_string(&controllers) {
        Ok(_) => Ok(()),
        Err(_) => Err(("no cgroup v2 hierarchy is mounted".to_owned(), remedy)),
    }
}

/// What the VMM's jail (`vmm/src/jail.rs`) needs of the kernel, as the proc file system `proc` tells.
fn jail(proc: &Path) -> Result<(), (String, String)> {
    for kind in ["mnt", "net", "pid", "ipc", "uts", "cgroup"] {
        if !proc.join("self/ns").join(kind).exists() {
            let remedy = "use a kernel with CONFIG_NAMESPACES and all that depends on it, as every distribution's is";
            return Err((format!("the kernel has no {kind} namespaces"), remedy.to_owned()));
        }
        let setting = format!("user.max_{kind}_namespaces");
        let limit = std::fs::read_to_string(proc.join("sys").join(setting.replace('.', "/"))).unwrap_or_default();
        if limit.trim() == "0" {
            return Err((format!("{setting} is 0"), format!("sysctl -w {setting}=65536")));
        }
    }
    let actions = std::fs::read_to_string(proc.join("sys/kernel/seccomp/actions_avail")).unwrap_or_default();
    if !actions.split_whitespace().any(|action| action == "kill_process") {
        let remedy = "use a kernel of at least 4.14 with CONFIG_SECCOMP_FILTER";
        return Err(("the kernel has no filters of system calls that kill".to_owned(), remedy.to_owned()));
    }
    Ok(())
}

/// Whether Landlock is in the list of security modules at `list`; without it the jail has a layer less.
fn landlock(list: &Path) -> Verdict {
    match std::fs::read_to_string(list) {
        Ok(modules) if modules.trim().split(',').any(|module| module == "landlock") => Verdict::Good,
        Ok(modules) => Verdict::Weaker {
            problem: format!("it is not among the kernel's security modules ({})", modules.trim()),
            remedy: "add landlock to the kernel's argument lsm=".to_owned(),
        },
        Err(error) => Verdict::Weaker {
            problem: format!("cannot tell whether the kernel has it: {}: {error}", list.display()),
            remedy: "mount -t securityfs securityfs /sys/kernel/security".to_owned(),
        },
    }
}

fn tun(path: &Path) -> Result<(), (String, String)> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(path);
    opened.map(drop).map_err(|error| (format!("{}: {error}", path.display()), "load the module tun".to_owned()))
}

fn tool(name: &str, package: &str) -> Result<(), (String, String)> {
    match tools::find(name) {
        Some(_) => Ok(()),
        None => Err((format!("the program {name} is not installed"), format!("install {package}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_without_virtualization_is_told_apart() {
        assert!(virtualization("processor\t: 0\nflags\t\t: fpu svm sse2\n").is_ok());
        assert!(virtualization("flags\t\t: fpu vme vmx\n").is_ok());
        assert!(virtualization("flags\t\t: fpu sse2 svm_lock\n").expect_err("no svm").contains("svm"));
        assert!(virtualization("").is_err());
    }

    #[test]
    fn a_missing_kvm_device_says_what_to_do() {
        let directory = tempfile::tempdir().expect("a directory");
        let (problem, remedy) = kvm(&directory.path().join("kvm")).expect_err("it is not there");
        assert!(problem.contains("does not exist") && remedy.contains("kvm_amd"));
    }

    #[test]
    fn a_file_that_is_no_kernel_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("vmlinux");
        assert!(check_kernel(&path).expect_err("missing").contains("vmlinux"));
        std::fs::write(&path, b"\x1f\x8b\x08\x00 gzip").expect("written");
        assert!(check_kernel(&path).expect_err("not a kernel").contains("not a kernel"));
        std::fs::write(&path, b"\x7fELF\x02\x01\x01").expect("written");
        assert_eq!(check_kernel(&path), Ok(()));
    }

    #[test]
    fn a_kernel_without_what_a_jail_is_made_of_is_told() {
        assert_eq!(jail(Path::new("/proc")), Ok(()));
        let proc = tempfile::tempdir().expect("a directory");
        assert!(jail(proc.path()).expect_err("nothing").0.contains("mnt namespaces"));
        let (spaces, user, seccomp) =
            (proc.path().join("self/ns"), proc.path().join("sys/user"), proc.path().join("sys/kernel/seccomp"));
        for path in [&spaces, &user, &seccomp] {
            std::fs::create_dir_all(path).expect("made");
        }
        for kind in ["mnt", "net", "pid", "ipc", "uts", "cgroup"] {
            std::fs::write(spaces.join(kind), "").expect("written");
        }
        std::fs::write(seccomp.join("actions_avail"), "kill_thread trap allow\n").expect("written");
        assert!(jail(proc.path()).expect_err("too old").0.contains("filters"));
        std::fs::write(seccomp.join("actions_avail"), "kill_process kill_thread\n").expect("written");
        assert_eq!(jail(proc.path()), Ok(()));
        std::fs::write(user.join("max_pid_namespaces"), "0\n").expect("written");
        assert_eq!(jail(proc.path()).expect_err("none allowed").1, "sysctl -w user.max_pid_namespaces=65536");
    }

    #[test]
    fn a_kernel_without_landlock_is_good_enough_and_told() {
        let directory = tempfile::tempdir().expect("a directory");
        let list = directory.path().join("lsm");
        let finding = |verdict| Finding { subject: "Landlock", verdict };
        assert!(finding(landlock(&list)).to_string().starts_with("WARN"));
        std::fs::write(&list, "lockdown,capability,yama").expect("written");
        let weaker = finding(landlock(&list));
        assert!(weaker.is_good() && weaker.to_string().contains("lsm="), "{weaker}");
        std::fs::write(&list, "capability,landlock,yama\n").expect("written");
        assert_eq!(landlock(&list), Verdict::Good);
    }

    #[test]
    fn a_network_problem_is_no_pod_problem() {
        let problem = Verdict::NoNetwork { problem: "x".into(), remedy: "y".into() };
        let findings = [Finding { subject: "nft", verdict: problem }];
        assert_eq!(first_problem(&findings, false), None);
        assert_eq!(first_problem(&findings, true), Some("nft: x".to_owned()));
    }
}
