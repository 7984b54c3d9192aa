//! One host of a registry, for one pull: authentication, redirects, bounds.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::client::Target;
use super::request::FetchError;
use super::retry::Failure;
use crate::auth::Auth;

const MAX_REDIRECTS: usize = 5;

/// A host that requests go to, with what of the pull's credentials is meant for it.
pub(super) struct Server {
    pub target: Target,
    pub auth: Auth,
    /// The Authorization header, once it was asked for. Held while a token is got, so that it is got once.
    authorization: Mutex<Option<String>>,
    repository: String,
    progress_timeout: Duration,
    /// No connection came about; the pull goes to the other hosts first, if there are any.
    down: AtomicBool,
}

impl Server {
    pub(super) fn new(target: Target, auth: Auth, repository: &str, progress_timeout: Duration) -> Self {
        let first = match &auth {
            Auth::RegistryToken(token) => Some(format!("Bearer {token}")),
            Auth::Anonymous | Auth::Basic { .. } | Auth::IdentityToken(_) => None,
        };
        Self {
            target,
            auth,
            authorization: Mutex::new(first),
            repository: repository.to_owned(),
            progress_timeout,
            down: AtomicBool::new(false),
        }
    }

    pub(super) fn repository(&self) -> &str {
        &self.repository
    }

    pub(super) fn is_down(&self) -> bool {
        self.down.load(Ordering::Relaxed)
    }

    pub(super) fn found_down(&self) {
        self.down.store(true, Ordering::Relaxed);
    }

    /// A request that is allowed to see the repository. The answer is a success.
    pub(super) async fn request(&self, path: &str, headers: HeaderMap) -> Result<Response, Failure> {
        let api = &self.target.api;
        let mut url = Url::parse(&format!("{api}/{}/{path}", self.repository))
            .map_err(|_| Failure::Final(FetchError::Unexpected(format!("{api} makes no URL with {path:?}"))))?;
        if let Some(namespace) = &self.target.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        let authorization = self.authorization.lock().await.clone();
        let response = self.follow(url.clone(), &headers, authorization.as_deref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return self.success(response);
        }
        let authorization = {
            let mut current = self.authorization.lock().await;
            // Another request of this pull may have got a token meanwhile.
            if *current == authorization {
                *current = Some(self.authorize(&response).await?);
            }
            current.clone()
        };
        let response = self.follow(url, &headers, authorization.as_deref()).await?;
        self.success(response)
    }

    /// Sends a request and follows redirects. What is the host's own goes to the same origin alone: authorization, headers of
    /// the configuration, the client's certificate.
    async fn follow(
        &self,
        mut url: Url,
        headers: &HeaderMap,
        authorization: Option<&str>,
    ) -> Result<Response, Failure> {
        let mut own = self.target.headers.clone();
        if let Some(authorization) = authorization {
            let mut value = HeaderValue::from_str(authorization)
                .map_err(|_| self.unexpected("cannot be sent these credentials, which no header can hold"))?;
            value.set_sensitive(true);
            own.insert(AUTHORIZATION, value);
        }
        let origin = url.origin();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.client_for(&url).get(url.clone());
            if url.origin() == origin {
                request = request.headers(own.clone());
            }
            // These replace what has the same name.
            let response = self.send(request.headers(headers.clone())).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok()).filter(|next| {
                // Never from an encrypted connection to a plain one.
                next.scheme() == "https" || (next.scheme() == "http" && url.scheme() == "http")
            });
            url = next.ok_or_else(|| self.unexpected("redirects to where nobody should follow"))?;
        }
        Err(self.unexpected("redirects without end"))
    }

    /// The client for `url`: that of this host, or one that shows no certificate to others.
    pub(super) fn client_for(&self, url: &Url) -> &Client {
        let own = Url::parse(&self.target.api).is_ok_and(|api| api.origin() == url.origin());
        if own { &self.target.http } else { &self.target.elsewhere }
    }

    pub(super) async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let response = timeout(self.progress_timeout, request.send()).await;
        response.map_err(|_| Failure::Final(FetchError::Stalled))?.map_err(|error| self.lost(&error))
    }

    /// Makes of a status that is no success the failure it is.
    pub(super) fn success(&self, response: Response) -> Result<Response, Failure> {
        let status = response.status();
        let api = &self.target.api;
        if status == StatusCode::OK || status == StatusCode::PARTIAL_CONTENT {
            return Ok(response);
        }
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
            let after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let after = after.map(Duration::from_secs);
            return Err(Failure::Transient { problem: format!("{api} answers {status}"), after, down: false });
        }
        Err(Failure::Final(match status {
            StatusCode::NOT_FOUND => FetchError::NotFound,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                FetchError::Unauthorized(format!("{api} answers {status} {}", self.credentials()))
            }
            status => FetchError::Unexpected(format!("{api} answers {status}")),
        }))
    }

    /// An answer's next bytes; `None` at its end.
    pub(super) async fn chunk(&self, response: &mut Response) -> Result<Option<bytes::Bytes>, Failure> {
        let chunk = timeout(self.progress_timeout, response.chunk()).await;
        chunk.map_err(|_| Failure::Final(FetchError::Stalled))?.map_err(|error| self.lost(&error))
    }

    /// An answer's body, of at most `limit` bytes.
    pub(super) async fn body(&self, mut response: Response, limit: u64) -> Result<Vec<u8>, Failure> {
        let too_large = || Failure::Final(FetchError::TooLarge(limit));
        if response.content_length().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk(&mut response).await? {
            if (body.len() + chunk.len()) as u64 > limit {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    fn lost(&self, error: &reqwest::Error) -> Failure {
        let problem = format!("{}: {}", self.target.api, chain(error));
        Failure::Transient { problem, after: None, down: error.is_connect() }
    }

    pub(super) fn unexpected(&self, what: &str) -> Failure {
        Failure::Final(FetchError::Unexpected(format!("{} {what}", self.target.api)))
    }

    pub(super) fn credentials(&self) -> &'static str {
        match self.auth {
            Auth::Anonymous => "without credentials",
            _ => "to the credentials given",
        }
    }
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
