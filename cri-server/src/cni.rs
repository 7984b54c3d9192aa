//! The Container Network Interface: plugins, programs of the node's that give a pod's network namespace its interface.
//!
//! Follows the CNI specification 1.1.0 (<https://www.cni.dev/docs/spec/>); sections named here are its. Plugins run in the
//! node's network namespace, as root, and are trusted to do their work, but not to end or to print little.

mod attachment;
mod capabilities;
pub(crate) mod list;
mod plugin;
pub(crate) mod result;

use std::path::PathBuf;
use std::time::Duration;

use isopod_proto::{ErrorKind, ObjectId};
use serde_json::{Map, Value, json};

pub use self::attachment::{Attachment, Attachments};
pub use self::capabilities::PodArguments;
pub use self::list::{NetworkList, Version};
use self::plugin::{Call, Command, Runner};
pub use self::result::Outcome;
use crate::config::CniConfig;

/// The interface that a pod's network gives it.
pub const INTERFACE: &str = "eth0";
/// How long one plugin may take to say whether it can be used: the kubelet asks every few seconds.
const STATUS_DEADLINE: Duration = Duration::from_secs(4);

/// Calls plugins.
pub struct Cni {
    config_directory: PathBuf,
    runner: Runner,
}

/// A network by CNI cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The configuration.
    #[error("the CNI configuration {path} cannot be used: {problem}")]
    Config {
        /// Which file or directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A plugin is not there.
    #[error("the CNI plugin {plugin} is in none of the directories {directories:?}")]
    NotInstalled {
        /// Which.
        plugin: String,
        /// Where it was looked for.
        directories: Vec<PathBuf>,
    },
    /// A plugin said that it failed.
    #[error("CNI plugin {plugin} failed at {command}: {message}")]
    Plugin {
        /// Which.
        plugin: String,
        /// At what.
        command: &'static str,
        /// What it said.
        message: String,
        /// Whether it asks to be called again later (error code 11).
        again: bool,
    },
    /// A plugin took too long, and was killed.
    #[error("CNI plugin {plugin} did not finish {command} within {seconds} s")]
    Late {
        /// Which.
        plugin: String,
        /// At what.
        command: &'static str,
        /// What it had.
        seconds: u64,
    },
    /// A plugin printed too much, and was killed.
    #[error("CNI plugin {plugin} printed more than {limit} bytes at {command}")]
    Flood {
        /// Which.
        plugin: String,
        /// At what.
        command: &'static str,
        /// What it may print.
        limit: u64,
    },
    /// A result that makes no sense.
    #[error("CNI plugin {plugin} gave a result that cannot be used: {problem}")]
    Result {
        /// Which.
        plugin: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The pod asks for what the network has no plugin for, or for what would not reach a plugin as it is.
    #[error("{0}")]
    Request(String),
    /// What was attached cannot be kept.
    #[error("cannot {doing} {path}, where it is kept what CNI has attached")]
    Attachment {
        /// What was tried.
        doing: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl CniError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } | Self::NotInstalled { .. } => ErrorKind::FailedPrecondition,
            Self::Plugin { again: true, .. } => ErrorKind::Unavailable,
            Self::Late { .. } => ErrorKind::DeadlineExceeded,
            Self::Request(_) => ErrorKind::InvalidArgument,
            Self::Plugin { .. } | Self::Flood { .. } | Self::Result { .. } | Self::Attachment { .. } => {
                ErrorKind::Internal
            }
        }
    }
}

impl Cni {
    /// CNI as `config` describes it. Configuration files are read whenever they are needed.
    pub fn new(config: &CniConfig) -> Self {
        let runner = Runner { directories: config.plugin_directories.clone(), deadline: config.deadline };
        Self { config_directory: config.config_directory.clone(), runner }
    }

    /// The network to use; none if the configuration directory has no configuration.
    pub fn network(&self) -> Result<Option<NetworkList>, CniError> {
        list::load(&self.config_directory)
    }

    /// Whether `list` can be used now: its plugins are there and, from version 1.1.0 on, say so (STATUS).
    pub async fn status(&self, list: &NetworkList) -> Result<(), CniError> {
        for plugin in &list.plugins {
            self.runner.find(&plugin.kind)?;
        }
        if list.version < Version::V1_1_0 {
            return Ok(());
        }
        let runner = Runner { deadline: STATUS_DEADLINE, ..self.runner.clone() };
        for plugin in &list.plugins {
            let call = Call { command: Command::Status, attachment: None };
            runner.run(&plugin.kind, &call, &self.request(list, plugin, None, None)).await?;
        }
        Ok(())
    }

