//! Through which hosts a registry is reached, and HTTP clients for them. They hold connections and certificates, and no
//! credentials.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::header::HeaderMap;
use reqwest::{Client, ClientBuilder, Url, redirect};

use super::error::RegistryError;
use super::hosts::{self, Host};
use super::server::chain;
use crate::config::{Endpoint, RegistryConfig};

/// Clients that are kept. Files change, so that there could be more and more.
const MAX_CLIENTS: usize = 64;

/// The clients that were needed so far.
pub(crate) struct HttpClients {
    clients: Mutex<HashMap<Settings, Client>>,
    config: RegistryConfig,
}

/// What makes a client different from others.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct Settings {
    /// Certificate authorities besides the system's, in PEM: each file and what is in it.
    ca: Vec<(PathBuf, Vec<u8>)>,
    /// The client's certificate and key, in PEM, and the file it is from.
    identity: Option<(PathBuf, Vec<u8>)>,
    skip_verify: bool,
    /// It must work on a machine that has no certificate authorities at all.
    plain: bool,
    /// The environment's proxy is not for a host on this machine.
    local: bool,
    proxy: Option<Url>,
    connect_timeout: Duration,
}

/// A host to send requests to.
#[derive(Clone)]
pub(super) struct Target {
    pub http: Client,
    /// For where its redirects lead: the same without its certificate.
    pub elsewhere: Client,
    /// Where its API is, without a slash at the end: `https://registry.example/v2`.
    pub api: String,
    /// Its name, with the port if one is given.
    pub authority: String,
    /// The registry a mirror is to answer for, if its host is another one.
    pub namespace: Option<String>,
    pub headers: HeaderMap,
    /// It may give what belongs to a digest.
    pub pull: bool,
    /// It may say what a tag stands for.
    pub resolve: bool,
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

    /// The hosts of `registry`, in the order to try them: what the configuration's mirrors say about it; or else what
    /// `certs.d` does; or else the registry itself. Reads files.
    pub(super) fn targets(&self, registry: &str) -> Result<Vec<Target>, RegistryError> {
        if let Some(endpoints) = self.config.mirrors.get(registry) {
            return endpoints.iter().map(|endpoint| self.target(registry, host_of(endpoint))).collect();
        }
        let directory = self.config.certs_directory.as_deref();
        let found = directory.map(|directory| hosts::load(directory, registry)).transpose()?.flatten();
        let Some((path, hosts)) = found else { return Ok(vec![self.target(registry, Host::itself())?]) };
        for (capability, some) in
            [("pull", hosts.iter().any(|host| host.pull)), ("resolve", hosts.iter().any(|host| host.resolve))]
        {
            if !some {
                return Err(RegistryError::Capability { registry: registry.to_owned(), path, capability });
            }
        }
        hosts.into_iter().map(|host| self.target(registry, host)).collect()
    }

    fn target(&self, registry: &str, host: Host) -> Result<Target, RegistryError> {
        let own = match registry {
            "docker.io" => "registry-1.docker.io",
            registry => registry,
        };
        let api = host.api.as_ref().map_or_else(|| format!("https://{own}/v2"), Url::to_string);
        // The name of Docker's registry is not where it answers.
        let api =
            api.replacen("https://docker.io/", "https://registry-1.docker.io/", 1).trim_end_matches('/').to_owned();
        let after_scheme = api.split_once("://").map_or("", |(_, rest)| rest);
        let authority = after_scheme.split('/').next().unwrap_or_default().to_owned();
        let namespace = (authority != own).then(|| registry.to_owned());
        let settings = self.settings(&api, &host)?;
        let http = self.client(&api, settings.clone())?;
        let elsewhere = match settings.identity {
            None => http.clone(),
            Some(_) => self.client(&api, Settings { identity: None, ..settings })?,
        };
        let Host { headers, pull, resolve, .. } = host;
        Ok(Target { http, elsewhere, api, authority, namespace, headers, pull, resolve })
    }

    fn settings(&self, api: &str, host: &Host) -> Result<Settings, RegistryError> {
        let ca = host.ca.iter().map(|path| Ok((path.clone(), hosts::read_pem(path)?)));
        let identity = host.client.as_ref().map(|(certificate, key)| {
            let mut pem = hosts::read_pem(certificate)?;
            if let Some(key) = key {
                pem.push(b'\n');
                pem.extend(hosts::read_pem(key)?);
            }
            Ok((certificate.clone(), pem))
        });
        Ok(Settings {
            ca: ca.collect::<Result<_, _>>()?,
            identity: identity.transpose()?,
            skip_verify: host.skip_verify,
            plain: api.starts_with("http:"),
            local: is_local(api),
            proxy: host.proxy.clone(),
            connect_timeout: host.connect_timeout.unwrap_or(self.config.connect_timeout),
        })
    }

    fn client(&self, endpoint: &str, settings: Settings) -> Result<Client, RegistryError> {
        if let Some(client) = self.clients.lock().get(&settings) {
            return Ok(client.clone());
        }
        let failed =
            |error: reqwest::Error| RegistryError::Client { endpoint: endpoint.to_owned(), problem: chain(&error) };
        let client = match builder(&settings)?.build() {
            // A machine without any certificate authorities can still use plain mirrors; a redirect to https then fails.
            Err(_) if settings.plain => builder(&settings)?.tls_certs_only([]).build().map_err(failed)?,
            built => built.map_err(failed)?,
        };
        let mut clients = self.clients.lock();
        if clients.len() >= MAX_CLIENTS {
            clients.clear();
        }
        clients.insert(settings, client.clone());
        Ok(client)
    }
}

fn builder(settings: &Settings) -> Result<ClientBuilder, RegistryError> {
    let mut builder = Client::builder()
        .connect_timeout(settings.connect_timeout)
        .redirect(redirect::Policy::none())
        .user_agent(concat!("isopod/", env!("CARGO_PKG_VERSION")));
    for (path, pem) in &settings.ca {
        let unusable = |problem: String| RegistryError::Certificate { path: path.clone(), problem };
        let certificates = reqwest::Certificate::from_pem_bundle(pem)
            .map_err(|error| unusable(format!("has no usable certificates: {error}")))?;
        if certificates.is_empty() {
            return Err(unusable("has no certificates in PEM".to_owned()));
        }
        builder = builder.tls_certs_merge(certificates);
    }
    if let Some((path, pem)) = &settings.identity {
        let identity = reqwest::Identity::from_pem(pem).map_err(|error| RegistryError::Certificate {
            path: path.clone(),
            problem: format!("and its key make no client certificate: {error}"),
        })?;
        builder = builder.identity(identity);
    }
    if settings.skip_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    if let Some(proxy) = &settings.proxy {
        let proxy = reqwest::Proxy::all(proxy.clone()).map_err(|error| RegistryError::Client {
            endpoint: "the configured proxy".to_owned(),
            problem: chain(&error),
        })?;
        builder = builder.proxy(proxy);
    } else if settings.local {
        builder = builder.no_proxy();
    }
    Ok(builder)
}

fn host_of(endpoint: &Endpoint) -> Host {
    let base = endpoint.url.trim_end_matches('/');
    let api = Url::parse(&format!("{base}/v2")).expect("endpoints were checked when the store was opened");
    Host { api: Some(api), ca: endpoint.ca_file.iter().cloned().collect(), ..Host::itself() }
}

/// Whether `api` is on this machine. As for Go's programs, the environment's proxy is not asked for what is.
fn is_local(api: &str) -> bool {
    let Ok(url) = Url::parse(api) else { return false };
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}
