//! containerd's `certs.d`: a directory a registry, with a `hosts.toml` that says through which hosts it is reached.
//!
//! Read as containerd's `docs/hosts.md` describes it, at each pull. What is different: a file that makes no sense is an error,
//! where containerd goes on as if there were none and asks the registry itself; an `http://` host is asked over HTTP also if it
//! has TLS settings; one client certificate a host.

pub(crate) mod parse;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderMap;

use super::error::RegistryError;

/// Most bytes of a `hosts.toml`, and of a file with certificates or a key.
const MAX_HOSTS_FILE: u64 = 256 << 10;
const MAX_PEM_FILE: u64 = 4 << 20;

/// A host that a registry is reached through.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Host {
    /// Where its API is, such as `https://mirror.example/v2`. `None`: the registry itself.
    pub api: Option<Url>,
    /// It may give the contents of a digest.
    pub pull: bool,
    /// It may say what a tag stands for.
    pub resolve: bool,
    /// PEM files of certificate authorities to accept besides the system's.
    pub ca: Vec<PathBuf>,
    /// PEM files of the certificate and the key to show; without the second, the first has both.
    pub client: Option<(PathBuf, Option<PathBuf>)>,
    /// Accept any certificate.
    pub skip_verify: bool,
    /// To send with every request.
    pub headers: HeaderMap,
    /// How long a connection may take to come about, if not as long as usual.
    pub connect_timeout: Option<Duration>,
    /// The proxy to use, whatever the environment says.
    pub proxy: Option<Url>,
}

impl Host {
    /// The registry itself, as it is reached where nothing is configured.
    pub(super) fn itself() -> Self {
        Self {
            api: None,
            pull: true,
            resolve: true,
            ca: Vec::new(),
            client: None,
            skip_verify: false,
            headers: HeaderMap::new(),
            connect_timeout: None,
            proxy: None,
        }
    }
}

/// What `root` says about `registry` (its name in image names, with a port if there is one): the hosts in the order to try
/// them, and the file they are from. `None`: nothing.
pub(super) fn load(root: &Path, registry: &str) -> Result<Option<(PathBuf, Vec<Host>)>, RegistryError> {
    for name in directory_names(registry) {
        let directory = root.join(name);
        if !exists(&directory)? {
            continue;
        }
        let file = directory.join("hosts.toml");
        let text = if exists(&file)? { read(&file, MAX_HOSTS_FILE)? } else { Vec::new() };
        if text.is_empty() {
            return Ok(Some((directory.clone(), vec![docker_certificates(&directory)?])));
        }
        let text = String::from_utf8(text).map_err(|_| RegistryError::Value {
            path: file.clone(),
            key: "the file".to_owned(),
            problem: "is not UTF-8".to_owned(),
        })?;
        let parsed = parse::parse(&text, &file)?;
        for key in parsed.unknown {
            tracing::warn!(file = %file.display(), key, "a key of hosts.toml means nothing to isopod");
        }
        return Ok(Some((file, parsed.hosts)));
    }
    Ok(None)
}

/// Reads a file of certificates or a key.
pub(super) fn read_pem(path: &Path) -> Result<Vec<u8>, RegistryError> {
    read(path, MAX_PEM_FILE)
}

/// Where to look for a registry's directory, in this order: `host_5000_`, `host:5000`, `_default`.
fn directory_names(registry: &str) -> Vec<String> {
    let with_port = registry.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    let names = with_port.map(|(host, port)| format!("{host}_{port}_"));
    // An image's name cannot make it leave the directory: the parser of names lets no such registry through.
    names.into_iter().chain([registry.to_owned(), "_default".to_owned()]).collect()
}

