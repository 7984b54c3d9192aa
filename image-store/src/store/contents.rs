//! What the database holds, at one moment.

use std::collections::{BTreeMap, BTreeSet};

use super::StoreError;
use super::database::Record;
use crate::digest::{Digest, ImageId, is_hex};
use crate::image::Image;
use crate::preload::Preload;
use crate::reference::ImageName;

/// All that is known at one moment.
#[derive(Default)]
pub(super) struct Contents {
    pub images: BTreeMap<ImageId, Record>,
    /// Full name → id.
    pub names: BTreeMap<String, ImageId>,
    /// File → what was preloaded from it.
    pub preloads: BTreeMap<String, Preload>,
}

impl Contents {
    /// The diff ids of all images.
    pub(super) fn layers(&self) -> BTreeSet<&str> {
        self.images.values().flat_map(|record| record.layers.iter().map(String::as_str)).collect()
    }

    /// The image that a reference stands for, see [`crate::ImageStore::find`].
    pub(super) fn find(&self, reference: &str) -> Result<Option<ImageId>, StoreError> {
        let bare = reference.strip_prefix("sha256:").unwrap_or(reference);
        if let Ok(id) = Digest::parse(&format!("sha256:{bare}"))
            && self.images.contains_key(&id)
        {
            return Ok(Some(id));
        }
        let named = ImageName::parse(reference).ok().and_then(|name| self.names.get(&name.to_string()));
        if let Some(id) = named.filter(|id| self.images.contains_key(id)) {
            return Ok(Some(id.clone()));
        }
        if bare.is_empty() || !is_hex(bare) {
            return Ok(None);
        }
        let mut matching = self.images.keys().filter(|id| id.hex().starts_with(bare));
        match (matching.next(), matching.next()) {
            (Some(_), Some(_)) => Err(StoreError::Ambiguous { reference: reference.to_owned() }),
            (found, _) => Ok(found.cloned()),
        }
    }

    /// The image `id`, which is there.
    pub(super) fn image(&self, id: &ImageId) -> Image {
        let record = &self.images[id];
        let names = self.names.iter().filter(|(_, named)| *named == id).map(|(name, _)| name.clone());
        let (repo_digests, repo_tags) = names.partition(|name| name.contains('@'));
        Image {
            id: id.clone(),
            repo_tags,
            repo_digests,
            size: record.size,
            config: record.config.clone().into(),
            layers: record.layers.len() as u32,
            pinned: self.preloads.values().any(|preload| preload.ids().any(|pinned| pinned == *id)),
        }
    }
}
