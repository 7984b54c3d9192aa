use std::cell::RefCell;
use std::io;
use std::net::Shutdown;
use std::rc::Rc;

use proptest::prelude::*;

use super::super::connection::BUF_ALLOC;
use super::super::packet::{MAX_PAYLOAD, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;

const CID: u64 = 9;
/// What the host's kernel keeps of what the device wrote.
const PIPE: usize = 10_000;

/// A stream between the device and a program of the host.
#[derive(Debug, Default)]
struct Pipe {
    to_device: VecDeque<u8>,
    to_program: VecDeque<u8>,
    program_ended: bool,
    program_closed: bool,
    device_ended: bool,
    device_closed: bool,
}

/// The device's end.
#[derive(Debug)]
struct End(Rc<RefCell<Pipe>>);

impl HostStream for End {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        if pipe.to_device.is_empty() {
            let ended = pipe.program_ended || pipe.program_closed;
            return if ended { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let count = bytes.len().min(pipe.to_device.len());
        for (place, byte) in bytes.iter_mut().zip(pipe.to_device.drain(..count)) {
            *place = byte;
        }
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        assert!(!pipe.device_ended, "written after its end");
        if pipe.program_closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = bytes.len().min(PIPE - pipe.to_program.len());
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        pipe.to_program.extend(&bytes[..count]);
        Ok(count)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        if how == Shutdown::Write {
            self.0.borrow_mut().device_ended = true;
        }
        Ok(())
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.0.borrow_mut().device_closed = true;
    }
}

/// The muxer, its time, and the programs of the host.
struct World {
    muxer: Muxer<End>,
    now: Instant,
}

impl World {
    fn new() -> Self {
        Self { muxer: Muxer::new(CID, 16), now: Instant::now() }
    }

    /// A program that connects and writes `line`.
    fn program(&mut self, line: &str) -> (Token, Rc<RefCell<Pipe>>) {
        let pipe = Rc::new(RefCell::new(Pipe::default()));
        pipe.borrow_mut().to_device.extend(line.as_bytes());
        let token = self.muxer.add(End(Rc::clone(&pipe)), self.now).expect("there is room");
        self.event(token, &pipe);
        (token, pipe)
    }

    /// Tells the device what epoll would.
    fn event(&mut self, token: Token, pipe: &Rc<RefCell<Pipe>>) {
        let readiness = {
            let pipe = pipe.borrow();
            Readiness {
                readable: !pipe.to_device.is_empty() || pipe.program_ended || pipe.program_closed,
                writable: pipe.to_program.len() < PIPE,
                ended: pipe.program_ended,
                closed: pipe.program_closed,
            }
        };
        self.muxer.host_ready(token, readiness, self.now);
    }

    fn packet(&mut self, header: Header, data: &[u8]) {
        self.muxer.guest_packet(&header, data, self.now);
    }

    fn next(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        let mut payload = vec![0; room];
        let header = self.muxer.next_packet(&mut payload, self.now)?;
        payload.truncate(header.len as usize);
        Some((header, payload))
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.muxer.expire(self.now);
    }
}

fn header(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len: 0,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
    }
}

/// An open connection of the guest (port 1) to a program that accepted port 50.
fn accepted() -> (World, Token, Rc<RefCell<Pipe>>) {
    let mut world = World::new();
    let (token, pipe) = world.program("ACCEPT 50\n");
    world.packet(header(Op::Request, 1, 50), &[]);
    assert_eq!(world.next(0).unwrap().0.op, Op::Response);
    assert_eq!(pipe.borrow_mut().to_program.drain(..).collect::<Vec<_>>(), b"OK 1\n");
    (world, token, pipe)
}

#[test]
fn half_open_connections_end_at_their_deadlines() {
    let mut world = World::new();
    let (_, silent) = world.program("CONN");
    let (_, requested) = world.program("CONNECT 1\n");
    let (_, waiting) = world.program("ACCEPT 50\n");
    assert_eq!(world.next(0).unwrap().0.op, Op::Request);
    world.packet(header(Op::Request, 3, 51), &[]);
    world.pass(HOLD);
    assert_eq!((world.next(0).unwrap().0.op, world.next(0)), (Op::Rst, None));
    world.pass(ANSWER_DEADLINE - HOLD - TICK);
    assert!(!silent.borrow().device_closed && !requested.borrow().device_closed);
    world.pass(TICK);
    assert!(silent.borrow().device_closed && requested.borrow().device_closed);
    assert_eq!((silent.borrow().to_program.len(), &requested.borrow().to_program), (0, &VecDeque::from(*b"TIMEOUT\n")));
    assert_eq!(world.next(0).unwrap().0.op, Op::Rst);
    // Waiting to accept has no end of its own, and needs no ticks.
    world.pass(Duration::from_secs(3600));
    assert!(!waiting.borrow().device_closed);
    assert_eq!((world.muxer.next_tick(), world.muxer.sockets.len()), (None, 1));
}

#[test]
fn accepts_are_served_in_turn_one_connection_each() {
    let mut world = World::new();
    let (_, first) = world.program("ACCEPT 50\n");
    let (gone, gone_pipe) = world.program("ACCEPT 50\n");
    let (_, second) = world.program("ACCEPT 50\n");
    gone_pipe.borrow_mut().program_closed = true;
    world.event(gone, &gone_pipe);
    assert!(gone_pipe.borrow().device_closed);
    for port in [1, 2] {
        world.packet(header(Op::Request, port, 50), &[]);
    }
    assert_eq!(first.borrow().to_program, b"OK 1\n");
    assert_eq!(second.borrow().to_program, b"OK 2\n");
    assert!(world.muxer.waiting.is_empty());
}

#[test]
fn a_program_that_gives_up_before_the_answer_is_told_to_the_guest() {
    let mut world = World::new();
    let (token, pipe) = world.program("CONNECT 1\n");
    let request = world.next(0).unwrap().0;
    pipe.borrow_mut().program_closed = true;
    world.event(token, &pipe);
    assert_eq!(world.next(0).unwrap().0.op, Op::Rst);
    // The answer comes too late and is refused.
    world.packet(header(Op::Response, 1, request.src_port), &[]);
    assert_eq!(world.next(0).unwrap().0.op, Op::Rst);
    assert!(world.muxer.sockets.is_empty());
}

#[test]
fn a_guest_that_sends_more_than_it_may_loses_the_connection() {
    let (mut world, _, pipe) = accepted();
    let data = vec![7; MAX_PAYLOAD];
    // The pipe takes some, the device keeps a buffer's worth.
    for _ in 0..BUF_ALLOC as usize / MAX_PAYLOAD {
        world.packet(header(Op::Rw, 1, 50), &data);
    }
    assert!(!pipe.borrow().device_closed);
    world.packet(header(Op::Rw, 1, 50), &data);
    assert!(pipe.borrow().device_closed);
    let refusal = std::iter::from_fn(|| world.next(0)).map(|(header, _)| header.op).next();
    assert_eq!(refusal, Some(Op::Rst));
}

#[test]
fn bytes_sent_before_a_close_reach_a_slow_program() {
    let (mut world, token, pipe) = accepted();
    let data: Vec<u8> = (0..60_000u32).map(|place| place as u8).collect();
    world.packet(header(Op::Rw, 1, 50), &data);
    world.packet(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown, 1, 50) }, &[]);
    assert_eq!(world.next(0).unwrap().0.op, Op::Rst);
    // The guest may use the port again at once.
    world.packet(header(Op::Request, 1, 50), &[]);
    let mut read = Vec::new();
    while !pipe.borrow().device_closed {
        assert!(!pipe.borrow().to_program.is_empty());
        read.extend(pipe.borrow_mut().to_program.drain(..));
        world.event(token, &pipe);
    }
    read.extend(pipe.borrow_mut().to_program.drain(..));
    assert!(read == data);
}

