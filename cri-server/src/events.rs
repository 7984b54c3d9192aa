//! What happens to sandboxes and containers, told to whoever listens.
//!
//! The index tells of every change of state at the moment it shows it ([`crate::index`]). Each subscriber gets every event
//! since its subscription, in one order for all. One that falls behind by more than [`BACKLOG`] events is cut off with an error,
//! so that it cannot hold on to ever more memory: it knows then that it has to list again. Without subscribers nothing is kept.

use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use isopod_proto::ErrorKind;
use parking_lot::Mutex;
use tokio::sync::broadcast::{Receiver, Sender, channel};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;

use crate::container::ContainerRecord;
use crate::sandbox::SandboxRecord;

/// Events that may wait for a subscriber. An event holds references to records only.
pub const BACKLOG: usize = 2048;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was made.
    Created,
    /// It runs.
    Started,
    /// It runs no longer, or never did.
    Stopped,
    /// It was removed.
    Deleted,
}

/// A change of a sandbox or of one of its containers.
#[derive(Clone, Debug)]
pub struct Event {
    /// What happened.
    pub change: Change,
    /// The id of the container, or of the sandbox itself.
    pub subject: String,
    /// When: nanoseconds since the epoch.
    pub at: i64,
    /// The sandbox as it is now, or was last.
    pub sandbox: Arc<SandboxRecord>,
    /// Its containers as they are now.
    pub containers: Vec<Arc<ContainerRecord>>,
}

/// A subscriber was too slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{lost} events were lost, as they were not read in time")]
pub struct Lagged {
    /// How many it will never see.
    pub lost: u64,
}

impl Lagged {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::ResourceExhausted
    }
}

/// The events of the daemon.
pub struct Events {
    /// None once the daemon ends.
    sender: Mutex<Option<Sender<Event>>>,
}

impl Default for Events {
    fn default() -> Self {
        Self::with_backlog(BACKLOG)
    }
}

impl Events {
    fn with_backlog(backlog: usize) -> Self {
        Self { sender: Mutex::new(Some(channel(backlog).0)) }
    }

    /// Tells every subscriber; `event` is made only if there is one.
    pub fn publish(&self, event: impl FnOnce() -> Event) {
        let sender = self.sender.lock();
        if let Some(sender) = sender.as_ref().filter(|sender| sender.receiver_count() > 0) {
            let _ = sender.send(event()); // The last subscriber may just have gone.
        }
    }

    /// Every event from now on. Ends with an error when the subscriber is too slow, and without one when the daemon ends.
    pub fn subscribe(&self) -> impl Stream<Item = Result<Event, Lagged>> + Send + use<> {
        let receiver: Option<Receiver<Event>> = self.sender.lock().as_ref().map(Sender::subscribe);
        let events = futures_util::stream::iter(receiver).flat_map(BroadcastStream::new);
        // The item after an error would look as if nothing were missing before it.
        events.scan(false, |failed, item| {
            let item = (!*failed).then(|| item.map_err(|BroadcastStreamRecvError::Lagged(lost)| Lagged { lost }));
            *failed |= matches!(item, Some(Err(_)));
            std::future::ready(item)
        })
    }

    /// Ends every subscription, so that the daemon can.
    pub fn close(&self) {
        self.sender.lock().take();
    }
}

#[cfg(test)]
mod tests {
    use isopod_proto::ObjectId;

    use super::*;

    fn event(subject: u64) -> Event {
        Event {
            change: Change::Created,
            subject: subject.to_string(),
            at: 1,
            sandbox: Arc::new(SandboxRecord::for_tests(ObjectId::from_random([1; 32]))),
            containers: Vec::new(),
        }
    }

    #[tokio::test]
    async fn every_subscriber_gets_every_event_in_order_and_the_end() {
        let events = Events::default();
        events.publish(|| unreachable!("nobody listens"));
        let (first, second) = (events.subscribe(), events.subscribe());
        for subject in 0..1000 {
            events.publish(|| event(subject));
        }
        events.close();
        events.publish(|| unreachable!("nobody listens any more"));
        for stream in [first.left_stream(), second.right_stream()] {
            let subjects: Vec<String> = stream.map(|event| event.expect("in time").subject).collect().await;
            assert_eq!(subjects, (0..1000).map(|subject: u64| subject.to_string()).collect::<Vec<_>>());
        }
        assert_eq!(events.subscribe().count().await, 0);
    }

    #[tokio::test]
    async fn a_slow_subscriber_is_told_what_it_lost_and_cut_off_alone() {
        let events = Events::with_backlog(4);
        let mut quick = std::pin::pin!(events.subscribe());
        let slow = events.subscribe();
        for subject in 0..10 {
            events.publish(|| event(subject));
            assert_eq!(quick.next().await.expect("open").expect("in time").subject, subject.to_string());
        }
        let seen: Vec<_> = slow.map(|event| event.map(|event| event.subject)).collect().await;
        assert_eq!(seen, [Err(Lagged { lost: 6 })]);
    }
}
