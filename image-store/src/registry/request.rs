//! Requests of one pull: authentication, redirects, retries, bounds.

use std::time::Duration;

use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_RANGE, HeaderMap, LOCATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use super::challenge::{self, Challenge};
use super::client::{HttpClients, Target};
use crate::auth::Auth;
use crate::config::RegistryConfig;
use crate::layer::BlobSender;
use crate::reference::ImageName;

const MAX_REDIRECTS: usize = 5;
/// Most bytes of a token service's answer.
const MAX_TOKEN: u64 = 1 << 20;
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

/// The registry of one image, with one pull's credentials.
pub(crate) struct Registry {
    targets: Vec<Target>,
    /// An Authorization header for each target, once it was asked for. Held while a token is got, so that it is got once.
    authorizations: Vec<Mutex<Option<String>>>,
    repository: String,
    auth: Auth,
    config: RegistryConfig,
    progress_timeout: Duration,
}

impl Registry {
    pub(crate) fn new(
        clients: &HttpClients,
        name: &ImageName,
        auth: &Auth,
        progress_timeout: Duration,
    ) -> Result<Self, String> {
        let targets = clients.targets(name.registry())?;
        let first = match auth {
            Auth::RegistryToken(token) => Some(format!("Bearer {token}")),
            Auth::Anonymous | Auth::Basic { .. } | Auth::IdentityToken(_) => None,
        };
        Ok(Self {
            authorizations: targets.iter().map(|_| Mutex::new(first.clone())).collect(),
            targets,
            repository: name.repository().to_owned(),
            auth: auth.clone(),
            config: clients.config().clone(),
            progress_timeout,
        })
    }

    /// The bytes at `path` under the repository, such as `manifests/latest`; at most `limit`. `accept` may be empty.
    pub(crate) async fn get(&self, path: &str, accept: &str, limit: u64) -> Result<Vec<u8>, FetchError> {
        let mut worst = FetchError::NotFound;
        for target in 0..self.targets.len() {
            let mut retry = Retry::new(&self.config);
            let error = loop {
                match self.get_once(target, path, accept, limit).await {
                    Ok(bytes) => return Ok(bytes),
                    Err(Failure::Final(error)) => break error,
                    Err(Failure::Transient { problem, after }) => {
                        if !retry.again(after).await {
                            break FetchError::Unavailable(problem);
                        }
                    }
                }
            };
            match error {
                FetchError::NotFound => {}
                // Another mirror may do better; that it is not there is believed only if all say so.
                FetchError::Unavailable(_) | FetchError::Stalled => worst = error,
                error => return Err(error),
            }
        }
        Err(worst)
    }

    /// Sends the blob's bytes to `sink`; what was sent stays sent when a connection is lost. `Ok` also if the sink does not
    /// want more.
    pub(crate) async fn blob(&self, digest: &str, size: u64, sink: &BlobSender) -> Result<(), FetchError> {
        let mut offset = 0;
        let mut worst = FetchError::NotFound;
        for target in 0..self.targets.len() {
            let mut retry = Retry::new(&self.config);
            let error = loop {
                let before = offset;
                let result = self.blob_once(target, digest, size, &mut offset, sink).await;
                if offset - before >= PROGRESS {
                    retry = Retry::new(&self.config);
                }
                match result {
                    Ok(()) => return Ok(()),
                    Err(Failure::Final(error)) => break error,
                    Err(Failure::Transient { problem, after }) => {
                        tracing::debug!(digest, offset, problem, "a download was cut");
                        if !retry.again(after).await {
                            break FetchError::Unavailable(format!(
                                "{problem}, {offset} of {size} bytes having arrived"
                            ));
                        }
                    }
                }
            };
            match error {
                FetchError::NotFound => {}
                FetchError::Unavailable(_) | FetchError::Stalled => worst = error,
                error => return Err(error),
            }
        }
        Err(worst)
    }

    async fn get_once(&self, target: usize, path: &str, accept: &str, limit: u64) -> Result<Vec<u8>, Failure> {
        let mut headers = HeaderMap::new();
        if let Ok(value) = accept.parse()
            && !accept.is_empty()
        {
            headers.insert(ACCEPT, value);
        }
        let response = self.request(target, path, headers).await?;
        self.body(response, limit).await
    }

