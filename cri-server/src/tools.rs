//! Finding the few programs of the host that the daemon runs.

use std::path::PathBuf;

/// Where Debian and others put them; the environment is not asked.
const DIRECTORIES: [&str; 6] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/local/bin"];

/// The path of the program `name`, if it is installed.
pub fn find(name: &str) -> Option<PathBuf> {
    DIRECTORIES.iter().map(|directory| PathBuf::from(directory).join(name)).find(|path| path.is_file())
}
