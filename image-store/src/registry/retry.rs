//! What went wrong with one request, and whether to try again.

use std::time::Duration;

use tokio::time::sleep;

use super::request::FetchError;
use crate::config::RegistryConfig;

pub(super) enum Failure {
    /// Trying again may help, after a pause the registry may have asked for.
    Transient {
        problem: String,
        after: Option<Duration>,
        /// No connection came about.
        down: bool,
    },
    Final(FetchError),
}

impl Failure {
    pub(super) fn transient(problem: String) -> Self {
        Self::Transient { problem, after: None, down: false }
    }
}

/// Pauses that double, up to a number and a length.
pub(super) struct Retry {
    left: u32,
    pause: Duration,
    max: Duration,
}

impl Retry {
    pub(super) fn new(config: &RegistryConfig) -> Self {
        Self { left: config.retries, pause: config.backoff, max: config.max_backoff }
    }

    /// Waits before another attempt, for `after` if the registry asked for that; false if there is to be none.
    pub(super) async fn again(&mut self, after: Option<Duration>) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        sleep(after.unwrap_or(self.pause).min(self.max)).await;
        self.pause = self.pause.saturating_mul(2);
        true
    }
}
