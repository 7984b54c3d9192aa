use std::io::Read;

use isopod_proto::vmm::control_reply::Reply;
use isopod_proto::vmm::control_request::Request;
use isopod_proto::vmm::{Done, Info, RemoveDisk, VmInfo};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;

fn pair() -> (UnixStream, Connection) {
    let (client, server) = UnixStream::pair().expect("sockets");
    (client, Connection::new(server).expect("non-blocking"))
}

fn request(request: Request) -> Vec<u8> {
    encode_frame(&ControlRequest { request: Some(request) })
}

fn done() -> ControlReply {
    ControlReply { reply: Some(Reply::Done(Done {})) }
}

fn send_with_descriptors(client: &UnixStream, bytes: &[u8], count: usize) {
    let files: Vec<_> = (0..count).map(|_| tempfile::tempfile().expect("a temporary file")).collect();
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(client, &[std::io::IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).expect("sent");
}

#[test]
fn requests_are_answered_in_order_however_they_are_cut() {
    let (mut client, mut connection) = pair();
    let bytes = [request(Request::Info(Info {})), request(Request::RemoveDisk(RemoveDisk { id: "a".into() }))].concat();
    let mut seen = vec![];
    for byte in bytes {
        client.write_all(&[byte]).expect("sent");
        assert!(connection.serve(|request, _| {
            seen.push(request.request.expect("not empty"));
            done()
        }));
    }
    assert_eq!(seen, [Request::Info(Info {}), Request::RemoveDisk(RemoveDisk { id: "a".into() })]);
    let mut replies = vec![0; encode_frame(&done()).len() * 2];
    client.read_exact(&mut replies).expect("two replies");
    assert_eq!(replies, [encode_frame(&done()), encode_frame(&done())].concat());
}

#[test]
fn descriptors_come_with_the_request_they_were_sent_with() {
    let (client, mut connection) = pair();
    for count in [2, 3] {
        send_with_descriptors(&client, &request(Request::Info(Info {})), count);
        let mut taken = 0;
        while taken == 0 {
            assert!(connection.serve(|_, files| {
                taken = files.take(10).len();
                done()
            }));
        }
        assert_eq!(taken, count);
    }
}

#[test]
fn descriptors_that_no_request_named_are_closed() {
    let (client, mut connection) = pair();
    send_with_descriptors(&client, &request(Request::Info(Info {})), 3);
    assert!(connection.serve(|_, _| done()));
    assert!(connection.descriptors.0.is_empty());
}

#[test]
fn bytes_that_are_no_request_end_the_connection() {
    for bad in [&[0xff, 0xff, 0xff, 0x7f][..], &[1, 0, 0, 0, 0xff]] {
        let (mut client, mut connection) = pair();
        client.write_all(bad).expect("sent");
        assert!(!connection.serve(|_, _| done()), "{bad:?}");
    }
}

#[test]
fn a_client_that_closes_after_its_request_is_still_answered() {
    let (mut client, mut connection) = pair();
    client.write_all(&request(Request::Info(Info {}))).expect("sent");
    client.shutdown(std::net::Shutdown::Write).expect("open");
    let mut answers = 0;
    let mut turn = || {
        connection.serve(|_, _| {
            answers += 1;
            done()
        })
    };
    assert!(turn());
    assert!(!turn());
    assert_eq!(answers, 1);
}

#[test]
fn nothing_more_is_read_while_a_client_does_not_take_its_replies() {
    let (mut client, mut connection) = pair();
    let large =
        ControlReply { reply: Some(Reply::Info(VmInfo { disk_ids: vec!["x".repeat(200_000)], ..VmInfo::default() })) };
    let mut answered = 0;
    for _ in 0..8 {
        client.write_all(&request(Request::Info(Info {}))).expect("sent");
        assert!(connection.serve(|_, _| {
            answered += 1;
            large.clone()
        }));
    }
    assert_eq!(connection.interest(), PollFlags::OUT);
    assert!(answered < 8, "{answered}");
    client.set_nonblocking(true).expect("settable");
    let mut read = 0;
    let mut chunk = vec![0; 1 << 16];
    while read < 8 * encode_frame(&large).len() {
        match client.read(&mut chunk) {
            Ok(bytes) => read += bytes,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        connection.serve(|_, _| {
            answered += 1;
            large.clone()
        });
    }
    assert_eq!(answered, 8);
}
