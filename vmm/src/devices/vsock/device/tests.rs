use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::super::packet::{HEADER_BYTES, HOST_CID, Header, Op, SHUTDOWN_BOTH, TYPE_STREAM};
use super::*;
use crate::devices::testing::{BUFFERS, Driver, activate, memory};
use vm_memory::{Bytes, GuestAddress};

const CID: u64 = 7;
const RX_BUFFER: u32 = 4096;

/// A guest with its driver, and the path of the host's socket.
struct Guest {
    device: Vsock,
    rx: Driver,
    tx: Driver,
    directory: tempfile::TempDir,
}

impl Guest {
    fn listening() -> (UnixListener, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        (UnixListener::bind(directory.path().join("vsock")).unwrap(), directory)
    }

    fn start(listener: UnixListener, directory: tempfile::TempDir) -> Self {
        let mut device = Vsock::new(listener, CID).unwrap();
        let mut drivers = activate(&mut device, &memory(), RING_FEATURES);
        let (tx, mut rx) = (drivers.remove(1), drivers.remove(0));
        for index in 0..64 {
            rx.add(&[(BUFFERS + u64::from(RX_BUFFER * index), RX_BUFFER, true)]).unwrap();
        }
        rx.notify();
        Self { device, rx, tx, directory }
    }

    fn connect(directory: &tempfile::TempDir, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(directory.path().join("vsock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream
    }

    /// Takes the next packet for the guest and gives the buffer back.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, length) = self.rx.wait_used();
        assert!(length as usize >= HEADER_BYTES);
        // The driver hands out descriptors in order, so that the buffer is known by its head.
        let address = BUFFERS + u64::from(RX_BUFFER) * u64::from(head);
        let bytes = self.rx.bytes(address, length as usize);
        assert_eq!(self.rx.add(&[(address, RX_BUFFER, true)]), Some(head));
        self.rx.notify();
        let header = Header::parse(bytes[..HEADER_BYTES].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, TYPE_STREAM));
        assert_eq!(header.len as usize, length as usize - HEADER_BYTES);
        (header, bytes[HEADER_BYTES..].to_vec())
    }

    fn send(&mut self, op: Op, guest_port: u32, host_port: u32, flags: u32, data: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            len: data.len() as u32,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        };
        self.send_raw(&header, data);
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        let at = BUFFERS + 0x10_0000;
        self.tx.memory.write_slice(&header.encode(), GuestAddress(at)).unwrap();
        self.tx.memory.write_slice(data, GuestAddress(at + 64)).unwrap();
        let mut buffers = vec![(at, HEADER_BYTES as u32, false)];
        if !data.is_empty() {
            buffers.push((at + 64, data.len() as u32, false));
        }
        assert_eq!(self.tx.request(&buffers), 0);
    }
}

fn read_line(stream: &mut UnixStream) -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while !line.ends_with(b"\n") {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

#[test]
fn a_context_id_with_a_meaning_of_its_own_is_refused() {
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        let (listener, _directory) = Guest::listening();
        assert!(matches!(Vsock::new(listener, cid), Err(VsockError::InvalidCid { .. })));
    }
}

#[test]
fn the_host_connects_and_bytes_go_both_ways() {
    let (listener, directory) = Guest::listening();
    let mut guest = Guest::start(listener, directory);
    let mut host = Guest::connect(&guest.directory, "CONNECT 1025\n");
    let (request, _) = guest.receive();
    assert_eq!((request.op, request.dst_port), (Op::Request, 1025));
    let port = request.src_port;
    guest.send(Op::Response, 1025, port, 0, &[]);
    assert_eq!(read_line(&mut host), format!("OK {port}\n"));
    host.write_all(b"from the host").unwrap();
    let (header, data) = guest.receive();
    assert_eq!((header.op, data.as_slice()), (Op::Rw, &b"from the host"[..]));
    guest.send(Op::Rw, 1025, port, 0, b"from the guest\n");
    assert_eq!(read_line(&mut host), "from the guest\n");
    guest.send(Op::Shutdown, 1025, port, SHUTDOWN_BOTH, &[]);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.receive().0.op, Op::Rst);
}