#[test]
fn each_direction_ends_by_itself() {
    let (mut world, token, pipe) = accepted();
    world.packet(header(Op::Rw, 1, 50), b"last");
    world.packet(Header { flags: SHUTDOWN_SEND, ..header(Op::Shutdown, 1, 50) }, &[]);
    assert!(pipe.borrow().device_ended && !pipe.borrow().device_closed);
    assert_eq!(pipe.borrow().to_program, b"last");
    pipe.borrow_mut().to_device.extend(b"answer");
    world.event(token, &pipe);
    assert_eq!(world.next(100).unwrap().1, b"answer");
    pipe.borrow_mut().program_ended = true;
    world.event(token, &pipe);
    let (end, _) = world.next(100).unwrap();
    assert_eq!((end.op, end.flags), (Op::Shutdown, SHUTDOWN_SEND));
    world.packet(Header { flags: SHUTDOWN_RECEIVE, ..header(Op::Shutdown, 1, 50) }, &[]);
    assert_eq!(world.next(100).unwrap().0.op, Op::Rst);
    assert!(pipe.borrow().device_closed && world.muxer.sockets.is_empty());
}

#[test]
fn what_a_program_wrote_before_it_closed_reaches_the_guest() {
    let (mut world, token, pipe) = accepted();
    pipe.borrow_mut().to_device.extend([5; 100]);
    pipe.borrow_mut().program_closed = true;
    world.event(token, &pipe);
    let mut received = 0;
    let flags = loop {
        let (header, data) = world.next(30).expect("more is to come");
        received += data.len();
        if header.op == Op::Shutdown && header.flags == SHUTDOWN_BOTH {
            break received;
        }
    };
    assert_eq!(flags, 100);
    // Data on their way from the guest are dropped without harm, and its RST or the deadline ends it.
    world.packet(header(Op::Rw, 1, 50), b"late");
    world.pass(ANSWER_DEADLINE);
    assert_eq!(world.next(0).unwrap().0.op, Op::Rst);
    assert!(world.muxer.sockets.is_empty() && world.muxer.connections.is_empty());
}