/// A directory without `hosts.toml` is as Docker has them: `*.crt` are authorities, `*.cert` and `*.key` the client's.
fn docker_certificates(directory: &Path) -> Result<Host, RegistryError> {
    let failed = |source| RegistryError::Read { path: directory.to_owned(), source };
    let mut host = Host::itself();
    let mut clients = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.ca.push(path),
            Some("cert") => clients.push(path),
            _ => {}
        }
    }
    host.ca.sort();
    clients.sort();
    if clients.len() > 1 {
        let problem = "is not the only client certificate here; isopod can show one".to_owned();
        return Err(RegistryError::Certificate { path: clients.remove(1), problem });
    }
    if let Some(certificate) = clients.pop() {
        let key = certificate.with_extension("key");
        let key = exists(&key)?.then_some(key);
        host.client = Some((certificate, key));
    }
    Ok(host)
}

fn exists(path: &Path) -> Result<bool, RegistryError> {
    path.try_exists().map_err(|source| RegistryError::Read { path: path.to_owned(), source })
}

/// A regular file's contents, of at most `limit` bytes.
fn read(path: &Path, limit: u64) -> Result<Vec<u8>, RegistryError> {
    let failed = |source| RegistryError::Read { path: path.to_owned(), source };
    // A FIFO would make the pull wait for ever.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)).map_err(failed)?;
    match bytes.len() as u64 > limit {
        true => Err(RegistryError::TooLarge { path: path.to_owned(), limit }),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::TempDir::new().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    fn first_api(root: &tempfile::TempDir, registry: &str) -> Option<String> {
        let (_, hosts) = load(root.path(), registry).unwrap()?;
        hosts[0].api.as_ref().map(Url::to_string)
    }

    #[test]
    fn the_directory_is_looked_for_as_containerd_does() {
        let server = |name: &str| format!("server = \"https://{name}\"");
        let files = ["r.example_5000_", "r.example:5000", "r.example", "_default"];
        let texts: Vec<_> = ["a", "b", "c", "d"].iter().map(|name| server(name)).collect();
        let paths: Vec<_> = files.iter().map(|file| format!("{file}/hosts.toml")).collect();
        let all: Vec<_> = paths.iter().map(String::as_str).zip(texts.iter().map(String::as_str)).collect();
        let root = root(&all);
        for (registry, api) in [("r.example:5000", "a"), ("r.example", "c"), ("other.example:5000", "d")] {
            assert_eq!(first_api(&root, registry), Some(format!("https://{api}/v2")), "{registry}");
        }
        std::fs::remove_dir_all(root.path().join("r.example_5000_")).unwrap();
        assert_eq!(first_api(&root, "r.example:5000").unwrap(), "https://b/v2");
        std::fs::remove_dir_all(root.path().join("_default")).unwrap();
        assert_eq!(load(root.path(), "other.example").unwrap(), None);
        assert_eq!(load(&root.path().join("not/there"), "other.example").unwrap(), None);
    }

    #[test]
    fn a_directory_without_hosts_toml_has_docker_s_certificates() {
        let root = root(&[("r/b.crt", ""), ("r/a.crt", ""), ("r/c.cert", ""), ("r/c.key", ""), ("r/x", "")]);
        let (_, hosts) = load(root.path(), "r").unwrap().unwrap();
        let at = |name: &str| root.path().join("r").join(name);
        let wanted = Host {
            ca: vec![at("a.crt"), at("b.crt")],
            client: Some((at("c.cert"), Some(at("c.key")))),
            ..Host::itself()
        };
        assert_eq!(hosts, [wanted]);
        std::fs::write(at("d.cert"), "").unwrap();
        assert!(load(root.path(), "r").unwrap_err().to_string().contains("d.cert"));
    }

    #[test]
    fn what_is_too_large_or_no_file_is_refused() {
        let large = "#".repeat(MAX_HOSTS_FILE as usize + 1);
        let root = root(&[("large/hosts.toml", &large), ("directory/hosts.toml/x", "")]);
        assert!(matches!(load(root.path(), "large"), Err(RegistryError::TooLarge { .. })));
        assert!(matches!(load(root.path(), "directory"), Err(RegistryError::Read { .. })));
    }
}
