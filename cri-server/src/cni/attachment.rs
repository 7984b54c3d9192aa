//! What CNI has attached, kept in a file a sandbox from before the ADD to after the DEL: so that a DEL uses the configuration
//! and the result of its ADD, whenever it happens and whatever the configuration directory has by then.

use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use isopod_proto::ObjectId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{CniError, NetworkList};

/// An attachment of a sandbox to a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// The sandbox.
    #[serde(with = "crate::object_id")]
    pub sandbox: ObjectId,
    /// The network.
    pub list: NetworkList,
    /// The path of the pod's network namespace.
    pub namespace: PathBuf,
    /// CNI_ARGS.
    pub arguments: String,
    /// What plugins with a capability are told.
    pub runtime_config: Map<String, Value>,
    /// The result of ADD; none if it did not come to its end.
    pub result: Option<Value>,
}

/// The attachments of a node.
pub struct Attachments {
    directory: PathBuf,
}

impl Attachments {
    /// Those in `directory`, which is made when there is something to keep.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn path(&self, sandbox: &ObjectId) -> PathBuf {
        self.directory.join(format!("{sandbox}.json"))
    }

    /// Keeps an attachment, durably, in place of what was kept of its sandbox.
    pub fn put(&self, attachment: &Attachment) -> Result<(), CniError> {
        let path = self.path(&attachment.sandbox);
        let failed = |source| CniError::Attachment { doing: "write", path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory).map_err(failed)?;
        let bytes = serde_json::to_vec(attachment).expect("it has only string keys");
        let draft = path.with_extension("draft");
        let mut file = File::create(&draft).map_err(failed)?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(failed)?;
        std::fs::rename(&draft, &path).map_err(failed)?;
        File::open(&self.directory).and_then(|directory| directory.sync_all()).map_err(failed)
    }

    /// What is kept of the sandbox; none if it is attached to nothing.
    pub fn get(&self, sandbox: &ObjectId) -> Result<Option<Attachment>, CniError> {
        read(&self.path(sandbox))
    }

    /// Forgets the sandbox. Nothing to forget is a success.
    pub fn remove(&self, sandbox: &ObjectId) -> Result<(), CniError> {
        let path = self.path(sandbox);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                Err(CniError::Attachment { doing: "remove", path, source })
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// All that can be read. What cannot is reported in the log.
    pub fn all(&self) -> Vec<Attachment> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(attachment) => found.extend(attachment),
                Err(error) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "an attachment of CNI is unreadable")
                }
            }
        }
        found
    }
}

fn read(path: &Path) -> Result<Option<Attachment>, CniError> {
    let failed = |source| CniError::Attachment { doing: "read", path: path.into(), source };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(error.into()))
}
