//! Requests of one pull: which host is asked, and how often.

use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{ACCEPT, CONTENT_RANGE, HeaderMap, RANGE};

use super::client::HttpClients;
use super::error::RegistryError;
use super::retry::{Failure, Retry};
use super::server::Server;
use crate::auth::{Auth, Credentials};
use crate::config::RegistryConfig;
use crate::layer::BlobSender;
use crate::reference::ImageName;

/// The count of retries starts anew after so many bytes of a blob.
const PROGRESS: u64 = 64 << 10;

/// Why something could not be fetched.
#[derive(Debug)]
pub(crate) enum FetchError {
    /// The registry does not have it.
    NotFound,
    /// The credentials, or having none, are not accepted.
    Unauthorized(String),
    /// It could not be reached, or failed, after all retries.
    Unavailable(String),
    /// It answered nothing for too long.
    Stalled,
    /// It answered more than the bound.
    TooLarge(u64),
    /// It answered what makes no sense.
    Unexpected(String),
}

/// What a host must be allowed to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Capability {
    /// Give what belongs to a digest.
    Pull,
    /// Say what a tag stands for.
    Resolve,
}

/// The registry of one image, with one pull's credentials.
pub(crate) struct Registry {
    servers: Vec<Server>,
    config: RegistryConfig,
}

impl Registry {
    pub(crate) async fn new(
        clients: &Arc<HttpClients>,
        name: &ImageName,
        credentials: &Credentials,
        progress_timeout: Duration,
    ) -> Result<Self, RegistryError> {
        let registry = name.registry();
        let (clients, host) = (clients.clone(), registry.to_owned());
        let config = clients.config().clone();
        // Files are read, and the system's certificates with the first client.
        let targets = tokio::task::spawn_blocking(move || clients.targets(&host)).await;
        let targets = targets.map_err(|_| RegistryError::Client {
            endpoint: registry.to_owned(),
            problem: "the thread that makes it died".to_owned(),
        })??;
        let meant =
            targets.iter().any(|target| credentials.are_for(&target.authority)) || credentials.are_for(registry);
        if let Some(server) = credentials.server.as_ref().filter(|_| !meant) {
            return Err(RegistryError::OtherServer {
                server: server.chars().take(200).collect(),
                registry: registry.to_owned(),
            });
        }
        let servers = targets.into_iter().map(|target| {
            let auth = match credentials.are_for(&target.authority) {
                true => credentials.auth.clone(),
                false => Auth::Anonymous,
            };
            Server::new(target, auth, name.repository(), progress_timeout)
        });
        Ok(Self { servers: servers.collect(), config })
    }

    /// The hosts with a capability, those that were found down last.
    fn able(&self, capability: Capability) -> Vec<&Server> {
        let able = self.servers.iter().filter(|server| match capability {
            Capability::Pull => server.target.pull,
            Capability::Resolve => server.target.resolve,
        });
        let (up, down): (Vec<_>, Vec<_>) = able.partition(|server| !server.is_down());
        up.into_iter().chain(down).collect()
    }

    /// The bytes at `path` under the repository, such as `manifests/latest`; at most `limit`. `accept` may be empty.
    pub(crate) async fn get(
        &self,
        capability: Capability,
        path: &str,
        accept: &str,
        limit: u64,
    ) -> Result<Vec<u8>, FetchError> {
        let mut errors = Errors::default();
        let servers = self.able(capability);
        for (index, server) in servers.iter().enumerate() {
            let mut retry = Retry::new(&self.config);
            let error = loop {
                match get_once(server, path, accept, limit).await {
                    Ok(bytes) => return Ok(bytes),
                    Err(Failure::Final(error)) => break error,
                    Err(Failure::Transient { problem, after, down }) => {
                        if self.give_up(server, down, index + 1 < servers.len()) || !retry.again(after).await {
                            break FetchError::Unavailable(problem);
                        }
                    }
                }
            };
            errors.add(error)?;
        }
        Err(errors.outcome())
    }

