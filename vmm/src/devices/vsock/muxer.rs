//! All connections between the guest and the host's Unix socket.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::connection::{ANSWER_DEADLINE, Connection, Key, Outgoing, Phase, Verdict};
use super::handshake::{Command, Line, Progress, TIMEOUT};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use super::stream::{Host, HostStream, ReadOutcome, Readiness};

/// Most sockets of the host at a time, whatever their state.
pub(super) const MAX_SOCKETS: usize = 1024;
/// How long the host's side has to send its line.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a request of the guest waits for somebody to accept it. A Linux guest gives up after 2 s (the default of
/// SO_VM_SOCKETS_CONNECT_TIMEOUT) without telling, and a request held for longer would be answered to nobody.
const HOLD: Duration = Duration::from_millis(1500);
/// Most requests of the guest that wait.
const MAX_HELD: usize = 64;
/// Most refusals that wait for the guest to take them. More are dropped: the guest caused them all.
const MAX_REFUSALS: usize = 2 * MAX_SOCKETS;
/// How often deadlines are looked at, while there are any.
const TICK: Duration = Duration::from_millis(250);
/// Ports given to connections of the host are from here to twice this.
const FIRST_EPHEMERAL_PORT: u32 = 1 << 30;

/// Names a socket of the host.
pub(super) type Token = u64;

/// What a socket of the host is in.
#[derive(Debug)]
enum Role {
    Handshake { line: Line, deadline: Instant },
    Waiting { port: u32 },
    Connected(Connection),
    Draining,
}

#[derive(Debug)]
struct Socket<S> {
    host: Host<S>,
    role: Role,
}

/// A request of the guest that nobody has accepted yet.
#[derive(Debug)]
struct HeldRequest {
    key: Key,
    header: Header,
    deadline: Instant,
}

/// The state of the device. `S` is the host's stream; dropping one closes it.
pub(super) struct Muxer<S> {
    guest_cid: u64,
    sockets: HashMap<Token, Socket<S>>,
    connections: HashMap<Key, Token>,
    /// Those that wait to accept, the oldest first.
    waiting: HashMap<u32, VecDeque<Token>>,
    held: VecDeque<HeldRequest>,
    refusals: VecDeque<Header>,
    /// Connections that may have a packet for the guest, in turn.
    ready: VecDeque<Token>,
    next_token: Token,
    next_port: u32,
    next_tick: Option<Instant>,
}

impl<S: HostStream> Muxer<S> {
    /// `first_token` and higher ones are given to sockets.
    pub fn new(guest_cid: u64, first_token: Token) -> Self {
        Self {
            guest_cid,
            sockets: HashMap::new(),
            connections: HashMap::new(),
            waiting: HashMap::new(),
            held: VecDeque::new(),
            refusals: VecDeque::new(),
            ready: VecDeque::new(),
            next_token: first_token,
            next_port: FIRST_EPHEMERAL_PORT,
            next_tick: None,
        }
    }