    async fn blob_once(
        &self,
        target: usize,
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
        let mut response = self.request(target, &format!("blobs/{digest}"), headers).await?;
        // A server that knows no ranges sends it all again.
        let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT { 0 } else { *offset };
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or("");
            if !range.starts_with(&format!("bytes {offset}-")) {
                let problem = format!("{} answered bytes from {offset} with {range:?}", self.targets[target].base);
                return Err(Failure::Final(FetchError::Unexpected(problem)));
            }
        }
        loop {
            let chunk = timeout(self.progress_timeout, response.chunk()).await;
            let chunk = chunk.map_err(|_| Failure::Final(FetchError::Stalled))?;
            let chunk = chunk.map_err(|error| self.lost(target, &error))?;
            let Some(mut chunk) = chunk else { break };
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
            false => Err(Failure::transient(format!("{} ended the answer early", self.targets[target].base))),
        }
    }

    /// A request that is allowed to see the repository. The answer is a success.
    async fn request(&self, target: usize, path: &str, headers: HeaderMap) -> Result<Response, Failure> {
        let base = &self.targets[target].base;
        let mut url = Url::parse(&format!("{base}/v2/{}/{path}", self.repository))
            .map_err(|_| Failure::Final(FetchError::Unexpected(format!("{base} makes no URL with {path:?}"))))?;
        if let Some(namespace) = &self.targets[target].namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        let authorization = self.authorizations[target].lock().await.clone();
        let response = self.follow(target, url.clone(), &headers, authorization.as_deref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return self.success(target, response);
        }
        let authorization = {
            let mut current = self.authorizations[target].lock().await;
            // Another request of this pull may have got a token meanwhile.
            if *current == authorization {
                *current = Some(self.authorize(target, &response).await?);
            }
            current.clone()
        };
        let response = self.follow(target, url, &headers, authorization.as_deref()).await?;
        self.success(target, response)
    }

    /// Sends a request and follows redirects, the authorization only to the same origin.
    async fn follow(
        &self,
        target: usize,
        mut url: Url,
        headers: &HeaderMap,
        authorization: Option<&str>,
    ) -> Result<Response, Failure> {
        let origin = url.origin();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.targets[target].http.get(url.clone()).headers(headers.clone());
            if let Some(authorization) = authorization.filter(|_| url.origin() == origin) {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = self.send(target, request).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok()).filter(|next| {
                // Never from an encrypted connection to a plain one.
                next.scheme() == "https" || (next.scheme() == "http" && url.scheme() == "http")
            });
            url = next.ok_or_else(|| self.unexpected(target, "redirects to where nobody should follow"))?;
        }
        Err(self.unexpected(target, "redirects without end"))
    }

    async fn send(&self, target: usize, request: RequestBuilder) -> Result<Response, Failure> {
        let response = timeout(self.progress_timeout, request.send()).await;
        response.map_err(|_| Failure::Final(FetchError::Stalled))?.map_err(|error| self.lost(target, &error))
    }

    /// Makes of a status that is no success the failure it is.
    fn success(&self, target: usize, response: Response) -> Result<Response, Failure> {
        let status = response.status();
        let base = &self.targets[target].base;
        if status == StatusCode::OK || status == StatusCode::PARTIAL_CONTENT {
            return Ok(response);
        }
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
            let after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let after = after.map(Duration::from_secs);
            return Err(Failure::Transient { problem: format!("{base} answers {status}"), after });
        }
        Err(Failure::Final(match status {
            StatusCode::NOT_FOUND => FetchError::NotFound,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                FetchError::Unauthorized(format!("{base} answers {status} {}", self.credentials()))
            }
            status => FetchError::Unexpected(format!("{base} answers {status}")),
        }))
    }

    /// The Authorization header that answers the challenge in `response`.
    async fn authorize(&self, target: usize, response: &Response) -> Result<String, Failure> {
        let base = &self.targets[target].base;
        let refuse = |what: &str| Failure::Final(FetchError::Unauthorized(format!("{base} {what}")));
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge = challenges.iter().filter_map(|value| challenge::parse(value.to_str().ok()?)).next();
        match (challenge, &self.auth) {
            (_, Auth::RegistryToken(_)) => Err(refuse("does not accept the registry token")),
            (Some(Challenge::Basic), Auth::Basic { username, password }) => Ok(basic(username, password)),
            (Some(Challenge::Basic), Auth::Anonymous) => {
                Err(refuse("asks for a user and a password, and none are given"))
            }
            (Some(Challenge::Basic), Auth::IdentityToken(_)) => Err(refuse("takes no identity tokens")),
            (Some(Challenge::Bearer { realm, service, scope }), _) => {
                self.token(target, &realm, service, scope).await.map(|token| format!("Bearer {token}"))
            }
            (None, _) => Err(refuse("answers 401 with no challenge that is understood")),
        }
    }

    /// Gets a token from the service a registry names.
    async fn token(
        &self,
        target: usize,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
    ) -> Result<String, Failure> {
        let plain_allowed = self.targets[target].base.starts_with("http:");
        let url = Url::parse(realm).ok();
        let url = url.filter(|url| url.scheme() == "https" || (url.scheme() == "http" && plain_allowed));
        let mut url = url.ok_or_else(|| self.unexpected(target, "names a token service that cannot be used"))?;
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        let service = service.unwrap_or_default();
        let http = &self.targets[target].http;
        let request = if let Auth::IdentityToken(token) = &self.auth {
            let form = [
                ("grant_type", "refresh_token"),
                ("refresh_token", token.as_str()),
                ("client_id", "isopod"),
                ("service", service.as_str()),
                ("scope", scope.as_str()),
            ];
            let mut body = Url::parse("http://form/").expect("a constant URL");
            body.query_pairs_mut().extend_pairs(form);
            let body = body.query().unwrap_or_default().to_owned();
            http.post(url).header("content-type", "application/x-www-form-urlencoded").body(body)
        } else {
            url.query_pairs_mut().append_pair("service", &service).append_pair("scope", &scope);
            match &self.auth {
                Auth::Basic { username, password } => http.get(url).header(AUTHORIZATION, basic(username, password)),
                _ => http.get(url),
            }
        };
        let response = self.send(target, request).await?;
        let status = response.status();
        if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS {
            let problem = format!("the token service {realm:?} answers {status} {}", self.credentials());
            return Err(Failure::Final(FetchError::Unauthorized(problem)));
        }
        let response = self.success(target, response)?;
        let body = self.body(response, MAX_TOKEN).await?;
        let answer: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let token = ["token", "access_token"].into_iter().find_map(|key| answer.get(key)?.as_str());
        let token = token.filter(|token| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
        token.map(str::to_owned).ok_or_else(|| self.unexpected(target, "names a token service that gives no token"))
    }

    /// An answer's body, of at most `limit` bytes.
    async fn body(&self, mut response: Response, limit: u64) -> Result<Vec<u8>, Failure> {
        let too_large = || Failure::Final(FetchError::TooLarge(limit));
        if response.content_length().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let mut body = Vec::new();
        loop {
            let chunk = timeout(self.progress_timeout, response.chunk()).await;
            let chunk = chunk.map_err(|_| Failure::Final(FetchError::Stalled))?;
            match chunk.map_err(|error| Failure::transient(chain(&error)))? {
                None => return Ok(body),
                Some(chunk) if (body.len() + chunk.len()) as u64 > limit => return Err(too_large()),
                Some(chunk) => body.extend_from_slice(&chunk),
            }
        }
    }

    fn lost(&self, target: usize, error: &reqwest::Error) -> Failure {
        Failure::transient(format!("{}: {}", self.targets[target].base, chain(error)))
    }

    fn unexpected(&self, target: usize, what: &str) -> Failure {
        Failure::Final(FetchError::Unexpected(format!("{} {what}", self.targets[target].base)))
    }

    fn credentials(&self) -> &'static str {
        match self.auth {
            Auth::Anonymous => "without credentials",
            _ => "to the credentials given",
        }
    }
}

