//! One SPDY connection: streams that the client opens, each with a half in either direction.
//!
//! Reader, writer and session are one task, so that none of them outlives the others: the session ends, the writer sends what
//! is left and closes, and the reader waits a moment for the client to do the same.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::frame::{self, Decoder, Frame, FrameError};
use super::headers::{Compressor, Decompressor, HeaderError, Headers};
use crate::streaming::stream::{CHUNK, Incoming, Life, Message, OUTGOING_PIECES, Outgoing, Piece};

/// Streams that a connection may have at once. A forwarded connection needs two.
const MAX_STREAMS: usize = 1000;
/// Streams that the session has not taken yet.
const NEW_STREAMS: usize = 64;
/// Answers to control frames that wait to be sent. A client that asks for more and reads nothing gets none.
const MAX_ANSWERS: usize = 256;
/// How long a client may take to close the connection when all is said, before we do.
const CLIENT_CLOSES: Duration = Duration::from_secs(5);
/// How long it may take after that.
const LINGER: Duration = Duration::from_secs(10);

/// A stream that the client has opened.
#[derive(Debug)]
pub struct Stream {
    /// Its number: odd, and greater than those before.
    pub id: u32,
    /// What the client says of it.
    pub headers: Headers,
    /// What it sends.
    pub incoming: Incoming,
    /// What it gets.
    pub outgoing: Outgoing,
    /// Its place among [`MAX_STREAMS`]; free when the session drops it.
    pub place: OwnedSemaphorePermit,
}