    /// `true` if there may be a packet for the guest.
    pub fn has_packets(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// When [`Muxer::expire`] is to be called next.
    pub fn next_tick(&self) -> Option<Instant> {
        self.next_tick
    }

    /// Takes a new connection of the host over; `None`, closing it, if there are too many.
    pub fn add(&mut self, stream: S, now: Instant) -> Option<Token> {
        if self.sockets.len() >= MAX_SOCKETS {
            return None;
        }
        let token = self.next_token;
        self.next_token += 1;
        let role = Role::Handshake { line: Line::default(), deadline: now + HANDSHAKE_DEADLINE };
        self.sockets.insert(token, Socket { host: Host::new(stream), role });
        self.arm(now);
        Some(token)
    }

    /// The stream of a socket, to be watched.
    pub fn stream(&self, token: Token) -> Option<&S> {
        self.sockets.get(&token).map(|socket| socket.host.stream())
    }

    /// Something has become possible on a socket of the host.
    pub fn host_ready(&mut self, token: Token, readiness: Readiness, now: Instant) {
        let Some(socket) = self.sockets.get_mut(&token) else { return };
        socket.host.update(readiness);
        match &mut socket.role {
            Role::Handshake { .. } => self.read_line(token, now),
            Role::Waiting { .. } => {
                if socket.host.is_ended() {
                    self.remove(token);
                }
            }
            Role::Connected(connection) => {
                connection.host_changed(&mut socket.host);
                if matches!(connection.phase, Phase::Requested { .. }) && socket.host.is_gone() {
                    self.abort(token);
                } else {
                    self.queue(token);
                }
            }
            Role::Draining => self.drain(token),
        }
    }

    fn read_line(&mut self, token: Token, now: Instant) {
        loop {
            let Some(Socket { host, role: Role::Handshake { line, .. } }) = self.sockets.get_mut(&token) else {
                return;
            };
            let mut byte = [0];
            // One at a time: what follows the line belongs to the connection.
            let progress = match host.read(&mut byte) {
                ReadOutcome::Bytes(_) => line.push(byte[0]),
                ReadOutcome::Nothing => return,
                ReadOutcome::End => Progress::Invalid,
            };
            match progress {
                Progress::More => {}
                Progress::Invalid => return self.remove(token),
                // Its end may have come together with the line.
                Progress::Complete(Command::Connect(_)) if host.is_gone() => return self.remove(token),
                Progress::Complete(Command::Accept(_)) if host.is_ended() => return self.remove(token),
                Progress::Complete(Command::Connect(port)) => return self.connect(token, port, now),
                Progress::Complete(Command::Accept(port)) => return self.accept(token, port),
            }
        }
    }

    fn connect(&mut self, token: Token, guest_port: u32, now: Instant) {
        let key = loop {
            let key = Key { host_port: self.next_port, guest_port };
            self.next_port =
                if key.host_port + 1 < 2 * FIRST_EPHEMERAL_PORT { key.host_port + 1 } else { FIRST_EPHEMERAL_PORT };
            // Ends, as there are more ports than sockets.
            if !self.connections.contains_key(&key) && self.held.iter().all(|held| held.key != key) {
                break key;
            }
        };
        let phase = Phase::Requested { deadline: now + ANSWER_DEADLINE };
        self.open(token, Connection::new(key, phase, Op::Request));
        self.arm(now);
    }

    fn accept(&mut self, token: Token, port: u32) {
        let held = self.held.iter().position(|held| held.key.host_port == port);
        if let Some(held) = held.and_then(|index| self.held.remove(index)) {
            return self.establish(token, held.key, &held.header);
        }
        if let Some(socket) = self.sockets.get_mut(&token) {
            socket.role = Role::Waiting { port };
            self.waiting.entry(port).or_default().push_back(token);
        }
    }

    /// Joins a request of the guest and a socket that waited for it.
    fn establish(&mut self, token: Token, key: Key, header: &Header) {
        let mut connection = Connection::new(key, Phase::Open, Op::Response);
        connection.update_credit(header);
        if let Some(socket) = self.sockets.get_mut(&token) {
            socket.host.send_own(format!("OK {}\n", key.guest_port).as_bytes());
        }
        self.open(token, connection);
    }

    fn open(&mut self, token: Token, connection: Connection) {
        let Some(socket) = self.sockets.get_mut(&token) else { return };
        self.connections.insert(connection.key, token);
        socket.role = Role::Connected(connection);
        self.queue(token);
    }

    /// Acts on a packet of the guest. `payload` is as long as the header says.
    pub fn guest_packet(&mut self, header: &Header, payload: &[u8], now: Instant) {
        // Its own context id is the only one a guest may use.
        if header.src_cid != self.guest_cid {
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        if let Some(token) = self.connections.get(&key).copied() {
            return self.connection_packet(token, header, payload, now);
        }
        let held = self.held.iter().position(|held| held.key == key);
        if let Some(index) = held {
            self.held.remove(index);
        }
        match header.op {
            Op::Request if held.is_none() => self.request(key, header, now),
            _ => self.refuse(header),
        }
    }

    /// A packet of the guest cannot be read: whatever connection it belongs to ends.
    pub fn malformed_packet(&mut self, header: &Header) {
        if header.src_cid != self.guest_cid {
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        match self.connections.get(&key).copied() {
            Some(token) if header.dst_cid == HOST_CID => self.abort(token),
            _ => self.refuse(header),
        }
    }

    fn request(&mut self, key: Key, header: &Header, now: Instant) {
        if let Some(token) = self.waiting.get_mut(&key.host_port).and_then(VecDeque::pop_front) {
            self.forget_waiting(key.host_port, token);
            self.establish(token, key, header);
        } else if self.held.len() < MAX_HELD {
            self.held.push_back(HeldRequest { key, header: *header, deadline: now + HOLD });
            self.arm(now);
        } else {
            self.refuse(header);
        }
    }

    fn connection_packet(&mut self, token: Token, header: &Header, payload: &[u8], _now: Instant) {
        let Some(Socket { host, role: Role::Connected(connection) }) = self.sockets.get_mut(&token) else { return };
        match connection.receive(host, header, payload) {
            Verdict::Keep => self.queue(token),
            Verdict::Close { answer_rst } => {
                self.leave(token, answer_rst);
                self.drain(token);
            }
            Verdict::Abort { answer_rst } => {
                self.leave(token, answer_rst);
                self.remove(token);
            }
        }
    }

    /// Ends a connection at once, and tells the guest.
    fn abort(&mut self, token: Token) {
        self.leave(token, true);
        self.remove(token);
    }

    /// Takes a connection from the guest's side; its socket stays.
    fn leave(&mut self, token: Token, tell: bool) {
        let Some(socket) = self.sockets.get_mut(&token) else { return };
        let Role::Connected(connection) = std::mem::replace(&mut socket.role, Role::Draining) else { return };
        let Key { host_port, guest_port } = connection.key;
        self.connections.remove(&connection.key);
        if tell {
            self.push_refusal(HOST_CID, host_port, guest_port, TYPE_STREAM);
        }
    }

    /// Closes a socket whose guest's side is closed, if nothing is on its way any more.
    fn drain(&mut self, token: Token) {
        if let Some(Socket { host, role: Role::Draining }) = self.sockets.get_mut(&token)
            && (host.is_drained() || host.is_gone())
        {
            self.sockets.remove(&token);
        }
    }

    fn remove(&mut self, token: Token) {
        let Some(socket) = self.sockets.remove(&token) else { return };
        match socket.role {
            Role::Waiting { port } => self.forget_waiting(port, token),
            Role::Connected(connection) => {
                self.connections.remove(&connection.key);
            }
            Role::Handshake { .. } | Role::Draining => {}
        }
    }

    fn forget_waiting(&mut self, port: u32, token: Token) {
        if let Some(waiting) = self.waiting.get_mut(&port) {
            waiting.retain(|other| *other != token);
            if waiting.is_empty() {
                self.waiting.remove(&port);
            }
        }
    }

    /// Answers `header` with RST, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Rst {
            self.push_refusal(header.dst_cid, header.dst_port, header.src_port, header.kind);
        }
    }

    fn push_refusal(&mut self, src_cid: u64, src_port: u32, dst_port: u32, kind: u16) {
        if self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(Header {
                src_cid,
                dst_cid: self.guest_cid,
                src_port,
                dst_port,
                len: 0,
                kind,
                op: Op::Rst,
                flags: 0,
                buf_alloc: 0,
                fwd_cnt: 0,
            });
        }
    }