#[test]
fn a_refused_connection_is_closed() {
    let (listener, directory) = Guest::listening();
    let mut guest = Guest::start(listener, directory);
    let mut host = Guest::connect(&guest.directory, "CONNECT 9\n");
    let (request, _) = guest.receive();
    guest.send(Op::Rst, 9, request.src_port, 0, &[]);
    assert_eq!(read_line(&mut host), "REFUSED\n");
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    let mut host = Guest::connect(&guest.directory, "HELO\n");
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn an_accept_from_before_the_boot_takes_the_guests_connection() {
    let (listener, directory) = Guest::listening();
    let mut host = Guest::connect(&directory, "ACCEPT 1024\n");
    let mut guest = Guest::start(listener, directory);
    guest.send(Op::Request, 5000, 1024, 0, &[]);
    assert_eq!(guest.receive().0.op, Op::Response);
    assert_eq!(read_line(&mut host), "OK 5000\n");
    guest.send(Op::Rw, 5000, 1024, 0, b"hello\n");
    assert_eq!(read_line(&mut host), "hello\n");
    drop(host);
    let (header, _) = guest.receive();
    assert_eq!((header.op, header.flags), (Op::Shutdown, SHUTDOWN_BOTH));
}

#[test]
fn a_request_waits_for_an_accept_and_is_refused_without_one() {
    let (listener, directory) = Guest::listening();
    let mut guest = Guest::start(listener, directory);
    guest.send(Op::Request, 5000, 1024, 0, &[]);
    let mut host = Guest::connect(&guest.directory, "ACCEPT 1024\n");
    assert_eq!(guest.receive().0.op, Op::Response);
    assert_eq!(read_line(&mut host), "OK 5000\n");
    guest.send(Op::Request, 5001, 1024, 0, &[]);
    let (header, _) = guest.receive();
    assert_eq!((header.op, header.dst_port), (Op::Rst, 5001));
}

#[test]
fn an_accept_whose_socket_closed_takes_nothing() {
    let (listener, directory) = Guest::listening();
    let mut guest = Guest::start(listener, directory);
    let first = Guest::connect(&guest.directory, "ACCEPT 1024\n");
    drop(first);
    let mut second = Guest::connect(&guest.directory, "ACCEPT 1024\n");
    // A connection that is answered shows that the two before it were dealt with.
    let mut last = Guest::connect(&guest.directory, "bad\n");
    assert_eq!(last.read(&mut [0]).unwrap(), 0);
    guest.send(Op::Request, 5000, 1024, 0, &[]);
    assert_eq!(guest.receive().0.op, Op::Response);
    assert_eq!(read_line(&mut second), "OK 5000\n");
}

#[test]
fn packets_that_make_no_sense_are_refused_or_dropped() {
    let (listener, directory) = Guest::listening();
    let mut guest = Guest::start(listener, directory);
    let base = Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 2,
        len: 0,
        kind: TYPE_STREAM,
        op: Op::Rw,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    // Not answered: another's context id, and RST to nobody.
    guest.send_raw(&Header { src_cid: CID + 1, ..base }, &[]);
    guest.send_raw(&Header { op: Op::Rst, ..base }, &[]);
    // A length that is not there, and one that is too long.
    guest.send_raw(&Header { len: 5, src_port: 10, ..base }, b"four");
    guest.send_raw(&Header { len: u32::MAX, src_port: 11, ..base }, &[]);
    guest.send_raw(&Header { op: Op::Unknown(99), src_port: 12, ..base }, &[]);
    for port in [10, 11, 12] {
        let (header, _) = guest.receive();
        assert_eq!((header.op, header.src_port, header.dst_port), (Op::Rst, 2, port));
    }
    // A header that is not whole is given back.
    assert_eq!(guest.tx.request(&[(BUFFERS, HEADER_BYTES as u32 - 1, false)]), 0);
    // The device still works.
    let _host = Guest::connect(&guest.directory, "CONNECT 1\n");
    assert_eq!(guest.receive().0.op, Op::Request);
    guest.device.reset();
}

#[test]
fn a_reset_closes_all_connections_and_new_ones_work_after_it() {
    let (listener, directory) = Guest::listening();
    let mut guest = Guest::start(listener, directory);
    let mut host = Guest::connect(&guest.directory, "CONNECT 1\n");
    let port = guest.receive().0.src_port;
    guest.send(Op::Response, 1, port, 0, &[]);
    assert_eq!(read_line(&mut host), format!("OK {port}\n"));
    guest.device.reset();
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    let Guest { device, directory, .. } = guest;
    let mut guest = Guest::start(device.listener.try_clone().unwrap(), directory);
    let _host = Guest::connect(&guest.directory, "CONNECT 1\n");
    assert_eq!(guest.receive().0.op, Op::Request);
}

/// What a guest that sends everything back has on its way for one connection.
#[derive(Default)]
struct Echo {
    host_port: u32,
    waiting: std::collections::VecDeque<u8>,
    sent: u32,
    read: u32,
    alloc: u32,
    forwarded: u32,
}

impl Guest {
    /// Serves connections to any port until `count` of them were closed: all that comes goes back. At most 64 KiB wait for
    /// the host to take them.
    fn echo(&mut self, count: usize) {
        const ROOM: u32 = 64 * 1024;
        let (mut echoes, mut closed) = (std::collections::HashMap::<u32, Echo>::new(), 0);
        while closed < count {
            let (header, data) = self.receive();
            let port = header.src_port;
            let mut answers = Vec::new();
            let echo = echoes.entry(port).or_default();
            (echo.alloc, echo.forwarded, echo.host_port) = (header.buf_alloc, header.fwd_cnt, port);
            echo.waiting.extend(data);
            assert!(echo.waiting.len() <= ROOM as usize, "more than there is room for");
            match header.op {
                Op::Request => answers.push((Op::Response, 0, Vec::new())),
                Op::Shutdown => answers.push((Op::Shutdown, SHUTDOWN_BOTH, Vec::new())),
                Op::Rst => closed += 1,
                _ => {}
            }
            while !echo.waiting.is_empty() && header.op != Op::Rst {
                let credit = echo.alloc - echo.sent.wrapping_sub(echo.forwarded);
                let length = echo.waiting.len().min(credit as usize).min(8192);
                if length == 0 {
                    break;
                }
                echo.sent += length as u32;
                echo.read += length as u32;
                answers.push((Op::Rw, 0, echo.waiting.drain(..length).collect()));
            }
            let fwd_cnt = echo.read;
            for (op, flags, data) in answers {
                let header = Header {
                    src_cid: CID,
                    dst_cid: HOST_CID,
                    src_port: header.dst_port,
                    dst_port: port,
                    len: data.len() as u32,
                    kind: TYPE_STREAM,
                    op,
                    flags,
                    buf_alloc: ROOM,
                    fwd_cnt,
                };
                self.send_raw(&header, &data);
            }
        }
    }
}

#[test]
fn many_connections_carry_much_both_ways_at_once() {
    const CONNECTIONS: usize = 8;
    const BYTES: usize = 2 << 20;
    let (listener, directory) = Guest::listening();
    let mut guest = Guest::start(listener, directory);
    let path = guest.directory.path().join("vsock");
    let programs: Vec<_> = (0..CONNECTIONS)
        .map(|index| {
            let path = path.clone();
            std::thread::spawn(move || {
                let mut stream = UnixStream::connect(path).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
                writeln!(stream, "CONNECT {}", 100 + index).unwrap();
                assert!(read_line(&mut stream).starts_with("OK "));
                let sent: Vec<u8> = (0..BYTES).map(|place| (place / 3 + place / 1000 + index) as u8).collect();
                let mut writer = stream.try_clone().unwrap();
                let (expected, slow) = (sent.clone(), index == 0);
                let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
                if slow {
                    // A program that does not read holds up only itself.
                    std::thread::sleep(Duration::from_millis(300));
                }
                let mut received = vec![0; BYTES];
                stream.read_exact(&mut received).unwrap();
                writing.join().unwrap();
                assert!(received == expected);
            })
        })
        .collect();
    guest.echo(CONNECTIONS);
    for program in programs {
        program.join().unwrap();
    }
}
