//! What was asked for in an RPC and waits for its client to connect: by a token that nobody can guess, once, for a minute.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use isopod_proto::{ErrorKind, ObjectId};
use parking_lot::Mutex;

/// How long a token is good for.
const LIFE: Duration = Duration::from_secs(60);
/// How many may wait at once.
const MOST: usize = 1000;

/// Which streams were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Standard input.
    pub stdin: bool,
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
    /// A terminal.
    pub tty: bool,
}

/// What a client will get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Session {
    /// A command in a container.
    Exec {
        /// Whose container it is.
        sandbox: ObjectId,
        /// Where.
        container: ObjectId,
        /// What.
        command: Vec<String>,
        /// Its streams.
        wanted: Wanted,
    },
    /// A container's own process.
    Attach {
        /// Whose container it is.
        sandbox: ObjectId,
        /// Which.
        container: ObjectId,
        /// Its streams.
        wanted: Wanted,
    },
    /// Connections to ports of a pod.
    PortForward {
        /// Which pod.
        sandbox: ObjectId,
        /// Ports named in the RPC: those of the old WebSocket protocol, where a client cannot name any.
        ports: Vec<u16>,
    },
}

impl Session {
    /// The first part of its URL's path.
    pub fn path(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// No session can be promised.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// As many as may be wait already.
    #[error("{MOST} sessions wait for their clients already; try again in a minute")]
    TooMany,
    /// No token can be made.
    #[error("the kernel gives no random bytes")]
    Random(#[source] rustix::io::Errno),
}

impl RequestError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooMany => ErrorKind::ResourceExhausted,
            Self::Random(_) => ErrorKind::Internal,
        }
    }
}

/// The sessions that wait.
#[derive(Debug, Default)]
pub struct Requests(Mutex<HashMap<String, (Instant, Session)>>);

impl Requests {
    /// Keeps `session`; its token.
    pub fn insert(&self, now: Instant, session: Session) -> Result<String, RequestError> {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            let flags = rustix::rand::GetRandomFlags::empty();
            filled += rustix::rand::getrandom(&mut bytes[filled..], flags).map_err(RequestError::Random)?;
        }
        let token = URL_SAFE_NO_PAD.encode(bytes);
        let mut waiting = self.0.lock();
        waiting.retain(|_, (since, _)| now.duration_since(*since) < LIFE);
        if waiting.len() >= MOST {
            return Err(RequestError::TooMany);
        }
        waiting.insert(token.clone(), (now, session));
        Ok(token)
    }

    /// Takes the session that waits under a path and a token. None: there is none, or no more.
    pub fn take(&self, now: Instant, path: &str, token: &str) -> Option<Session> {
        let (since, session) = self.0.lock().remove(token)?;
        (now.duration_since(since) < LIFE && session.path() == path).then_some(session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        Session::PortForward { sandbox: ObjectId::from_random([1; 32]), ports: Vec::new() }
    }

    #[test]
    fn a_token_is_good_once() {
        let (requests, now) = (Requests::default(), Instant::now());
        let token = requests.insert(now, session()).expect("room");
        assert!(token.len() >= 22);
        assert_eq!(requests.take(now, "portforward", "other"), None);
        assert_eq!(requests.take(now, "portforward", &token), Some(session()));
        assert_eq!(requests.take(now, "portforward", &token), None);
    }

    #[test]
    fn a_token_is_good_for_a_minute_and_its_own_path() {
        let (requests, now) = (Requests::default(), Instant::now());
        let tokens: Vec<_> = (0..3).map(|_| requests.insert(now, session()).expect("room")).collect();
        assert_eq!(requests.take(now + LIFE, "portforward", &tokens[0]), None);
        assert_eq!(requests.take(now, "exec", &tokens[1]), None);
        assert!(requests.take(now + LIFE - Duration::from_millis(1), "portforward", &tokens[2]).is_some());
    }

    #[test]
    fn a_thousand_wait_and_no_more_until_they_have_expired() {
        let (requests, now) = (Requests::default(), Instant::now());
        for _ in 0..MOST {
            requests.insert(now, session()).expect("room");
        }
        let error = requests.insert(now, session()).expect_err("full");
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        assert!(requests.insert(now + LIFE, session()).is_ok());
    }
}
