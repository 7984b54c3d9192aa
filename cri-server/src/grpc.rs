//! The CRI services: thin handlers between the wire and the rest of the daemon.

mod convert;
pub(crate) mod counters;
mod image;
mod import;
mod info;
pub(crate) mod metrics;
mod runtime;
pub mod status;

use std::pin::Pin;
use std::time::Instant;

use futures_util::Stream;
use tonic::Status;
use tracing::Instrument;

pub use image::Images;
pub use import::Imports;
pub use runtime::Sandboxes;
pub use status::Failure;

/// The answer of a streaming list.
pub type Batches<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Items in a message of a streaming list.
const BATCH: usize = 256;

/// `items` as a stream of messages, none of them empty.
fn batches<I: Send + 'static, T: Send + 'static>(items: Vec<I>, message: fn(Vec<I>) -> T) -> Batches<T> {
    let mut messages = Vec::new();
    let mut items = items.into_iter().peekable();
    while items.peek().is_some() {
        messages.push(Ok(message(items.by_ref().take(BATCH).collect())));
    }
    Box::pin(futures_util::stream::iter(messages))
}

/// Runs the work of a call that changes something, in a span of its own, and writes one line about its outcome.
async fn observe<T>(
    rpc: &'static str,
    subject: &str,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let span = tracing::info_span!("rpc", rpc, subject = beginning(subject));
    let started = Instant::now();
    let result = work.instrument(span.clone()).await;
    let millis = started.elapsed().as_millis() as u64;
    span.in_scope(|| match &result {
        Ok(_) => tracing::info!(millis, "done"),
        Err(status) => tracing::info!(millis, code = ?status.code(), error = status.message(), "failed"),
    });
    result
}

/// Most characters of what a client says a call is about that get into the log; an id has 64.
const MAX_SUBJECT: usize = 200;

fn beginning(text: &str) -> &str {
    text.char_indices().nth(MAX_SUBJECT).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_long_list_is_streamed_in_batches_and_an_empty_one_not_at_all() {
        let lengths: Vec<usize> =
            batches((0..600).collect(), |items: Vec<u32>| items.len()).map(|item| item.expect("made")).collect().await;
        assert_eq!(lengths, [256, 256, 88]);
        assert_eq!(batches(Vec::<u32>::new(), |items| items.len()).count().await, 0);
    }

    #[test]
    fn a_long_id_is_cut_short_between_characters() {
        assert_eq!(beginning("id"), "id");
        assert_eq!(beginning(&"é".repeat(MAX_SUBJECT)), "é".repeat(MAX_SUBJECT));
        assert_eq!(beginning(&"é".repeat(MAX_SUBJECT + 1)), "é".repeat(MAX_SUBJECT));
    }
}