    /// ADD: calls the plugins one after the other, each with the result of the one before. The last one's result is entered.
    pub async fn add(&self, attachment: &mut Attachment) -> Result<(), CniError> {
        let mut previous: Option<Value> = None;
        for plugin in &attachment.list.plugins {
            let request = self.request(&attachment.list, plugin, Some(attachment), previous.as_ref());
            let call = Call { command: Command::Add, attachment: Some(attachment) };
            let output = self.runner.run(&plugin.kind, &call, &request).await?;
            let wrong = |problem: String| CniError::Result { plugin: plugin.kind.clone(), problem };
            let result: Value = serde_json::from_slice(&output).map_err(|error| wrong(format!("not JSON: {error}")))?;
            let version = result.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
            if version != attachment.list.version.as_str() {
                return Err(wrong(format!("it has version {version:?}, not {}", attachment.list.version.as_str())));
            }
            previous = Some(result);
        }
        attachment.result = previous;
        Ok(())
    }

    /// CHECK: whether the attachment is as it was made.
    pub async fn check(&self, attachment: &Attachment) -> Result<(), CniError> {
        // Section 4, "CHECK": not before 0.4.0, and not without a result.
        if attachment.list.version < Version::V0_4_0 || attachment.list.disable_check || attachment.result.is_none() {
            return Ok(());
        }
        for plugin in &attachment.list.plugins {
            let request = self.request(&attachment.list, plugin, Some(attachment), attachment.result.as_ref());
            let call = Call { command: Command::Check, attachment: Some(attachment) };
            self.runner.run(&plugin.kind, &call, &request).await?;
        }
        Ok(())
    }

    /// DEL: calls the plugins in reverse. May be repeated; succeeds where there is nothing to delete, and where the namespace
    /// is gone.
    pub async fn del(&self, attachment: &Attachment) -> Result<(), CniError> {
        // Before 0.4.0 a DEL has no prevResult (section 4, "DEL").
        let previous = attachment.result.as_ref().filter(|_| attachment.list.version >= Version::V0_4_0);
        for plugin in attachment.list.plugins.iter().rev() {
            let request = self.request(&attachment.list, plugin, Some(attachment), previous);
            let call = Call { command: Command::Del, attachment: Some(attachment) };
            self.runner.run(&plugin.kind, &call, &request).await?;
        }
        Ok(())
    }

    /// GC: lets the plugins drop what belongs to none of the attachments that are there.
    pub async fn gc(&self, list: &NetworkList, valid: &[ObjectId]) -> Result<(), CniError> {
        if list.version < Version::V1_1_0 || list.disable_gc {
            return Ok(());
        }
        let valid: Vec<Value> =
            valid.iter().map(|id| json!({ "containerID": id.as_str(), "ifname": INTERFACE })).collect();
        for plugin in &list.plugins {
            let mut request = self.request(list, plugin, None, None);
            request.insert("cni.dev/valid-attachments".to_owned(), Value::Array(valid.clone()));
            self.runner.run(&plugin.kind, &Call { command: Command::Gc, attachment: None }, &request).await?;
        }
        Ok(())
    }

    /// What a plugin reads: its configuration and what the runtime adds (section 3, "Deriving request configuration").
    fn request(
        &self,
        list: &NetworkList,
        plugin: &list::Plugin,
        attachment: Option<&Attachment>,
        previous: Option<&Value>,
    ) -> Map<String, Value> {
        let mut request = plugin.config.clone();
        request.insert("name".to_owned(), list.name.clone().into());
        request.insert("cniVersion".to_owned(), list.version.as_str().into());
        if let Some(attachment) = attachment {
            let wanted = |name: &String| plugin.capabilities().any(|capability| capability == name);
            let runtime: Map<_, _> =
                attachment.runtime_config.clone().into_iter().filter(|(name, _)| wanted(name)).collect();
            if !runtime.is_empty() {
                request.insert("runtimeConfig".to_owned(), Value::Object(runtime));
            }
        }
        if let Some(previous) = previous {
            request.insert("prevResult".to_owned(), previous.clone());
        }
        request
    }
}

#[cfg(test)]
mod tests;