    /// Puts a connection in the list of those that may have a packet.
    fn queue(&mut self, token: Token) {
        if let Some(Socket { host, role: Role::Connected(connection) }) = self.sockets.get_mut(&token)
            && !connection.queued
            && connection.has_packet(host)
        {
            connection.queued = true;
            self.ready.push_back(token);
        }
    }

    /// The next packet for the guest; its data, if any, at the front of `payload`, which bounds it.
    pub fn next_packet(&mut self, payload: &mut [u8], now: Instant) -> Option<Header> {
        if let Some(header) = self.refusals.pop_front() {
            return Some(header);
        }
        for _ in 0..self.ready.len() {
            let token = self.ready.pop_front()?;
            let Some(Socket { host, role: Role::Connected(connection) }) = self.sockets.get_mut(&token) else {
                continue;
            };
            connection.queued = false;
            let Some(Outgoing { op, flags, len }) = connection.next_packet(host, payload, now) else {
                // It waits on if only the room was missing.
                self.queue(token);
                continue;
            };
            let Key { host_port, guest_port } = connection.key;
            let (buf_alloc, fwd_cnt) = connection.tell_credit();
            if matches!(connection.phase, Phase::Closing { .. }) {
                self.arm(now);
            }
            self.queue(token);
            let header = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: host_port,
                dst_port: guest_port,
                len,
                kind: TYPE_STREAM,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            return Some(header);
        }
        None
    }

    /// Something with a deadline has begun.
    fn arm(&mut self, now: Instant) {
        self.next_tick.get_or_insert(now + TICK);
    }

    /// Ends what has passed its deadline. Does nothing before [`Muxer::next_tick`].
    pub fn expire(&mut self, now: Instant) {
        if self.next_tick.is_none_or(|tick| now < tick) {
            return;
        }
        self.next_tick = None;
        while let Some(held) = self.held.pop_front_if(|held| held.deadline <= now) {
            self.refuse(&held.header);
        }
        let (mut late, mut early) = (Vec::new(), !self.held.is_empty());
        for (token, socket) in &self.sockets {
            let deadline = match &socket.role {
                Role::Handshake { deadline, .. } => *deadline,
                Role::Connected(Connection { phase: Phase::Requested { deadline }, .. }) => *deadline,
                Role::Connected(Connection { phase: Phase::Closing { deadline }, .. }) => *deadline,
                Role::Connected(Connection { phase: Phase::Open, .. }) | Role::Waiting { .. } | Role::Draining => {
                    continue;
                }
            };
            if deadline <= now {
                late.push(*token);
            } else {
                early = true;
            }
        }
        for token in late {
            if let Some(Socket { host, role: Role::Connected(connection) }) = self.sockets.get_mut(&token)
                && matches!(connection.phase, Phase::Requested { .. })
            {
                host.send_own(TIMEOUT);
            }
            self.abort(token);
        }
        if early {
            self.arm(now);
        }
    }
}

#[cfg(test)]
mod tests;
