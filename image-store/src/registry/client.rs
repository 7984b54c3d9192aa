//! HTTP clients, one for each endpoint. They hold connections and certificates, and no credentials.

use std::collections::HashMap;

use parking_lot::Mutex;
use reqwest::{Client, Url, redirect};

use crate::config::{Endpoint, RegistryConfig};

/// The clients that were needed so far.
pub(crate) struct HttpClients {
    clients: Mutex<HashMap<(String, Option<std::path::PathBuf>), Client>>,
    config: RegistryConfig,
}

/// An endpoint to send requests to.
#[derive(Clone)]
pub(super) struct Target {
    pub http: Client,
    /// Without a slash at its end.
    pub base: String,
    /// The registry a mirror is to answer for, if its host is another one.
    pub namespace: Option<String>,
}

impl HttpClients {
    /// Checks the configuration; the result names all that is wrong with it.
    pub(crate) fn new(config: &RegistryConfig) -> Result<Self, String> {
        let mut problems = Vec::new();
        for (host, endpoints) in &config.mirrors {
            if endpoints.is_empty() {
                problems.push(format!("registry {host:?} has an empty list of endpoints"));
            }
            for endpoint in endpoints {
                let url = Url::parse(&endpoint.url);
                let usable = url.is_ok_and(|url| {
                    matches!(url.scheme(), "http" | "https")
                        && url.has_host()
                        && url.username().is_empty()
                        && url.password().is_none()
                        && url.query().is_none()
                        && url.fragment().is_none()
                });
                if !usable {
                    let url = &endpoint.url;
                    problems.push(format!("registry {host:?} has endpoint {url:?}, which is no http(s)://HOST[/PATH]"));
                }
            }
        }
        if !problems.is_empty() {
            return Err(problems.join("; "));
        }
        // If one is installed already, it does as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(Self { clients: Mutex::default(), config: config.clone() })
    }

    pub(super) fn config(&self) -> &RegistryConfig {
        &self.config
    }

    /// The endpoints of the registry `host`, in order.
    pub(super) fn targets(&self, host: &str) -> Result<Vec<Target>, String> {
        let own = match host {
            "docker.io" => "registry-1.docker.io",
            host => host,
        };
        let default = [Endpoint::new(format!("https://{own}"))];
        let endpoints = self.config.mirrors.get(host).map_or(&default[..], Vec::as_slice);
        endpoints
            .iter()
            .map(|endpoint| {
                let http = self.client(endpoint)?;
                let base = endpoint.url.trim_end_matches('/').to_owned();
                let authority = base.split_once("://").map_or("", |(_, rest)| rest);
                let namespace = (authority != own).then(|| host.to_owned());
                Ok(Target { http, base, namespace })
            })
            .collect()
    }

    fn client(&self, endpoint: &Endpoint) -> Result<Client, String> {
        let plain = endpoint.url.starts_with("http:");
        // All plain endpoints can share one.
        let key = (if plain { String::new() } else { endpoint.url.clone() }, endpoint.ca_file.clone());
        let mut clients = self.clients.lock();
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let mut builder = Client::builder()
            .connect_timeout(self.config.connect_timeout)
            .redirect(redirect::Policy::none())
            .user_agent(concat!("isopod/", env!("CARGO_PKG_VERSION")));
        if let Some(path) = &endpoint.ca_file {
            let pem = std::fs::read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .map_err(|error| format!("{} has no usable certificates: {error}", path.display()))?;
            builder = builder.tls_certs_merge(certificates);
        }
        if plain {
            // A host without any certificates can still use plain mirrors; a redirect to https then fails.
            builder = builder.tls_certs_only([]);
        }
        let client = builder.build().map_err(|error| format!("no HTTP client: {}", super::request::chain(&error)))?;
        clients.insert(key, client.clone());
        Ok(client)
    }
}
