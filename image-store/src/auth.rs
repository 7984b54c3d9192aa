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
    /// The credentials are for another registry.
    #[error("the credentials are for {server:?}, but the image is at {registry:?}")]
    OtherServer {
        /// Whom the credentials are for.
        server: String,
        /// Where the image is.
        registry: String,
    },
}

impl AuthError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Malformed | Self::OtherServer { .. } => ErrorKind::InvalidArgument,
        }
    }
}

impl Auth {
    /// The credentials in CRI's `AuthConfig` for an image at `registry`, the host part of its name (see
    /// [`crate::ImageName::registry`]). All fields empty is [`Auth::Anonymous`].
    pub fn from_fields(fields: AuthFields<'_>, registry: &str) -> Result<Self, AuthError> {
        if !fields.server_address.is_empty() && server_host(fields.server_address) != server_host(registry) {
            return Err(AuthError::OtherServer {
                server: fields.server_address.chars().take(200).collect(),
                registry: registry.to_owned(),
            });
        }
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
        let auth = Auth::from_fields(fields, "docker.io").unwrap();
        assert_eq!(auth, Auth::Basic { username: "user".into(), password: "pa:ss".into() });
    }

    #[test]
    fn a_malformed_auth_field_is_refused_without_showing_it() {
        for bad in ["%%%", "dXNlcg==", "/w=="] {
            let error = Auth::from_fields(AuthFields { auth: bad, ..AuthFields::default() }, "docker.io").unwrap_err();
            assert!(!error.to_string().contains(bad));
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }

    #[test]
    fn credentials_of_another_server_are_refused() {
        let fields = |server_address| AuthFields { username: "u", server_address, ..AuthFields::default() };
        assert!(Auth::from_fields(fields("https://index.docker.io/v1/"), "docker.io").is_ok());
        assert!(Auth::from_fields(fields("quay.io"), "quay.io").is_ok());
        assert!(matches!(Auth::from_fields(fields("quay.io"), "gcr.io"), Err(AuthError::OtherServer { .. })));
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
