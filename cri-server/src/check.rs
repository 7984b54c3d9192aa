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
    /// Whether the need is met.
    pub fn is_good(&self) -> bool {
        self.verdict == Verdict::Good
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Good => write!(f, "ok    {}", self.subject),
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
        Verdict::Good | Verdict::NoPods { .. } | Verdict::NoNetwork { .. } => None,
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
    fn a_network_problem_is_no_pod_problem() {
        let problem = Verdict::NoNetwork { problem: "x".into(), remedy: "y".into() };
        let findings = [Finding { subject: "nft", verdict: problem }];
        assert_eq!(first_problem(&findings, false), None);
        assert_eq!(first_problem(&findings, true), Some("nft: x".to_owned()));
    }
}
