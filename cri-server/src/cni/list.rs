//! Network configurations: files of the configuration directory (section 1).

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CniError;

/// Most bytes of a configuration file.
const MAX_FILE: u64 = 1024 * 1024;
/// Most plugins of a network.
const MAX_PLUGINS: usize = 32;

/// Versions of the specification that can be spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Version {
    /// 0.3.1
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// 0.4.0: CHECK, and DEL knows what ADD gave.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// 1.0.0
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// 1.1.0: STATUS and GC.
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }
}

/// A network: plugins to be called one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkList {
    /// The network's name.
    pub name: String,
    /// The version to speak with its plugins.
    pub version: Version,
    /// CHECK is not to be called.
    pub disable_check: bool,
    /// GC is not to be called.
    pub disable_gc: bool,
    /// At least one.
    pub plugins: Vec<Plugin>,
}

/// A plugin's part of a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plugin {
    /// The name of its program.
    pub kind: String,
    /// Its whole configuration.
    pub config: Map<String, Value>,
}

impl Plugin {
    /// What the runtime may tell it: the keys of `capabilities` that are true.
    pub fn capabilities(&self) -> impl Iterator<Item = &String> {
        let capabilities = self.config.get("capabilities").and_then(Value::as_object);
        capabilities.into_iter().flatten().filter(|(_, wanted)| **wanted == Value::Bool(true)).map(|(name, _)| name)
    }
}

impl NetworkList {
    /// Whether one of the plugins takes this capability.
    pub fn takes(&self, capability: &str) -> bool {
        self.plugins.iter().any(|plugin| plugin.capabilities().any(|name| name == capability))
    }
}

/// The network of the first file in lexical order, as containerd and CRI-O choose; none if there is no file. Other files
/// are not used.
pub fn load(directory: &Path) -> Result<Option<NetworkList>, CniError> {
    let failed = |error: std::io::Error| CniError::Config { path: directory.into(), problem: error.to_string() };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if ["conf", "conflist", "json"].contains(&extension) {
            paths.push(path);
        }
    }
    paths.sort();
    let Some(path) = paths.into_iter().next() else { return Ok(None) };
    match read(&path) {
        Ok(list) => Ok(Some(list)),
        Err(problem) => Err(CniError::Config { path, problem }),
    }
}

fn read(path: &PathBuf) -> Result<NetworkList, String> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("it has more than {MAX_FILE} bytes"));
    }
    parse(&bytes)
}

/// Reads a network, or the configuration of a single plugin, which is a network of one.
pub fn parse(bytes: &[u8]) -> Result<NetworkList, String> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| format!("it is not JSON: {error}"))?;
    let Value::Object(object) = value else { return Err("it is not a JSON object".to_owned()) };
    let text = |key: &str| object.get(key).and_then(Value::as_str);
    let name = text("name").ok_or("it has no name")?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if !name.bytes().all(plain) || !name.starts_with(|first: char| first.is_ascii_alphanumeric()) {
        return Err(format!("{:?} is not the name of a network", shown(name)));
    }
    let flag = |key: &str| object.get(key).and_then(Value::as_bool).unwrap_or(false);
    let plugins = match object.get("plugins") {
        Some(Value::Array(plugins)) => plugins.iter().map(plugin).collect::<Result<Vec<_>, _>>()?,
        Some(_) => return Err("its plugins are not a list".to_owned()),
        None => vec![plugin(&Value::Object(object.clone()))?],
    };
    if plugins.is_empty() || plugins.len() > MAX_PLUGINS {
        return Err(format!("it has {} plugins, not 1 to {MAX_PLUGINS}", plugins.len()));
    }
    Ok(NetworkList {
        name: name.to_owned(),
        version: version(&object)?,
        disable_check: flag("disableCheck"),
        disable_gc: flag("disableGC"),
        plugins,
    })
}

/// The newest version that both sides know of `cniVersions`, or else `cniVersion`.
fn version(object: &Map<String, Value>) -> Result<Version, String> {
    let offered = object.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
    let newest = offered.filter_map(|version| Version::parse(version.as_str()?)).max();
    let single = object.get("cniVersion").and_then(Value::as_str);
    match (newest, single) {
        (Some(version), _) => Ok(version),
        (None, Some(text)) => Version::parse(text).ok_or_else(|| {
            let known = Version::ALL.map(Version::as_str).join(", ");
            format!("it has cniVersion {:?}; isopod knows {known}", shown(text))
        }),
        (None, None) => Err("it has no cniVersion that isopod knows".to_owned()),
    }
}

fn plugin(value: &Value) -> Result<Plugin, String> {
    let Value::Object(config) = value else { return Err("a plugin is not a JSON object".to_owned()) };
    let kind = config.get("type").and_then(Value::as_str).ok_or("a plugin has no type")?;
    // The name of a program below the plugin directories, and of nothing else.
    if kind.is_empty() || kind.starts_with('.') || kind.contains(['/', '\0']) {
        return Err(format!("{:?} is not the type of a plugin", shown(kind)));
    }
    Ok(Plugin { kind: kind.to_owned(), config: config.clone() })
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}