#[test]
fn sockets_held_requests_and_refusals_are_bounded() {
    let mut world = World::new();
    let programs: Vec<_> = (0..MAX_SOCKETS).map(|_| world.program("ACCEPT 50\n")).collect();
    assert!(world.muxer.add(End(Rc::default()), world.now).is_none());
    for port in 0..5000 {
        world.packet(header(Op::Request, port, 51), &[]);
        world.packet(header(Op::Rw, port, 52), &[]);
    }
    assert_eq!((world.muxer.held.len(), world.muxer.refusals.len()), (MAX_HELD, MAX_REFUSALS));
    drop(programs);
}

/// One connection as the guest has it.
struct GuestEnd {
    port: u32,
    alloc: u32,
    sent: Vec<u8>,
    received: Vec<u8>,
    read: usize,
    device_alloc: u32,
    device_forwarded: u32,
    ended: bool,
}

/// One step of what the world does to a connection.
#[derive(Debug, Clone)]
enum Step {
    ProgramWrites(usize),
    ProgramReads(usize),
    GuestSends(usize),
    GuestReads(usize),
    GuestAsks,
    GuestPolls { packets: usize, room: usize },
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let step = prop_oneof![
        (1usize..40_000).prop_map(Step::ProgramWrites),
        (1usize..20_000).prop_map(Step::ProgramReads),
        (1usize..MAX_PAYLOAD).prop_map(Step::GuestSends),
        (1usize..40_000).prop_map(Step::GuestReads),
        Just(Step::GuestAsks),
        (1usize..20, 0usize..8000).prop_map(|(packets, room)| Step::GuestPolls { packets, room }),
    ];
    prop::collection::vec((0usize..3, step), 1..200)
}