    /// Sends the blob's bytes to `sink`, from those on that it does not have; what was sent stays sent when a connection is lost. `Ok` also if the sink does not
    /// want more.
    pub(crate) async fn blob(&self, digest: &str, size: u64, sink: &BlobSender) -> Result<(), FetchError> {
        let mut offset = sink.offset();
        let mut errors = Errors::default();
        let servers = self.able(Capability::Pull);
        for (index, server) in servers.iter().enumerate() {
            let mut retry = Retry::new(&self.config);
            let error = loop {
                let before = offset;
                let result = blob_once(server, digest, size, &mut offset, sink).await;
                if offset - before >= PROGRESS {
                    retry = Retry::new(&self.config);
                }
                match result {
                    Ok(()) => return Ok(()),
                    Err(Failure::Final(error)) => break error,
                    Err(Failure::Transient { problem, after, down }) => {
                        tracing::debug!(digest, offset, problem, "a download was cut");
                        if self.give_up(server, down, index + 1 < servers.len()) || !retry.again(after).await {
                            break FetchError::Unavailable(format!(
                                "{problem}, {offset} of {size} bytes having arrived"
                            ));
                        }
                    }
                }
            };
            errors.add(error)?;
        }
        Err(errors.outcome())
    }

    /// Whether to go on to the next host at once: this one cannot be reached at all, and there are `others`.
    fn give_up(&self, server: &Server, down: bool, others: bool) -> bool {
        if down && others {
            tracing::debug!(host = server.target.api, "a host cannot be reached; the next one is asked");
            server.found_down();
        }
        down && others
    }
}

/// What the hosts that were asked so far answered.
#[derive(Default)]
struct Errors(Option<FetchError>);

impl Errors {
    /// Adds a host's answer; an error if the others are not to be asked. As for containerd, another host may do better, and
    /// the first one that says more than "not here" is believed.
    fn add(&mut self, error: FetchError) -> Result<(), FetchError> {
        match error {
            // What came may be in the sink already.
            FetchError::TooLarge(_) => return Err(error),
            FetchError::NotFound => {}
            error => drop(self.0.get_or_insert(error)),
        }
        Ok(())
    }

    fn outcome(self) -> FetchError {
        self.0.unwrap_or(FetchError::NotFound)
    }
}

async fn get_once(server: &Server, path: &str, accept: &str, limit: u64) -> Result<Vec<u8>, Failure> {
    let mut headers = HeaderMap::new();
    if let Ok(value) = accept.parse()
        && !accept.is_empty()
    {
        headers.insert(ACCEPT, value);
    }
    let response = server.request(path, headers).await?;
    server.body(response, limit).await
}

async fn blob_once(
    server: &Server,
    digest: &str,
    size: u64,
    offset: &mut u64,
    sink: &BlobSender,
) -> Result<(), Failure> {
    let mut headers = HeaderMap::new();
    if *offset > 0 {
        headers.insert(RANGE, format!("bytes={offset}-").parse().expect("digits make a header"));
    }
    if *offset == size {
        return Ok(());
    }
    let mut response = server.request(&format!("blobs/{digest}"), headers).await?;
    // A server that knows no ranges sends it all again.
    let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT { 0 } else { *offset };
    if response.status() == StatusCode::PARTIAL_CONTENT {
        let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or("");
        if !range.starts_with(&format!("bytes {offset}-")) {
            return Err(server.unexpected(&format!("answered bytes from {offset} with {range:?}")));
        }
    }
    while let Some(mut chunk) = server.chunk(&mut response).await? {
        let skipped = skip.min(chunk.len() as u64);
        skip -= skipped;
        // At most the chunk's length.
        let chunk = chunk.split_off(skipped as usize);
        if chunk.len() as u64 > size - *offset {
            return Err(Failure::Final(FetchError::TooLarge(size)));
        }
        *offset += chunk.len() as u64;
        if !chunk.is_empty() && !sink.send(chunk).await {
            return Ok(());
        }
    }
    match *offset == size {
        true => Ok(()),
        false => Err(Failure::transient(format!("{} ended the answer early", server.target.api))),
    }
}