enum Failure {
    /// Trying again may help, after a pause the registry may have asked for.
    Transient {
        problem: String,
        after: Option<Duration>,
    },
    Final(FetchError),
}

impl Failure {
    fn transient(problem: String) -> Self {
        Self::Transient { problem, after: None }
    }
}

/// Pauses that double, up to a number and a length.
struct Retry {
    left: u32,
    pause: Duration,
    max: Duration,
}

impl Retry {
    fn new(config: &RegistryConfig) -> Self {
        Self { left: config.retries, pause: config.backoff, max: config.max_backoff }
    }

    /// Waits before another attempt, for `after` if the registry asked for that; false if there is to be none.
    async fn again(&mut self, after: Option<Duration>) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        sleep(after.unwrap_or(self.pause).min(self.max)).await;
        self.pause = self.pause.saturating_mul(2);
        true
    }
}

fn basic(username: &str, password: &str) -> String {
    use base64::Engine;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}")))
}

/// An error and its causes on one line, without the URL, whose query may be a secret of a storage service.
pub(super) fn chain(error: &reqwest::Error) -> String {
    let mut text = match (error.is_connect(), error.is_timeout()) {
        (true, _) => "no connection".to_owned(),
        (_, true) => "timed out".to_owned(),
        _ => "the connection was lost".to_owned(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
