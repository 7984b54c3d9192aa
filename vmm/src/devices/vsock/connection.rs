//! One connection with the guest: its credit in both directions, and what the guest is to be told next.
//!
//! The counters are the specification's (5.10.6.3), modulo 2^32. `buf_alloc` minus what is on its way is the credit: here
//! [`BUF_ALLOC`] bytes for the guest, which bounds what is kept for a host that does not read.

use std::time::{Duration, Instant};

use super::handshake::REFUSED;
use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::stream::{Host, HostStream, ReadOutcome};

/// Bytes of the guest's that are kept for a host that does not read.
pub(super) const BUF_ALLOC: u32 = 128 * 1024;
/// The guest is told of room again when this much came back.
const UPDATE_AFTER: u32 = BUF_ALLOC / 4;
/// How long the guest has to answer a request of the host, or to confirm the end of a connection.
pub(super) const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// The two ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host's request waits for the guest's answer.
    Requested {
        deadline: Instant,
    },
    Open,
    /// The guest has been told that the host's side is closed, and is to confirm it.
    Closing {
        deadline: Instant,
    },
}

/// What a packet of the guest did to a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Keep,
    /// The guest has closed: bytes on their way to the host still reach it.
    Close {
        answer_rst: bool,
    },
    /// The guest broke the protocol, or refused: nothing more comes.
    Abort {
        answer_rst: bool,
    },
}

/// What the guest is to be sent: an operation, its flags, and how many bytes of data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub op: Op,
    pub flags: u32,
    pub len: u32,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub key: Key,
    pub phase: Phase,
    /// It is in the list of those that may have a packet for the guest.
    pub queued: bool,
    /// The first packet, which opens the connection: a request or a response.
    opening: Option<Op>,
    /// Bytes the guest has room for in all, and has taken out of it so far.
    guest_alloc: u32,
    guest_forwarded: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// The guest was asked for credit and has not given any since.
    asked: bool,
    /// Bytes received from the guest, taken by the host, and what of the latter the guest knows.
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    /// The guest asked for our credit.
    update: bool,
    /// All that the host's side sends has been read.
    host_ended: bool,
    /// The directions the guest has ended (SHUTDOWN flags), and those that it was told the host has.
    guest_ended: u32,
    told_ended: u32,
}

impl Connection {
    /// A connection that `opening` begins.
    pub fn new(key: Key, phase: Phase, opening: Op) -> Self {
        Self {
            key,
            phase,
            queued: false,
            opening: Some(opening),
            guest_alloc: 0,
            guest_forwarded: 0,
            sent: 0,
            asked: false,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            update: false,
            host_ended: false,
            guest_ended: 0,
            told_ended: 0,
        }
    }

    /// Takes note of the credit that every packet of the guest carries.
    pub fn update_credit(&mut self, header: &Header) {
        if (self.guest_alloc, self.guest_forwarded) != (header.buf_alloc, header.fwd_cnt) {
            (self.guest_alloc, self.guest_forwarded) = (header.buf_alloc, header.fwd_cnt);
            self.asked = false;
        }
    }

    /// Bytes the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Acts on a packet of the guest.
    pub fn receive<S: HostStream>(&mut self, host: &mut Host<S>, header: &Header, payload: &[u8]) -> Verdict {
        self.update_credit(header);
        match (self.phase, header.op) {
            (Phase::Requested { .. }, Op::Response) => {
                self.phase = Phase::Open;
                host.send_own(format!("OK {}\n", self.key.host_port).as_bytes());
                Verdict::Keep
            }
            (Phase::Requested { .. }, Op::Rst) => {
                host.send_own(REFUSED);
                Verdict::Abort { answer_rst: false }
            }
            (Phase::Open | Phase::Closing { .. }, Op::Rst) => Verdict::Close { answer_rst: false },
            (Phase::Open | Phase::Closing { .. }, Op::CreditUpdate) => Verdict::Keep,
            (Phase::Open, Op::CreditRequest) => {
                self.update = true;
                Verdict::Keep
            }
            (Phase::Open, Op::Rw) => self.receive_data(host, payload),
            // The host has closed: there is nobody to give it to, and the guest has been told.
            (Phase::Closing { .. }, Op::Rw | Op::CreditRequest) => Verdict::Keep,
            (Phase::Open | Phase::Closing { .. }, Op::Shutdown) => self.receive_shutdown(host, header.flags),
            (Phase::Requested { .. }, _) | (_, Op::Request | Op::Response | Op::Unknown(_)) => {
                Verdict::Abort { answer_rst: true }
            }
        }
    }

