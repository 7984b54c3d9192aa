//! Output, input and terminals over stream connections.

use isopod_proto::STREAM_WINDOW;
use isopod_proto::agent::{
    CreateContainerRequest, ResizeTerminalRequest, StartContainerRequest, StreamKind, WaitProcessRequest,
};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::fixture::{fixture, request, within};

#[tokio::test]
async fn root_more_than_a_window_arrives_whole() {
    let Some(mut fixture) = fixture().await else { return };
    let (exit, output) = fixture.complete("seq 1 100000").await;
    let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    assert!(expected.len() > 4 * STREAM_WINDOW);
    assert!(output == expected);
    assert_eq!(exit.exit_code, 0);
}

#[tokio::test]
async fn root_a_new_connection_continues_where_the_old_one_was() {
    let Some(mut fixture) = fixture().await else { return };
    let id = fixture.run("seq 1 100000").await;
    let mut taken = Vec::new();
    // Each connection takes some bytes for good, reads a few more that it forgets, and is lost.
    while taken.len() < 300_000 {
        let mut stream = fixture.open(&id, StreamKind::Stdout, taken.len() as u64).await.unwrap();
        let mut bytes = vec![0; 30_000];
        within(stream.read_exact(&mut bytes)).await.unwrap();
        taken.extend_from_slice(&bytes[..20_000]);
        stream.write_all(&(taken.len() as u64).to_le_bytes()).await.unwrap();
    }
    let waiting = fixture.client.wait_process(WaitProcessRequest { process_id: id.clone() });
    let early = tokio::time::timeout(Duration::from_secs(1), waiting).await;
    assert!(early.is_err(), "the end must wait for the acknowledgement of the last byte");
    let mut stream = fixture.open(&id, StreamKind::Stdout, taken.len() as u64).await.unwrap();
    loop {
        let count = within(stream.read_buf(&mut taken)).await.unwrap();
        if count == 0 {
            break;
        }
        let _ = stream.write_all(&(taken.len() as u64).to_le_bytes()).await;
    }
    let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    assert!(taken == expected.as_bytes());
    assert_eq!(fixture.wait(&id).await.exit_code, 0);
}

#[tokio::test]
async fn root_a_newer_connection_takes_the_stream_over() {
    let Some(mut fixture) = fixture().await else { return };
    let id = fixture.run("sleep 1000").await;
    let mut old = fixture.open(&id, StreamKind::Stdout, 0).await.unwrap();
    let _new = fixture.open(&id, StreamKind::Stdout, 0).await.unwrap();
    assert_eq!(within(old.read(&mut [0; 1])).await.unwrap(), 0);
    assert!(fixture.open(&id, StreamKind::Stdout, 1).await.unwrap_err().contains("offset 1"));
    assert!(fixture.open(&id, StreamKind::TerminalOutput, 0).await.is_err());
    assert!(fixture.open("nothing", StreamKind::Stdout, 0).await.unwrap_err().contains("nothing"));
}

#[tokio::test]
async fn root_input_ends_by_a_half_close_and_not_by_a_lost_connection() {
    let Some(mut fixture) = fixture().await else { return };
    let mut request = request("cat; echo end");
    request.process.as_mut().unwrap().stdin = true;
    let id = request.id.clone();
    fixture.client.create_container(request).await.unwrap();
    fixture.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap();

    let mut lost = fixture.open(&id, StreamKind::Stdin, 0).await.unwrap();
    lost.write_all(b"one\n").await.unwrap();
    let mut output = fixture.open(&id, StreamKind::Stdout, 0).await.unwrap();
    let mut line = [0; 4];
    within(output.read_exact(&mut line)).await.unwrap();
    drop(lost);
    let mut second = fixture.open(&id, StreamKind::Stdin, 0).await.unwrap();
    second.write_all(b"two\n").await.unwrap();
    within(output.read_exact(&mut line)).await.unwrap();
    assert_eq!(&line, b"two\n");
    second.shutdown().await.unwrap();
    within(output.read_exact(&mut line)).await.unwrap();
    assert_eq!(&line, b"end\n");
    assert_eq!(within(second.read(&mut line)).await.unwrap(), 0);
    output.write_all(&12u64.to_le_bytes()).await.unwrap();
    assert_eq!(fixture.wait(&id).await.exit_code, 0);
}

