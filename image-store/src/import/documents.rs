//! What an archive says about the images in it. Parsers of bounded bytes, without I/O.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::digest::Digest;
use crate::manifest::RawPlatform;

/// Most images of an archive, and names of one.
pub(super) const MAX_IMAGES: usize = 1000;

/// The name that containerd gives an image of an OCI layout; and OCI's own, which may be a tag alone (image-spec, annotations.md).
const CONTAINERD_NAME: &str = "io.containerd.image.name";
const OCI_NAME: &str = "org.opencontainers.image.ref.name";

/// An image of an OCI layout (image-spec, image-layout.md "index.json").
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LayoutImage {
    /// Of its manifest or index.
    pub digest: Digest,
    /// A name, or a tag alone.
    pub name: Option<String>,
}

/// An image of `docker save` (moby's image/spec, "manifest.json").
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SavedImage {
    /// The file with its configuration.
    pub config: String,
    /// Its names.
    #[serde(default, deserialize_with = "or_empty")]
    pub repo_tags: Vec<String>,
    /// The files with its layers, bottom first.
    #[serde(default, deserialize_with = "or_empty")]
    pub layers: Vec<String>,
}

fn or_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
struct RawIndex {
    manifests: Vec<RawDescriptor>,
}

#[derive(Deserialize)]
struct RawDescriptor {
    digest: String,
    platform: Option<RawPlatform>,
    annotations: Option<BTreeMap<String, String>>,
}

/// The images that `index.json` names and that can be for this platform.
pub(crate) fn layout(bytes: &[u8]) -> Result<Vec<LayoutImage>, String> {
    let index: RawIndex = serde_json::from_slice(bytes).map_err(|error| format!("index.json: {error}"))?;
    if index.manifests.len() > MAX_IMAGES {
        return Err(format!("index.json: more than {MAX_IMAGES} images"));
    }
    let here = |descriptor: &RawDescriptor| descriptor.platform.as_ref().is_none_or(RawPlatform::is_here);
    let images = index.manifests.into_iter().filter(here).map(|descriptor| {
        let digest = Digest::parse(&descriptor.digest).map_err(|error| format!("index.json: {error}"))?;
        let mut annotations = descriptor.annotations.unwrap_or_default();
        let name = annotations.remove(CONTAINERD_NAME).or_else(|| annotations.remove(OCI_NAME));
        Ok(LayoutImage { digest, name: name.filter(|name| !name.is_empty()) })
    });
    images.collect()
}

/// The images that `manifest.json` names.
pub(crate) fn saved(bytes: &[u8]) -> Result<Vec<SavedImage>, String> {
    let images: Vec<SavedImage> = serde_json::from_slice(bytes).map_err(|error| format!("manifest.json: {error}"))?;
    match images.len() > MAX_IMAGES || images.iter().any(|image| image.repo_tags.len() > MAX_IMAGES) {
        true => Err(format!("manifest.json: more than {MAX_IMAGES} images or names")),
        false => Ok(images),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_other_platforms_are_left_out_and_containerd_s_name_comes_first() {
        let digest = |digit: &str| format!("sha256:{}", digit.repeat(64));
        let index = serde_json::json!({"manifests": [
            {"digest": digest("1"), "platform": {"os": "linux", "architecture": "arm64"}},
            {"digest": digest("2"), "annotations": {CONTAINERD_NAME: "a.example/b:1", OCI_NAME: "1"}},
            {"digest": digest("3"), "platform": {"os": "linux", "architecture": "amd64"}, "annotations": {OCI_NAME: ""}},
        ]});
        let images = layout(index.to_string().as_bytes()).unwrap();
        let names: Vec<_> = images.iter().map(|image| image.name.as_deref()).collect();
        assert_eq!(names, [Some("a.example/b:1"), None]);
        assert!(layout(br#"{"manifests": [{"digest": "x"}]}"#).is_err());
        assert!(layout(b"[]").is_err());
    }

    #[test]
    fn a_saved_image_may_have_no_names() {
        let images = saved(br#"[{"Config": "c.json", "RepoTags": null, "Layers": ["a/layer.tar"]}]"#).unwrap();
        assert_eq!(images[0].repo_tags, Vec::<String>::new());
        assert_eq!(images[0].layers, ["a/layer.tar"]);
        assert!(saved(b"[{}]").is_err());
    }
}