    fn receive_data<S: HostStream>(&mut self, host: &mut Host<S>, payload: &[u8]) -> Verdict {
        let on_its_way = self.received.wrapping_sub(self.forwarded);
        let room = BUF_ALLOC.saturating_sub(on_its_way) as usize;
        if payload.len() > room || self.guest_ended & SHUTDOWN_SEND != 0 {
            return Verdict::Abort { answer_rst: true };
        }
        self.received = self.received.wrapping_add(payload.len() as u32);
        host.send(payload);
        self.settle(host);
        Verdict::Keep
    }

    fn receive_shutdown<S: HostStream>(&mut self, host: &mut Host<S>, flags: u32) -> Verdict {
        let before = self.guest_ended;
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        if self.guest_ended == SHUTDOWN_BOTH {
            return Verdict::Close { answer_rst: true };
        }
        let new = self.guest_ended & !before;
        if new & SHUTDOWN_RECEIVE != 0 {
            host.refuse_input();
        }
        if new & SHUTDOWN_SEND != 0 && host.is_drained() {
            host.finish();
        }
        Verdict::Keep
    }

    /// The host's side has taken bytes, or has gone.
    pub fn host_changed<S: HostStream>(&mut self, host: &mut Host<S>) {
        let pending = self.received != self.forwarded;
        self.settle(host);
        if pending && host.is_drained() && self.guest_ended & SHUTDOWN_SEND != 0 {
            host.finish();
        }
    }

    fn settle<S: HostStream>(&mut self, host: &mut Host<S>) {
        self.forwarded = self.forwarded.wrapping_add(host.take_forwarded() as u32);
    }

    /// The directions the guest is still to be told the host has ended.
    fn untold_ends<S: HostStream>(&self, host: &Host<S>) -> u32 {
        let send = if self.host_ended { SHUTDOWN_SEND } else { 0 };
        let receive = if host.is_gone() { SHUTDOWN_RECEIVE } else { 0 };
        (send | receive) & !self.told_ended
    }

    fn wants_data<S: HostStream>(&self, host: &Host<S>) -> bool {
        host.is_readable() && !self.host_ended && self.guest_ended & SHUTDOWN_RECEIVE == 0
    }

    fn owes_update(&self) -> bool {
        self.update || self.forwarded.wrapping_sub(self.told_forwarded) >= UPDATE_AFTER
    }

    /// `true` if there may be a packet for the guest.
    pub fn has_packet<S: HostStream>(&self, host: &Host<S>) -> bool {
        if self.opening.is_some() {
            return true;
        }
        self.phase == Phase::Open
            && (self.untold_ends(host) != 0
                || self.owes_update()
                || self.wants_data(host) && (self.credit() > 0 || !self.asked))
    }

    /// The next packet for the guest, its data in `payload`.
    pub fn next_packet<S: HostStream>(
        &mut self,
        host: &mut Host<S>,
        payload: &mut [u8],
        now: Instant,
    ) -> Option<Outgoing> {
        let packet = |op, flags, len| Some(Outgoing { op, flags, len });
        if let Some(op) = self.opening.take() {
            return packet(op, 0, 0);
        }
        if self.phase != Phase::Open {
            return None;
        }
        if self.wants_data(host) && self.credit() > 0 {
            let limit = payload.len().min(self.credit() as usize);
            // Without room for data in the guest's buffer there is no more than the header's.
            match if limit > 0 { host.read(&mut payload[..limit]) } else { ReadOutcome::Nothing } {
                ReadOutcome::Bytes(count) => {
                    self.sent = self.sent.wrapping_add(count as u32);
                    return packet(Op::Rw, 0, count as u32);
                }
                ReadOutcome::End => self.host_ended = true,
                ReadOutcome::Nothing => {}
            }
        }
        let ends = self.untold_ends(host);
        if ends != 0 {
            self.told_ended |= ends;
            if self.told_ended == SHUTDOWN_BOTH {
                self.phase = Phase::Closing { deadline: now + ANSWER_DEADLINE };
            }
            return packet(Op::Shutdown, self.told_ended, 0);
        }
        if self.owes_update() {
            return packet(Op::CreditUpdate, 0, 0);
        }
        if self.wants_data(host) && self.credit() == 0 && !self.asked {
            self.asked = true;
            return packet(Op::CreditRequest, 0, 0);
        }
        None
    }

    /// Our credit, to be put into a packet that is sent now: `buf_alloc` and `fwd_cnt`.
    pub fn tell_credit(&mut self) -> (u32, u32) {
        self.update = false;
        self.told_forwarded = self.forwarded;
        (BUF_ALLOC, self.forwarded)
    }
}
