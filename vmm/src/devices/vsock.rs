//! The socket device (virtio 1.2, section 5.10): connections between the guest's vsock ports and a Unix socket of the host.
//!
//! A connection to the Unix socket begins with one line:
//! * `CONNECT <port>\n` connects to that port of the guest; answered by `OK <host port>\n`, or by closing.
//! * `ACCEPT <port>\n` waits for one connection of the guest to that port of the host (CID 2); answered by
//!   `OK <guest port>\n` when it is there.
//!
//! After the answer it carries raw bytes. [`muxer`] is the state of all connections; it does no more I/O than reading and
//! writing streams that never block, and is given the time. The worker moves packets between it and the queues.
//!
//! ```text
//! socket accepted -> Handshake -CONNECT-> Requested -RESPONSE-> Open -> Closing -> (gone)
//!                            \-ACCEPT---> Waiting ---REQUEST----^  \-> Draining -> (gone)
//! ```
//! Closing: the host's side is closed, and the guest has been told; gone with the guest's RST or a deadline. Draining: the
//! guest's side is closed, and the host has yet to take the bytes that came before; gone when it has, or closes.

mod connection;
mod device;
mod handshake;
mod muxer;
mod packet;
mod stream;
mod worker;

pub use device::{Vsock, VsockError};
