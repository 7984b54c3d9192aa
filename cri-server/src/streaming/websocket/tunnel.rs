//! SPDY in the messages of a WebSocket: the bytes of the messages, one after the other, are what SPDY would be without it.

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::streaming::stream::{CHUNK, Life};

/// The inner connection, and the work that connects it to the WebSocket; that ends when either end does.
pub async fn tunnel<S>(io: S, life: Life) -> (DuplexStream, impl Future<Output = ()>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (inner, outer) = tokio::io::duplex(2 * CHUNK);
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(super::config())).await;
    (inner, carry(socket, outer, life))
}

async fn carry<S>(socket: WebSocketStream<S>, outer: DuplexStream, life: Life)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sink, mut messages) = socket.split();
    let (mut from_spdy, mut to_spdy) = tokio::io::split(outer);
    let upload = async {
        while let Some(Ok(message)) = messages.next().await {
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Ping(_) | Message::Pong(_) => continue, // Answered by the library.
                Message::Close(_) | Message::Text(_) | Message::Frame(_) => break,
            };
            let written = tokio::select! {
                written = to_spdy.write_all(&bytes) => written.is_ok(),
                () = life.hung_up() => false,
            };
            if !written {
                break;
            }
        }
        // SPDY sees the end of its connection, or has ended itself.
        let _ = to_spdy.shutdown().await;
    };
    let download = async {
        let mut buffer = vec![0; CHUNK];
        while let Ok(count @ 1..) = from_spdy.read(&mut buffer).await {
            if sink.send(Message::binary(buffer[..count].to_vec())).await.is_err() {
                break;
            }
        }
        let _ = sink.send(Message::Close(Some(super::channels::normal_end()))).await; // The client may have gone.
    };
    tokio::pin!(upload, download);
    tokio::select! {
        () = &mut upload => {}
        // The client may still send its own end.
        () = &mut download => drop(tokio::time::timeout(super::channels::CLOSE_TIMEOUT, upload).await),
    }
    life.lost.cancel();
}
