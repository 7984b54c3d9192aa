//! The connection to the VMM's device: requests in, replies out.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use parking_lot::Mutex;

use crate::fuse::{Header, REQUEST_HEADER, Reply};
use crate::server::Server;

/// Threads that serve requests: a file system of the host that takes its time holds up as many requests before all wait.
const THREADS: usize = 4;

/// Serves requests from `stream` until its end, which is that of the VM. Each thread that does so calls `begin` first.
pub fn run(server: &Server, stream: &UnixStream, begin: &(dyn Fn() + Sync)) -> io::Result<()> {
    let (input, output) = (Mutex::new(stream), Mutex::new(stream));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|number| {
                let name = format!("files {number}");
                std::thread::Builder::new().name(name).spawn_scoped(scope, || {
                    begin();
                    let result = serve(server, &input, &output);
                    // The others may wait for a request.
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    result
                })
            })
            .collect::<io::Result<_>>()?;
        let ended = |worker: std::thread::ScopedJoinHandle<'_, io::Result<()>>| {
            worker.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        };
        workers.into_iter().map(ended).fold(Ok(()), io::Result::and)
    })
}

fn serve(server: &Server, input: &Mutex<&UnixStream>, output: &Mutex<&UnixStream>) -> io::Result<()> {
    let (mut body, mut reply) = (Vec::new(), Reply::default());
    while let Some(header) = receive(&mut input.lock(), &mut body)? {
        if let Some(answer) = server.answer(header, &body, &mut reply)
            && let Err(error) = output.lock().write_all(answer)
        {
            return if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

/// The next request, what follows its header in `body`. `None` at the end.
fn receive(stream: &mut &UnixStream, body: &mut Vec<u8>) -> io::Result<Option<Header>> {
    let mut header = [0; REQUEST_HEADER];
    match stream.read_exact(&mut header) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    // The VMM's device has looked at the length.
    let impossible = || io::Error::new(io::ErrorKind::InvalidData, "a request of an impossible length");
    let header = Header::parse(&header).ok_or_else(impossible)?;
    body.clear();
    body.resize(header.length - REQUEST_HEADER, 0);
    stream.read_exact(body)?;
    Ok(Some(header))
}
