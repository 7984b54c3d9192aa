//! Pods' networks by CNI plugins.

use std::path::PathBuf;

use isopod_proto::ObjectId;
use parking_lot::Mutex;

use super::ports::{Claim, Claims, HostPort, conflict};
use super::{Attachment, KnownPod, NetworkError, inside, namespace, pod_name};
use crate::cni::{self, Attachments, Cni, NetworkList, Outcome, PodArguments};
use crate::config::CniConfig;
use crate::cri;
use crate::grpc::status::chain;

/// The networks that CNI plugins make.
pub struct Plugged {
    cni: Cni,
    attachments: Attachments,
    /// Where the pods' namespaces are.
    namespaces: PathBuf,
    /// The pods' host ports. The plugins make them, but do not tell whose a port is that is taken.
    claims: Mutex<Claims>,
}

impl Plugged {
    /// Networks as `config` says. Attachments are kept below `root`, namespaces below `state`.
    pub fn new(config: &CniConfig, root: &std::path::Path, state: &std::path::Path) -> Self {
        Self {
            cni: Cni::new(config),
            attachments: Attachments::new(root.join("cni")),
            namespaces: state.join("netns"),
            claims: Mutex::default(),
        }
    }

    /// The network to use for the next pod; none if CNI is not configured.
    pub fn network(&self) -> Result<Option<NetworkList>, NetworkError> {
        self.cni.network().map_err(NetworkError::Cni)
    }

    /// Whether `list` can be used now.
    pub async fn status(&self, list: &NetworkList) -> Result<(), NetworkError> {
        self.cni.status(list).await.map_err(NetworkError::Cni)
    }

    /// Whether the sandbox's network is of CNI.
    pub fn has(&self, sandbox: &ObjectId) -> bool {
        // One that cannot be read is there.
        self.attachments.get(sandbox).map_or(true, |found| found.is_some())
    }

    fn namespace(&self, sandbox: &ObjectId) -> PathBuf {
        self.namespaces.join(sandbox.as_str())
    }

    /// Makes the pod's namespace, has the plugins give it an interface, and joins a tap to that.
    pub async fn attach(
        &self,
        list: NetworkList,
        sandbox: &ObjectId,
        config: &cri::PodSandboxConfig,
        ports: Vec<HostPort>,
    ) -> Result<Attachment, NetworkError> {
        let PodArguments { arguments, runtime_config } =
            PodArguments::of(&list, sandbox, config, &ports).map_err(NetworkError::Cni)?;
        self.claim(sandbox, config, ports)?;
        let namespace = self.namespace(sandbox);
        let mut attachment = cni::Attachment {
            sandbox: sandbox.clone(),
            list,
            namespace: namespace.clone(),
            arguments,
            runtime_config,
            result: None,
        };
        // Before anything is done, so that all of it is undone whenever the daemon ends.
        self.attachments.put(&attachment).map_err(NetworkError::Cni)?;
        namespace::make(namespace.clone()).await?;
        self.cni.add(&mut attachment).await.map_err(NetworkError::Cni)?;
        self.attachments.put(&attachment).map_err(NetworkError::Cni)?;
        let outcome = attachment.result.as_ref().map_or(Err("there is none".to_owned()), Outcome::parse);
        let outcome = outcome.map_err(|problem| NetworkError::Unusable { problem })?;
        let (network, tap) = namespace::run_in(&namespace, move || inside::join(outcome)).await?;
        Ok(Attachment { network, tap })
    }

    fn claim(
        &self,
        sandbox: &ObjectId,
        config: &cri::PodSandboxConfig,
        ports: Vec<HostPort>,
    ) -> Result<(), NetworkError> {
        let mut claims = self.claims.lock();
        if let Some((owner, claim, port)) = conflict(&claims, sandbox, &ports) {
            return Err(NetworkError::PortTaken { port, pod: claim.pod.clone(), sandbox: owner.clone() });
        }
        claims.insert(sandbox.clone(), Claim { pod: pod_name(config), network: None, ports });
        Ok(())
    }

    /// Has the plugins undo what they did, and takes the namespace away. Nothing to undo is a success.
    pub async fn detach(&self, sandbox: &ObjectId) -> Result<(), NetworkError> {
        if let Some(attachment) = self.attachments.get(sandbox).map_err(NetworkError::Cni)? {
            self.cni.del(&attachment).await.map_err(NetworkError::Cni)?;
        }
        namespace::remove(&self.namespace(sandbox))?;
        self.attachments.remove(sandbox).map_err(NetworkError::Cni)?;
        self.claims.lock().remove(sandbox);
        Ok(())
    }

    /// Takes note of the host ports of an earlier daemon's pods.
    pub fn adopt(&self, known: &[KnownPod]) {
        *self.claims.lock() = known
            .iter()
            .filter(|pod| self.has(&pod.sandbox))
            .filter_map(|pod| Some((pod.sandbox.clone(), pod.claim()?)))
            .collect();
    }

    /// Detaches what none of `known` has, checks the others, and lets the plugins drop the rest.
    pub async fn restore(&self, known: &[KnownPod]) {
        self.adopt(known);
        let mut kept = Vec::new();
        for attachment in self.attachments.all() {
            let sandbox = &attachment.sandbox;
            let Some(pod) = known.iter().find(|pod| pod.sandbox == *sandbox) else {
                tracing::info!(%sandbox, "detaching a sandbox that is gone from its CNI network");
                if let Err(error) = self.detach(sandbox).await {
                    tracing::warn!(%sandbox, error = chain(&error), "it cannot be detached");
                }
                continue;
            };
            kept.push(sandbox.clone());
            if pod.network.is_some()
                && attachment.namespace.exists()
                && let Err(error) = self.cni.check(&attachment).await
            {
                tracing::warn!(%sandbox, error = chain(&error), "the sandbox's network is not as it was made");
            }
        }
        for entry in std::fs::read_dir(&self.namespaces).into_iter().flatten().flatten() {
            let path = entry.path();
            if !kept.iter().any(|sandbox| self.namespace(sandbox) == path)
                && let Err(error) = namespace::remove(&path)
            {
                tracing::warn!(error = chain(&error), "a left-over network namespace is not removed");
            }
        }
        if let Ok(Some(list)) = self.cni.network()
            && let Err(error) = self.cni.gc(&list, &kept).await
        {
            tracing::warn!(error = chain(&error), "the CNI plugins do not drop what is left over");
        }
    }
}
