//! Sessions of crictl in a terminal of its own, whose size changes while they run.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use isopod_cri_server::cri;
use isopod_tests::fixture::{TestPod, eventually, shell};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

const PATIENCE: Duration = Duration::from_secs(60);
const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// A program that has a terminal as its controlling one.
struct Terminal {
    master: File,
    child: Child,
    output: mpsc::Receiver<Vec<u8>>,
    /// What was shown since the last change of the size.
    shown: String,
}

impl Terminal {
    /// Runs crictl in a terminal of `rows` and `columns`.
    fn start(arguments: &[&str], rows: u16, columns: u16) -> anyhow::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master: OwnedFd = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&master)?;
        let slave = File::from(rustix::pty::ioctl_tiocgptpeer(&master, flags)?);
        rustix::termios::tcsetwinsize(&master, size(rows, columns))?;
        let child = Command::new("setsid")
            .args(["--ctty", "--wait", "crictl", "-t", "120s"])
            .args(arguments)
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave)
            .spawn()
            .context("cannot run setsid")?;
        let master = File::from(master);
        let (mut reader, (sender, output)) = (master.try_clone()?, mpsc::channel());
        // Ends when nobody has the terminal any more, which is an error of the read.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { master, child, output, shown: String::new() })
    }

    /// Changes the size, which the kernel tells crictl by SIGWINCH.
    fn resize(&mut self, rows: u16, columns: u16) -> anyhow::Result<()> {
        self.shows("");
        self.shown.clear();
        Ok(rustix::termios::tcsetwinsize(&self.master, size(rows, columns))?)
    }

    fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        Ok(self.master.write_all(format!("{line}\r").as_bytes())?)
    }

    fn shows(&mut self, wanted: &str) -> bool {
        self.shown.extend(self.output.try_iter().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()));
        self.shown.contains(wanted)
    }

    /// Waits until all of `wanted` was shown.
    async fn until(&mut self, wanted: &[&str]) -> anyhow::Result<()> {
        let shown = eventually("output", PATIENCE, async || wanted.iter().all(|word| self.shows(word)).then_some(()));
        let shown = shown.await;
        shown.with_context(|| format!("{wanted:?} is not in {:?}", self.shown))
    }

    /// Types the line every now and then, until its answer is shown.
    async fn ask(&mut self, line: &str, wanted: &str) -> anyhow::Result<()> {
        for _ in 0..PATIENCE.as_secs() {
            self.type_line(line)?;
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                if self.shows(wanted) {
                    return Ok(());
                }
            }
        }
        anyhow::bail!("{wanted:?} is not in {:?}", self.shown)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[tokio::test]
async fn a_commands_terminal_follows_the_size_of_the_clients() -> anyhow::Result<()> {
    let pod = TestPod::run("resize").await?;
    let container = pod.start(shell("resize", "sleep 1000")).await?;
    for transport in TRANSPORTS {
        let script = format!(
            "trap 'echo winch $(stty size)' WINCH; \
             until [ -e /{transport} ]; do echo size $(stty size); sleep 1; done; echo bye"
        );
        let arguments = ["exec", "-it", "--transport", transport, &container.id, "sh", "-c", &script];
        let mut terminal = Terminal::start(&arguments, 33, 101)?;
        terminal.until(&["size 33 101"]).await?;
        terminal.resize(44, 77)?;
        terminal.until(&["winch 44 77", "size 44 77"]).await?;
        terminal.resize(20, 60)?;
        terminal.until(&["winch 20 60", "size 20 60"]).await?;
        container.sh(&format!("touch /{transport}")).await?;
        terminal.until(&["bye"]).await?;
        let ended = eventually("end of crictl", PATIENCE, async || terminal.child.try_wait().ok()?).await?;
        assert!(ended.success(), "{ended}: {:?}", terminal.shown);
    }
    pod.remove().await?;
    Ok(())
}

#[tokio::test]
async fn a_container_with_a_terminal_outlives_those_who_attach_to_it() -> anyhow::Result<()> {
    let pod = TestPod::run("terminal").await?;
    let mut config = shell("terminal", "exec sh");
    (config.tty, config.stdin) = (true, true);
    let container = pod.start(config).await?;
    for (number, transport) in TRANSPORTS.into_iter().enumerate() {
        let arguments = ["attach", "-i", "-t", "--transport", transport, &container.id];
        let mut terminal = Terminal::start(&arguments, 33, 101)?;
        // What is typed is shown as well, so an answer is what only the shell knows.
        terminal.ask("echo sum $((40 + 2))", "sum 42").await?;
        // It is the same shell each time.
        terminal.ask("echo before=${mark}.", &format!("before={}.", "x".repeat(number))).await?;
        terminal.type_line("mark=${mark}x")?;
        terminal.ask("echo size $(stty size)", "size 33 101").await?;
        terminal.resize(44, 77)?;
        terminal.ask("echo size $(stty size)", "size 44 77").await?;
        drop(terminal);
        assert_eq!(container.status().await?.state(), cri::ContainerState::ContainerRunning);
    }
    // The end of the shell is the end of those who are attached.
    let mut terminal = Terminal::start(&["attach", "-i", "-t", &container.id], 33, 101)?;
    terminal.ask("echo before=${mark}.", "before=xx.").await?;
    terminal.type_line("exit 7")?;
    assert_eq!(container.exited().await?.exit_code, 7);
    eventually("end of crictl", PATIENCE, async || terminal.child.try_wait().ok()?).await?;
    pod.remove().await?;
    Ok(())
}
