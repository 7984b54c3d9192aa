//! Credentials of one pull.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use isopod_proto::ErrorKind;

/// Credentials for a registry. `Debug` shows no secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Auth {
    /// None.
    #[default]
    Anonymous,
    /// A user and a password.
    Basic {
        /// The user.
        username: String,
        /// The password, or an access token used as one.
        password: String,
    },
    /// A bearer token that is sent to the registry as it is.
    RegistryToken(String),
    /// An OAuth2 refresh token, to be exchanged for a bearer token.
    IdentityToken(String),
}

/// Credentials, and whom they are for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// What is sent to those that ask for it.
    pub auth: Auth,
    /// The one server that they are sent to, as a host or an URL. `None`: each host that is configured for the image's
    /// registry, as containerd does.
    pub server: Option<String>,
}

/// The fields of CRI's `AuthConfig`; empty means absent.
#[derive(Clone, Copy, Default)]
pub struct AuthFields<'a> {
    /// The user.
    pub username: &'a str,
    /// The password.
    pub password: &'a str,
    /// base64 of `user:password`; used if `username` is empty.
    pub auth: &'a str,
    /// The registry the credentials are for.
    pub server_address: &'a str,
    /// An OAuth2 refresh token.
    pub identity_token: &'a str,
    /// A bearer token.
    pub registry_token: &'a str,
}

/// Credentials that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The `auth` field is malformed. (The value is a secret and not shown.)
    #[error("the credentials' auth field is not base64 of user:password")]
    Malformed,
}

impl AuthError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Malformed => ErrorKind::InvalidArgument,
        }
    }
}

impl From<&Auth> for Credentials {
    fn from(auth: &Auth) -> Self {
        Self { auth: auth.clone(), server: None }
    }
}

impl Credentials {
    /// The credentials in CRI's `AuthConfig`. All fields empty is [`Auth::Anonymous`].
    pub fn from_fields(fields: AuthFields<'_>) -> Result<Self, AuthError> {
        let server = Some(fields.server_address.to_owned()).filter(|server| !server.is_empty());
        Ok(Self { auth: Auth::from_fields(fields)?, server })
    }

    /// Whether they are for `host`, which may have a port.
    pub(crate) fn are_for(&self, host: &str) -> bool {
        self.server.as_ref().is_none_or(|server| server_host(server) == server_host(host))
    }
}

impl Auth {
    fn from_fields(fields: AuthFields<'_>) -> Result<Self, AuthError> {
        if !fields.registry_token.is_empty() {
            return Ok(Self::RegistryToken(fields.registry_token.to_owned()));
        }
        if !fields.identity_token.is_empty() {
            return Ok(Self::IdentityToken(fields.identity_token.to_owned()));
        }
        if !fields.username.is_empty() {
            return Ok(Self::Basic { username: fields.username.to_owned(), password: fields.password.to_owned() });
        }
        if fields.auth.is_empty() {
            return Ok(Self::Anonymous);
        }
        let decoded = STANDARD.decode(fields.auth.trim()).map_err(|_| AuthError::Malformed)?;
        let decoded = String::from_utf8(decoded).map_err(|_| AuthError::Malformed)?;
        let (username, password) = decoded.split_once(':').ok_or(AuthError::Malformed)?;
        // Docker pads what it stores with NUL bytes.
        Ok(Self::Basic { username: username.to_owned(), password: password.trim_end_matches('\0').to_owned() })
    }
}

/// The host of a server address, which may be an URL; the names Docker's own registry goes by are one.
fn server_host(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or_default().to_ascii_lowercase();
    match host.as_str() {
        "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => "docker.io".to_owned(),
        _ => host,
    }
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic(redacted)",
            Self::RegistryToken(_) => "RegistryToken(redacted)",
            Self::IdentityToken(_) => "IdentityToken(redacted)",
        })
    }
}

impl fmt::Debug for AuthFields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthFields").field("server_address", &self.server_address).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_auth_field_is_user_and_password() {
        let fields = AuthFields { auth: "dXNlcjpwYTpzcw==", ..AuthFields::default() };
        let credentials = Credentials::from_fields(fields).unwrap();
        assert_eq!(credentials.auth, Auth::Basic { username: "user".into(), password: "pa:ss".into() });
        assert_eq!(credentials.server, None);
    }

    #[test]
    fn a_malformed_auth_field_is_refused_without_showing_it() {
        for bad in ["%%%", "dXNlcg==", "/w=="] {
            let error = Credentials::from_fields(AuthFields { auth: bad, ..AuthFields::default() }).unwrap_err();
            assert!(!error.to_string().contains(bad));
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }

    #[test]
    fn credentials_are_for_the_server_they_name_alone() {
        let for_server = |server_address| {
            Credentials::from_fields(AuthFields { username: "u", server_address, ..AuthFields::default() }).unwrap()
        };
        assert!(for_server("https://index.docker.io/v1/").are_for("registry-1.docker.io"));
        assert!(for_server("quay.io").are_for("quay.io") && !for_server("quay.io").are_for("gcr.io"));
        assert!(!for_server("quay.io").are_for("quay.io:5000"));
        assert!(for_server("").are_for("quay.io"));
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!(
            "{:?}{:?}{:?}",
            Auth::Basic { username: "u".into(), password: "hunter2".into() },
            Auth::RegistryToken("hunter2".into()),
            AuthFields { password: "hunter2", identity_token: "hunter2", ..AuthFields::default() }
        );
        assert!(!shown.contains("hunter2"));
    }
}