/// A program's end of a connection: what it wrote and read.
struct ProgramEnd {
    token: Token,
    pipe: Rc<RefCell<Pipe>>,
    written: Vec<u8>,
    read: Vec<u8>,
}

struct Exchange {
    world: World,
    guests: Vec<GuestEnd>,
    programs: Vec<ProgramEnd>,
}

impl Exchange {
    fn new() -> Self {
        let mut exchange = Self { world: World::new(), guests: Vec::new(), programs: Vec::new() };
        for (port, alloc) in [(1, 1000), (2, 50_000), (3, 1 << 20)] {
            let (token, pipe) = exchange.world.program("ACCEPT 50\n");
            exchange.world.packet(Header { buf_alloc: alloc, ..header(Op::Request, port, 50) }, &[]);
            pipe.borrow_mut().to_program.clear();
            exchange.programs.push(ProgramEnd { token, pipe, written: Vec::new(), read: Vec::new() });
            exchange.guests.push(GuestEnd {
                port,
                alloc,
                sent: Vec::new(),
                received: Vec::new(),
                read: 0,
                device_alloc: 0,
                device_forwarded: 0,
                ended: false,
            });
        }
        exchange
    }

    fn guest_packet(&mut self, index: usize, op: Op, flags: u32, data: &[u8]) {
        let guest = &self.guests[index];
        let packet = Header {
            len: data.len() as u32,
            buf_alloc: guest.alloc,
            fwd_cnt: guest.read as u32,
            flags,
            ..header(op, guest.port, 50)
        };
        self.world.packet(packet, data);
    }

    /// Takes one packet; `false` if there is none.
    fn poll(&mut self, room: usize) -> bool {
        let Some((header, data)) = self.world.next(room) else { return false };
        let guest = &mut self.guests[header.dst_port as usize - 1];
        (guest.device_alloc, guest.device_forwarded) = (header.buf_alloc, header.fwd_cnt);
        assert!(guest.device_forwarded as usize <= guest.sent.len(), "more was taken than sent");
        match header.op {
            Op::Response | Op::CreditUpdate => {}
            Op::Rw => {
                guest.received.extend(data);
                assert!(guest.received.len() - guest.read <= guest.alloc as usize, "the guest has no room");
            }
            Op::CreditRequest => {
                let index = header.dst_port as usize - 1;
                self.guest_packet(index, Op::CreditUpdate, 0, &[]);
            }
            Op::Shutdown => guest.ended |= header.flags & SHUTDOWN_SEND != 0,
            other => panic!("unexpected {other:?}"),
        }
        true
    }

    fn step(&mut self, index: usize, step: &Step) {
        match *step {
            Step::ProgramWrites(count) => {
                let ProgramEnd { token, pipe, written, .. } = &mut self.programs[index];
                let data: Vec<u8> = (0..count).map(|place| ((written.len() + place) * 7 + index) as u8).collect();
                pipe.borrow_mut().to_device.extend(&data);
                written.extend(data);
                self.world.event(*token, pipe);
            }
            Step::ProgramReads(count) => {
                let ProgramEnd { token, pipe, read, .. } = &mut self.programs[index];
                let count = count.min(pipe.borrow().to_program.len());
                read.extend(pipe.borrow_mut().to_program.drain(..count));
                self.world.event(*token, pipe);
            }
            Step::GuestSends(count) => {
                let guest = &mut self.guests[index];
                let credit = guest.device_alloc as usize + guest.device_forwarded as usize - guest.sent.len();
                let start = guest.sent.len();
                let data: Vec<u8> = (0..count.min(credit)).map(|place| ((start + place) * 3 + index) as u8).collect();
                if !data.is_empty() {
                    guest.sent.extend(&data);
                    self.guest_packet(index, Op::Rw, 0, &data);
                }
            }
            Step::GuestReads(count) => {
                let guest = &mut self.guests[index];
                guest.read += count.min(guest.received.len() - guest.read);
                self.guest_packet(index, Op::CreditUpdate, 0, &[]);
            }
            Step::GuestAsks => self.guest_packet(index, Op::CreditRequest, 0, &[]),
            Step::GuestPolls { packets, room } => {
                for _ in 0..packets {
                    if !self.poll(room) {
                        break;
                    }
                }
            }
        }
    }

