//! Manifests, indexes and image configurations (OCI image-spec 1.1; Docker image manifest version 2, schema 2). Parsers of
//! a registry's bytes: they take bytes of bounded length and do no I/O.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::digest::Digest;
use crate::store::StoredConfig;

/// What a registry is asked for.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// What is wrong with a document.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum DocumentError {
    /// It is malformed.
    Malformed(String),
    /// It is of a kind that is not supported.
    Unsupported(String),
    /// It has nothing for this platform.
    NoPlatform(String),
}

/// A blob a manifest names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blob {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// A manifest or an index.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Document {
    /// The manifest for linux/amd64 that an index names.
    Index(Blob),
    Manifest {
        config: Blob,
        layers: Vec<Blob>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: u64,
    manifests: Option<Vec<RawDescriptor>>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<RawPlatform>,
}

/// What an image of an index is made for.
#[derive(Deserialize)]
pub(crate) struct RawPlatform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

impl RawPlatform {
    /// Whether it is this one.
    pub(crate) fn is_here(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
}

/// Parses a manifest or an index, told apart by what is in it.
pub(crate) fn parse(bytes: &[u8]) -> Result<Document, DocumentError> {
    let malformed = |problem: &str| DocumentError::Malformed(format!("manifest: {problem}"));
    let document: RawDocument =
        serde_json::from_slice(bytes).map_err(|error| DocumentError::Malformed(format!("manifest: {error}")))?;
    if document.schema_version != 2 {
        let version = document.schema_version;
        return Err(DocumentError::Unsupported(format!("manifest schema version {version}, only 2 is supported")));
    }
    match document {
        RawDocument { manifests: Some(manifests), config: None, layers: None, .. } => choose(manifests),
        RawDocument { manifests: None, config: Some(config), layers: Some(layers), .. } => {
            if !is_config(&config.media_type) {
                let media_type = config.media_type;
                return Err(DocumentError::Unsupported(format!("config of media type {media_type:?}: no image")));
            }
            if let Some(layer) = layers.iter().find(|layer| !is_layer(&layer.media_type)) {
                let media_type = &layer.media_type;
                return Err(DocumentError::Unsupported(format!("layer of media type {media_type:?}")));
            }
            let layers = layers.into_iter().map(blob).collect::<Result<_, _>>()?;
            Ok(Document::Manifest { config: blob(config)?, layers })
        }
        // Both at once would be a different image to different readers.
        _ => Err(malformed("neither an index nor a manifest")),
    }
}

fn choose(manifests: Vec<RawDescriptor>) -> Result<Document, DocumentError> {
    let platform = |descriptor: &RawDescriptor| match &descriptor.platform {
        Some(platform) => format!("{}/{}", platform.os, platform.architecture),
        None => "unspecified".to_owned(),
    };
    let known = manifests.iter().take(30).map(platform).collect::<Vec<_>>().join(", ");
    let here = |descriptor: &RawDescriptor| descriptor.platform.as_ref().is_some_and(RawPlatform::is_here);
    let wanted = manifests.into_iter().find(here);
    wanted.map(blob).transpose()?.map(Document::Index).ok_or(DocumentError::NoPlatform(known))
}

fn blob(descriptor: RawDescriptor) -> Result<Blob, DocumentError> {
    let digest = Digest::parse(&descriptor.digest).map_err(|error| DocumentError::Malformed(error.to_string()))?;
    Ok(Blob { digest, size: descriptor.size })
}

fn is_config(media_type: &str) -> bool {
    matches!(media_type, "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json")
}

fn is_layer(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
    )
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    rootfs: RawRootfs,
    config: Option<RawRunConfig>,
}

#[derive(Deserialize)]
struct RawRootfs {
    diff_ids: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawRunConfig {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
}

/// Parses an image configuration: its layers' diff ids, and how to run it.
pub(crate) fn parse_config(bytes: &[u8]) -> Result<(Vec<Digest>, StoredConfig), DocumentError> {
    let raw: RawConfig =
        serde_json::from_slice(bytes).map_err(|error| DocumentError::Malformed(format!("configuration: {error}")))?;
    if raw.os != "linux" || raw.architecture != "amd64" {
        return Err(DocumentError::NoPlatform(format!("{}/{}", raw.os, raw.architecture)));
    }
    let diff_ids = raw.rootfs.diff_ids.unwrap_or_default();
    let diff_ids = diff_ids.iter().map(|id| Digest::parse(id)).collect::<Result<Vec<_>, _>>();
    let diff_ids = diff_ids.map_err(|error| DocumentError::Malformed(format!("configuration: diff id {error}")))?;
    let RawRunConfig { user, env, entrypoint, cmd, working_dir, stop_signal, labels, volumes, exposed_ports } =
        raw.config.unwrap_or_default();
    let keys = |map: Option<BTreeMap<String, serde::de::IgnoredAny>>| -> BTreeSet<String> {
        map.unwrap_or_default().into_keys().collect()
    };
    let config = StoredConfig {
        user: user.unwrap_or_default(),
        env: env.unwrap_or_default(),
        entrypoint: entrypoint.unwrap_or_default(),
        cmd: cmd.unwrap_or_default(),
        working_dir: working_dir.unwrap_or_default(),
        stop_signal: stop_signal.unwrap_or_default(),
        labels: labels.unwrap_or_default(),
        volumes: keys(volumes),
        exposed_ports: keys(exposed_ports),
    };
    Ok((diff_ids, config))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(digit: &str) -> String {
        format!("sha256:{}", digit.repeat(64))
    }

    #[test]
    fn an_index_leads_to_its_linux_amd64_manifest() {
        let entry = |digit: &str, os: &str, architecture: &str| {
            let digest = digest(digit);
            format!(r#"{{"digest":"{digest}","size":7,"platform":{{"os":"{os}","architecture":"{architecture}"}}}}"#)
        };
        let (arm, amd) = (entry("a", "linux", "arm64"), entry("b", "linux", "amd64"));
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{arm},{amd}]}}"#);
        let wanted = Blob { digest: Digest::parse(&digest("b")).unwrap(), size: 7 };
        assert_eq!(parse(index.as_bytes()), Ok(Document::Index(wanted)));
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{arm}]}}"#);
        assert_eq!(parse(index.as_bytes()), Err(DocumentError::NoPlatform("linux/arm64".into())));
    }

    #[test]
    fn what_is_both_an_index_and_a_manifest_is_refused() {
        let both = r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#;
        assert!(matches!(parse(both.as_bytes()), Err(DocumentError::Malformed(_))));
        assert!(matches!(parse(br#"{"schemaVersion":1}"#), Err(DocumentError::Unsupported(_))));
        assert!(matches!(parse(b"[]"), Err(DocumentError::Malformed(_))));
    }

    #[test]
    fn a_configuration_may_have_nulls() {
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{}"]}},
               "config":{{"User":"1:2","Cmd":["a"],"Entrypoint":null,"Volumes":{{"/v":{{}}}},"Labels":null}}}}"#,
            digest("c")
        );
        let (diff_ids, config) = parse_config(text.as_bytes()).unwrap();
        assert_eq!(diff_ids.len(), 1);
        assert_eq!((config.user.as_str(), config.cmd.as_slice()), ("1:2", &["a".to_owned()][..]));
        assert!(config.volumes.contains("/v") && config.entrypoint.is_empty());
    }
}
