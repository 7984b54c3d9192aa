//! Authorization, as a registry's challenge asks for it (distribution-spec's token authentication, RFC 7617).

use reqwest::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};

use super::challenge::{self, Challenge};
use super::request::FetchError;
use super::retry::Failure;
use super::server::Server;
use crate::auth::Auth;

/// Most bytes of a token service's answer.
const MAX_TOKEN: u64 = 1 << 20;

impl Server {
    /// The Authorization header that answers the challenge in `response`.
    pub(super) async fn authorize(&self, response: &Response) -> Result<String, Failure> {
        let api = &self.target.api;
        let refuse = |what: &str| Failure::Final(FetchError::Unauthorized(format!("{api} {what}")));
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
                self.token(&realm, service, scope).await.map(|token| format!("Bearer {token}"))
            }
            (None, _) => Err(refuse("answers 401 with no challenge that is understood")),
        }
    }

    /// Gets a token from the service a registry names.
    async fn token(&self, realm: &str, service: Option<String>, scope: Option<String>) -> Result<String, Failure> {
        let plain_allowed = self.target.api.starts_with("http:");
        let url = Url::parse(realm).ok();
        let url = url.filter(|url| url.scheme() == "https" || (url.scheme() == "http" && plain_allowed));
        let mut url = url.ok_or_else(|| self.unexpected("names a token service that cannot be used"))?;
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository()));
        let service = service.unwrap_or_default();
        let http = self.client_for(&url).clone();
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
        let response = self.send(request).await?;
        let status = response.status();
        if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS {
            let problem = format!("the token service {realm:?} answers {status} {}", self.credentials());
            return Err(Failure::Final(FetchError::Unauthorized(problem)));
        }
        let response = self.success(response)?;
        let body = self.body(response, MAX_TOKEN).await?;
        let answer: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let token = ["token", "access_token"].into_iter().find_map(|key| answer.get(key)?.as_str());
        let token = token.filter(|token| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
        token.map(str::to_owned).ok_or_else(|| self.unexpected("names a token service that gives no token"))
    }
}

fn basic(username: &str, password: &str) -> String {
    use base64::Engine;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}")))
}