#[tokio::test]
async fn root_output_that_others_hold_open_ends_soon_after_the_process() {
    let Some(mut fixture) = fixture().await else { return };
    let id = fixture.run("sleep 1000").await;
    let (code, output) = fixture.exec(&id, "sleep 999 & echo done").await;
    assert_eq!((code, output.as_str()), (0, "done\n"));
}

#[tokio::test]
async fn root_a_terminal_is_a_terminal() {
    let Some(mut fixture) = fixture().await else { return };
    let mut with_terminal = request("test -c /dev/console && tty && read line && stty size && echo got $line");
    let process = with_terminal.process.as_mut().unwrap();
    (process.terminal, process.stdin) = (true, true);
    let id = with_terminal.id.clone();
    fixture.client.create_container(with_terminal).await.unwrap();
    let resize = ResizeTerminalRequest { process_id: id.clone(), columns: 132, rows: 43 };
    fixture.client.resize_terminal(resize).await.unwrap();
    fixture.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap();
    let mut input = fixture.open(&id, StreamKind::Stdin, 0).await.unwrap();
    input.write_all(b"typed\n").await.unwrap();
    let output = fixture.output(&id, StreamKind::TerminalOutput).await;
    let output = String::from_utf8(output).unwrap();
    assert!(output.contains("/dev/pts/0\r\n") || output.contains("/dev/console\r\n"), "{output}");
    assert!(output.contains("43 132\r\n") && output.contains("got typed\r\n"), "{output}");
    assert_eq!(fixture.wait(&id).await.exit_code, 0);
}

#[tokio::test]
async fn root_output_can_be_opened_again_by_any_user() {
    let Some(mut fixture) = fixture().await else { return };
    let mut as_web: CreateContainerRequest = request("echo again > /dev/stdout");
    as_web.process.as_mut().unwrap().user.as_mut().unwrap().user = "web".into();
    assert_eq!(fixture.output_of(as_web).await, "again\n");
}

/// A connection to a port of the pod.
async fn forward(fixture: &crate::fixture::Fixture, port: u32) -> Result<tokio::net::UnixStream, String> {
    fixture.open_with("", StreamKind::Tcp, 0, port).await
}

#[tokio::test]
async fn root_a_port_of_the_pod_is_reached_and_halves_close_apart() {
    let Some(mut fixture) = fixture().await else { return };
    let id = fixture.run("while true; do nc -l -p 7000 -e /bin/sh -c 'wc -c; echo after'; done").await;
    let mut stream = within(async {
        loop {
            match forward(&fixture, 7000).await {
                Ok(stream) => return Ok::<_, std::io::Error>(stream),
                Err(error) => assert!(error.contains("127.0.0.1"), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    stream.write_all(&vec![b'x'; 1_000_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "1000000\nafter\n", "container {id}");
}

#[tokio::test]
async fn root_a_port_where_nobody_listens_is_told_with_both_addresses() {
    let Some(fixture) = fixture().await else { return };
    let error = forward(&fixture, 7001).await.unwrap_err();
    assert!(error.contains("7001") && error.contains("127.0.0.1") && error.contains("::1"), "{error}");
    for port in [0, 65_536, u32::MAX] {
        assert!(forward(&fixture, port).await.unwrap_err().contains("not a TCP port"));
    }
}

#[tokio::test]
async fn root_a_terminal_has_its_size_before_the_command_runs() {
    let Some(mut fixture) = fixture().await else { return };
    let id = fixture.run("sleep 1000").await;
    let process = isopod_proto::agent::Process {
        args: ["sh", "-c", "stty size"].map(str::to_owned).to_vec(),
        terminal: true,
        terminal_columns: 101,
        terminal_rows: 33,
        ..request("").process.unwrap()
    };
    let process_id = "f".repeat(64);
    let exec =
        isopod_proto::agent::ExecRequest { container_id: id, process_id: process_id.clone(), process: Some(process) };
    fixture.client.exec(exec).await.unwrap();
    let output = fixture.output(&process_id, StreamKind::TerminalOutput).await;
    assert_eq!(String::from_utf8(output).unwrap(), "33 101\r\n");
}