    /// Everybody reads all there is, until nothing moves.
    fn settle(&mut self) {
        for _ in 0..20_000 {
            let mut moved = self.poll(4000);
            for index in 0..3 {
                moved |= !self.programs[index].pipe.borrow().to_program.is_empty();
                moved |= self.guests[index].read < self.guests[index].received.len();
                self.step(index, &Step::ProgramReads(usize::MAX));
                self.step(index, &Step::GuestReads(usize::MAX));
            }
            if !moved {
                return;
            }
        }
        panic!("it never comes to rest");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever the order of things, every byte arrives once and in order, nobody is sent more than there is room for, and
    /// when everybody reads, nothing is left waiting.
    #[test]
    fn all_bytes_arrive_in_order(steps in steps()) {
        let mut exchange = Exchange::new();
        for (index, step) in &steps {
            exchange.step(*index, step);
        }
        exchange.settle();
        for index in 0..3 {
            let ProgramEnd { written, read, .. } = &exchange.programs[index];
            prop_assert!(&exchange.guests[index].received == written, "to the guest, connection {index}");
            prop_assert!(&exchange.guests[index].sent == read, "to the program, connection {index}");
            // The guest knows of room without asking.
            let GuestEnd { device_alloc, device_forwarded, sent, .. } = &exchange.guests[index];
            prop_assert!((device_alloc + device_forwarded) as usize - sent.len() > BUF_ALLOC as usize / 2);
            exchange.step(index, &Step::GuestAsks);
        }
        exchange.settle();
        for index in 0..3 {
            let guest = &exchange.guests[index];
            prop_assert_eq!(guest.device_forwarded as usize, guest.sent.len());
            let ProgramEnd { token, pipe, .. } = &exchange.programs[index];
            pipe.borrow_mut().program_ended = true;
            exchange.world.event(*token, pipe);
        }
        exchange.settle();
        for index in 0..3 {
            prop_assert!(exchange.guests[index].ended);
            exchange.guest_packet(index, Op::Shutdown, SHUTDOWN_BOTH, &[]);
            prop_assert!(exchange.programs[index].pipe.borrow().device_closed);
        }
        prop_assert!(exchange.world.muxer.sockets.is_empty() && exchange.world.muxer.connections.is_empty());
    }

    /// Packets of all kinds between few ports, with anything in their fields: nothing panics and the bounds hold.
    #[test]
    fn no_packet_does_harm(
        packets in prop::collection::vec(
            (0u16..10, 0u32..4, 49u32..52, any::<u32>(), any::<u32>(), 0u32..4, 0usize..3000, 0u64..3000), 1..300),
    ) {
        let mut world = World::new();
        for _ in 0..3 {
            world.program("ACCEPT 50\n");
            world.program("CONNECT 1\n");
        }
        for (op, guest_port, host_port, buf_alloc, fwd_cnt, flags, length, wait) in packets {
            let mut bytes = header(Op::Rw, guest_port, host_port).encode();
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            let mut packet = Header { buf_alloc, fwd_cnt, flags, len: length as u32, ..Header::parse(&bytes) };
            // Some answer the connections that the host asked for.
            if host_port == 49 {
                packet.dst_port = FIRST_EPHEMERAL_PORT + flags;
                packet.src_port = 1;
            }
            world.packet(packet, &vec![0; length]);
            while world.next(length).is_some() {}
            world.pass(Duration::from_millis(wait));
            prop_assert!(world.muxer.sockets.len() <= 6);
            prop_assert_eq!(
                world.muxer.connections.len(),
                world.muxer.sockets.values().filter(|socket| matches!(socket.role, Role::Connected(_))).count()
            );
        }
    }
}