impl Stream {
    /// The value of a header; empty if it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(this, _)| this == name).map(|(_, value)| value.as_str()).unwrap_or_default()
    }
}

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("reading")]
    Io(#[from] io::Error),
    #[error("malformed frame")]
    Frame(#[from] FrameError),
    #[error("malformed headers")]
    Headers(#[from] HeaderError),
    #[error("stream {0} is not a new one")]
    StreamId(u32),
}

enum Answer {
    Reply(u32),
    Reset(u32, u32),
    Pong(u32),
}

/// Serves a connection: `session` gets the streams that the client opens, and has ended when this returns. A client that is
/// silent for `idle_limit` is taken for gone.
pub async fn serve<S, F>(io: S, life: Life, idle_limit: Duration, session: impl FnOnce(mpsc::Receiver<Stream>) -> F)
where
    S: AsyncRead + AsyncWrite,
    F: Future<Output = ()>,
{
    let (reader, writer) = tokio::io::split(io);
    let (new_streams, streams) = mpsc::channel(NEW_STREAMS);
    let (messages, queue) = mpsc::channel(OUTGOING_PIECES);
    let (answers, answer_queue) = mpsc::channel(MAX_ANSWERS);
    let over = CancellationToken::new();
    let mut reader = Reader {
        io: reader,
        life: life.clone(),
        decompressor: Decompressor::default(),
        halves: HashMap::new(),
        last: 0,
        places: Arc::new(Semaphore::new(MAX_STREAMS)),
        new_streams,
        messages: messages.downgrade(),
        answers,
    };
    let mut writer = Writer { io: writer, life: life.clone(), compressor: Compressor::default(), out: BytesMut::new() };
    let session = async {
        session(streams).await;
        // The last of them: the writer ends when the queue is empty.
        drop(messages);
    };
    let read = async {
        tokio::select! {
            result = reader.run() => if let Err(error) = result {
                tracing::debug!(error = crate::grpc::status::chain(&error), "a SPDY connection is given up");
            },
            () = life.lost.cancelled() => {}
            () = async {
                over.cancelled().await;
                sleep(LINGER).await;
            } => {}
        }
        life.lost.cancel();
        // With it go the clients' halves: who reads one sees that the client has gone.
        drop(reader);
    };
    let write = async {
        let sent = tokio::select! {
            result = writer.run(queue, answer_queue) => result.is_ok(),
            () = life.lost.cancelled() => false,
        };
        if sent {
            // A client that has got all it waits for closes. One that we close on may still have to read.
            let _ = timeout(CLIENT_CLOSES, life.lost.cancelled()).await;
            let _ = timeout(CLIENT_CLOSES, writer.close()).await; // It may have gone.
        } else {
            life.lost.cancel();
        }
        over.cancel();
    };
    let watch = async {
        tokio::select! {
            () = life.idle(idle_limit) => {
                tracing::info!("a streaming connection was idle for too long");
                life.lost.cancel();
            }
            () = life.lost.cancelled() => {}
        }
    };
    tokio::join!(session, read, write, watch);
}

struct Reader<S> {
    io: ReadHalf<S>,
    life: Life,
    decompressor: Decompressor,
    /// The clients' halves that are open.
    halves: HashMap<u32, mpsc::Sender<Piece>>,
    /// The last stream's number.
    last: u32,
    places: Arc<Semaphore>,
    new_streams: mpsc::Sender<Stream>,
    messages: mpsc::WeakSender<Message>,
    answers: mpsc::Sender<Answer>,
}

impl<S: AsyncRead> Reader<S> {
    /// Reads to the end of the connection.
    async fn run(&mut self) -> Result<(), ConnectionError> {
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = self.io.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            self.life.is_active();
            decoder.push(&buffer[..count]);
            while let Some(frame) = decoder.next()? {
                if !self.take(frame).await? {
                    return Ok(());
                }
            }
        }
    }

    /// False: the client has gone.
    async fn take(&mut self, frame: Frame) -> Result<bool, ConnectionError> {
        match frame {
            Frame::SynStream { id, fin, block } => {
                let headers = self.decompressor.read(&block)?;
                self.open(id, fin, headers)?;
            }
            // They count for the compression.
            Frame::OtherHeaders { block } => drop(self.decompressor.read(&block)?),
            Frame::Data { id, bytes, fin } => {
                // On a stream that is closed or refused there may still be data on its way.
                let Some(half) = self.halves.get(&id) else { return Ok(true) };
                if !bytes.is_empty() && !self.life.deliver(half, Piece::Bytes(bytes)).await {
                    return Ok(false);
                }
                if fin {
                    let delivered = self.life.deliver(half, Piece::End).await;
                    self.halves.remove(&id);
                    return Ok(delivered);
                }
            }
            // Without the end before it, this is a loss.
            Frame::Reset { id } => drop(self.halves.remove(&id)),
            Frame::Ping { id } => self.answer(Answer::Pong(id)),
            Frame::GoAway | Frame::Ignored => {}
        }
        Ok(true)
    }

    fn open(&mut self, id: u32, fin: bool, headers: Headers) -> Result<(), ConnectionError> {
        if id.is_multiple_of(2) || id <= self.last {
            return Err(ConnectionError::StreamId(id));
        }
        self.last = id;
        let place = Arc::clone(&self.places).try_acquire_owned();
        let (Ok(place), Some(messages)) = (place, self.messages.upgrade()) else {
            self.answer(Answer::Reset(id, frame::REFUSED_STREAM));
            return Ok(());
        };
        let (half, incoming) = Incoming::new();
        if fin {
            half.try_send(Piece::End).expect("a new stream has room");
        }
        let stream = Stream { id, headers, incoming, outgoing: Outgoing::new(messages, id), place };
        // Before the session can send anything on it.
        self.answer(Answer::Reply(id));
        if self.new_streams.try_send(stream).is_err() {
            self.answer(Answer::Reset(id, frame::REFUSED_STREAM));
        } else if !fin {
            self.halves.retain(|_, half| !half.is_closed());
            self.halves.insert(id, half);
        }
        Ok(())
    }

    fn answer(&self, answer: Answer) {
        // See MAX_ANSWERS.
        let _ = self.answers.try_send(answer);
    }
}

struct Writer<S> {
    io: WriteHalf<S>,
    life: Life,
    compressor: Compressor,
    out: BytesMut,
}

impl<S: AsyncWrite> Writer<S> {
    /// Writes until no more messages can come.
    async fn run(
        &mut self,
        mut messages: mpsc::Receiver<Message>,
        mut answers: mpsc::Receiver<Answer>,
    ) -> io::Result<()> {
        loop {
            tokio::select! {
                // A stream's reply is put there before the stream is known to those who send on it.
                biased;
                Some(answer) = answers.recv() => self.put_answer(&answer),
                message = messages.recv() => match message {
                    Some(Message::Bytes(id, bytes)) => frame::put_data(&mut self.out, id, &bytes, false),
                    Some(Message::End(id)) => frame::put_data(&mut self.out, id, &[], true),
                    None => return Ok(()),
                },
            }
            self.flush().await?;
            self.life.is_active();
        }
    }

    fn put_answer(&mut self, answer: &Answer) {
        match *answer {
            Answer::Reply(id) => {
                let block = self.compressor.write(&[]);
                frame::put_reply(&mut self.out, id, &block);
            }
            Answer::Reset(id, status) => frame::put_reset(&mut self.out, id, status),
            Answer::Pong(id) => frame::put_ping(&mut self.out, id),
        }
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.io.write_all(&self.out).await?;
        self.out.clear();
        self.io.flush().await
    }

    async fn close(&mut self) -> io::Result<()> {
        frame::put_go_away(&mut self.out, 0);
        self.flush().await?;
        self.io.shutdown().await
    }
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, Bytes};
    use proptest::collection::vec;
    use proptest::prelude::*;
    use tokio::io::DuplexStream;

    use super::super::Client;
    use super::*;
    use crate::streaming::remote_command::gather;
    use crate::streaming::requests::Wanted;

    const HOUR: Duration = Duration::from_secs(3600);

    fn life() -> (Life, std::os::unix::net::UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
        (Life::new(Arc::new(ours.into()), CancellationToken::new()), theirs)
    }

    /// Sends back what comes on the first stream, and ends it when that ends.
    async fn echo(mut opened: mpsc::Receiver<Stream>) {
        let Some(mut stream) = opened.recv().await else { return };
        while let Ok(Some(bytes)) = stream.incoming.read().await {
            if stream.outgoing.write(bytes).await.is_err() {
                return;
            }
        }
        let _ = stream.outgoing.finish().await; // As tested.
    }

    async fn with_echo<F: Future<Output = ()>>(test: impl FnOnce(Client<DuplexStream>) -> F) {
        let (ours, theirs) = tokio::io::duplex(10_000);
        let (life, _peer) = life();
        tokio::join!(serve(ours, life, HOUR, echo), test(Client::new(theirs)));
    }

    #[tokio::test]
    async fn megabytes_come_back_whole_and_halves_end_apart() {
        with_echo(async |mut client| {
            client.open(1, &[("streamtype", "data")]).await;
            let mut expected = Vec::new();
            for number in 0..200u8 {
                let data = vec![number; 20_000];
                client.data(1, &data, false).await;
                expected.extend_from_slice(&data);
                let length = expected.len();
                client.until(|client| client.received(1).len() == length).await;
                assert!(!client.ended(1));
            }
            assert_eq!(client.replies, 1);
            client.data(1, b"last", true).await;
            client.until(|client| client.ended(1)).await;
            assert!(client.received(1).strip_suffix(b"last") == Some(&expected));
        })
        .await;
    }

    #[tokio::test]
    async fn pings_are_answered_and_a_second_stream_of_the_same_number_ends_the_connection() {
        with_echo(async |mut client| {
            client.open(1, &[]).await;
            client.ping(77).await;
            client.until(|client| client.pings == [77]).await;
            client.open(1, &[]).await;
            client.until(|_| false).await;
            assert!(client.closed);
        })
        .await;
    }

    #[tokio::test]
    async fn a_session_that_never_reads_sees_its_client_go() {
        let (ours, theirs) = tokio::io::duplex(10_000);
        let (life, peer) = life();
        let lost = life.lost.clone();
        let session = async |mut opened: mpsc::Receiver<Stream>| {
            let _stream = opened.recv().await;
            lost.cancelled().await;
        };
        let client = async {
            let mut client = Client::new(theirs);
            client.open(1, &[]).await;
            // More than is queued: the connection is not read any more.
            let flood = async {
                loop {
                    client.data(1, &[0; 10_000], false).await;
                }
            };
            let _ = timeout(Duration::from_secs(1), flood).await;
            drop(peer);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            done = timeout(Duration::from_secs(20), serve(ours, life, HOUR, session)) => done.expect("it ends"),
            () = client => {}
        }
    }

    #[tokio::test]
    async fn a_stalled_client_holds_up_no_other_one() {
        let (stalled, held) = tokio::io::duplex(1000);
        let (life, _peer) = life();
        let lost = life.lost.clone();
        let flood = async |mut opened: mpsc::Receiver<Stream>| {
            let stream = opened.recv().await.expect("opened");
            tokio::select! {
                () = async { while stream.outgoing.write(Bytes::from_static(&[0; 1000])).await.is_ok() {} } => {}
                () = lost.cancelled() => {}
            }
        };
        let mut client = Client::new(held);
        client.open(1, &[]).await;
        let other = async {
            with_echo(async |mut client| {
                client.open(1, &[]).await;
                client.data(1, b"quick", true).await;
                client.until(|client| client.ended(1)).await;
                assert_eq!(client.received(1), b"quick");
            })
            .await;
        };
        tokio::select! {
            () = serve(stalled, life, HOUR, flood) => panic!("it is stalled"),
            other = timeout(Duration::from_secs(20), other) => other.expect("in time"),
        }
        assert_eq!(client.received(1), b"");
    }

    #[tokio::test]
    async fn a_silent_client_is_taken_for_gone() {
        let (ours, _theirs) = tokio::io::duplex(1000);
        let (life, _peer) = life();
        let lost = life.lost.clone();
        let served = serve(ours, life, Duration::from_millis(100), async |_| lost.cancelled().await);
        timeout(Duration::from_secs(20), served).await.expect("it ends");
    }

    #[tokio::test]
    async fn the_streams_of_a_command_are_gathered_by_their_types() {
        let (ours, theirs) = tokio::io::duplex(10_000);
        let (life, _peer) = life();
        let wanted = Wanted { stdin: true, stdout: true, tty: true, ..Wanted::default() };
        let session = async |opened| {
            let mut client = gather(opened, wanted, "v4.channel.k8s.io").await.expect("all are there");
            assert!(client.json && client.streams.stderr.is_none());
            let size = client.streams.sizes.as_mut().expect("wanted").next().await.expect("sent");
            assert_eq!((size.width, size.height), (80, 24));
            let typed = client.streams.stdin.as_mut().expect("wanted").read().await;
            client.streams.stdout.expect("wanted").write(typed.expect("there").expect("bytes")).await.expect("there");
            client.error.write("status".into()).await.expect("there");
            client.error.finish().await.expect("there");
        };
        let test = async {
            let mut client = Client::new(theirs);
            for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "resize")] {
                client.open(id, &[("streamtype", kind)]).await;
            }
            client.data(7, b"{\"Width\":80,\"Height\":24}\n", false).await;
            client.data(3, b"typed", false).await;
            client.until(|client| client.ended(1)).await;
            assert_eq!((client.received(5), client.received(1)), (b"typed".as_slice(), b"status".as_slice()));
        };
        tokio::join!(serve(ours, life, HOUR, session), test);
    }

    #[tokio::test]
    async fn a_stream_of_an_unknown_type_or_twice_the_same_is_refused() {
        for kinds in [["error", "error"], ["error", "other"]] {
            let (ours, theirs) = tokio::io::duplex(10_000);
            let (life, _peer) = life();
            let wanted = Wanted { stdout: true, ..Wanted::default() };
            let session = async |opened| {
                assert!(gather(opened, wanted, "channel.k8s.io").await.is_none());
            };
            let test = async {
                let mut client = Client::new(theirs);
                client.open(1, &[("streamtype", kinds[0])]).await;
                client.open(3, &[("streamtype", kinds[1])]).await;
                drop(client);
            };
            tokio::join!(serve(ours, life, HOUR, session), test);
        }
    }

    /// What a client may send.
    #[derive(Clone, Debug)]
    enum Sent {
        /// The next stream.
        Open,
        Data(u32, Vec<u8>, bool),
        Ping(u32),
        Reset(u32),
        /// One of [`BROKEN`].
        Broken(usize),
    }

    /// Frames after which there is no way on.
    const BROKEN: [&[u8]; 5] = [
        &[0xff; 8],
        b"\x80\x02\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01", // Another version.
        b"\x80\x03\x00\x06\x00\x00\x00\x03xxx",              // A ping of three bytes.
        b"\x80\x03\x00\x01\x00\x00\x00\x0a\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00", // A stream of the server's.
        b"\x80\x03\x00\x08\x00\x00\x00\x0a\x00\x00\x00\x01rubbis", // Headers that are not compressed.
    ];

    fn sent() -> impl Strategy<Value = Sent> {
        let data =
            (prop_oneof![4 => Just(1u32), 1 => 0u32..9], vec(any::<u8>(), 0..300), proptest::bool::weighted(0.05));
        prop_oneof![
            3 => Just(Sent::Open),
            16 => data.prop_map(|(id, bytes, fin)| Sent::Data(id, bytes, fin)),
            2 => any::<u32>().prop_map(Sent::Ping),
            1 => (0u32..9).prop_map(Sent::Reset),
            1 => (0..BROKEN.len()).prop_map(Sent::Broken),
        ]
    }

    /// The bytes of it all, and what of them comes on the first stream.
    fn written(all: &[Sent]) -> (BytesMut, Vec<u8>) {
        let (mut out, mut first, mut compressor, mut last) =
            (BytesMut::new(), Vec::new(), Compressor::default(), None::<u32>);
        let (mut reads, mut goes_on) = (true, true);
        for sent in all {
            match sent {
                Sent::Open => {
                    let id = last.map_or(1, |last| last + 2);
                    frame::put_syn_stream(&mut out, id, &compressor.write(&[("streamtype", "data")]));
                    last = Some(id);
                }
                Sent::Data(id, bytes, fin) => {
                    frame::put_data(&mut out, *id, bytes, *fin);
                    if *id == 1 && last.is_some() && reads && goes_on {
                        first.extend_from_slice(bytes);
                        reads = !fin;
                    }
                }
                Sent::Ping(id) => frame::put_ping(&mut out, *id),
                Sent::Reset(id) => {
                    frame::put_reset(&mut out, *id, 5);
                    reads &= *id != 1 || last.is_none();
                }
                Sent::Broken(which) => {
                    out.put_slice(BROKEN[*which]);
                    goes_on = false;
                }
            }
        }
        (out, first)
    }

    /// What comes on the first stream of a client that sends `bytes`, of which `room` are on their way at once, and goes.
    async fn read_from(bytes: &[u8], room: usize) -> Vec<u8> {
        let (ours, theirs) = tokio::io::duplex(room);
        let (mut answers, mut requests) = tokio::io::split(theirs);
        let (life, _peer) = life();
        let mut got = Vec::new();
        let all = &mut got;
        let session = |mut opened: mpsc::Receiver<Stream>| async move {
            let Some(mut stream) = opened.recv().await else { return };
            let first = async {
                while let Ok(Some(bytes)) = stream.incoming.read().await {
                    all.extend_from_slice(&bytes);
                }
            };
            let others = async {
                while let Some(other) = opened.recv().await {
                    drop(other);
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = first => {}
                () = others => {}
            }
        };
        let client = async {
            // The server may have given the connection up.
            let _ = requests.write_all(bytes).await;
            let _ = requests.shutdown().await;
        };
        let taken = async { tokio::io::copy(&mut answers, &mut tokio::io::sink()).await };
        let all = async { tokio::join!(serve(ours, life, HOUR, session), client, taken) };
        timeout(Duration::from_secs(60), all)
            .await
            .expect("it ends with its client")
            .2
            .expect("a duplex has no errors");
        got
    }

    proptest! {
        #[test]
        fn a_stream_has_what_came_before_the_first_broken_frame(all in vec(sent(), 0..40), room in 1usize..2000) {
            let (bytes, expected) = written(&all);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            prop_assert_eq!(runtime.block_on(read_from(&bytes, room)), expected);
        }

        #[test]
        fn any_bytes_end_with_their_client(bytes in vec(any::<u8>(), 0..500), room in 1usize..200) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            prop_assert!(runtime.block_on(read_from(&bytes, room)).len() <= bytes.len());
        }
    }
}
