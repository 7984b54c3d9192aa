//! A network namespace that plays a guest, or another machine.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use isopod_cri_server::network::pod::PodNetwork;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The namespace; goes when dropped.
pub struct Guest {
    namespace: File,
    holder: Child,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl Guest {
    fn new() -> Self {
        let before = std::fs::read_link("/proc/self/ns/net").expect("read");
        let holder = Command::new("unshare").args(["--net", "sleep", "600"]).spawn().expect("unshare runs");
        let path = format!("/proc/{}/ns/net", holder.id());
        while std::fs::read_link(&path).expect("read") == before {
            std::thread::yield_now();
        }
        let guest = Self { namespace: File::open(path).expect("opened"), holder };
        guest.command(&["ip", "link", "set", "lo", "up"]);
        guest
    }

    /// A guest with what `network` says, whose interface is `tap`.
    pub fn behind(tap: OwnedFd, network: &PodNetwork) -> Self {
        let guest = Self::new();
        let inner = guest.run(|| isopod_vmm::tap::open("eth0").expect("opened"));
        guest.command(&["ip", "link", "set", "eth0", "address", &network.mac.to_string()]);
        for address in &network.addresses {
            let nodad: &[&str] = if address.addr().is_ipv6() { &["nodad"] } else { &[] };
            let address = address.to_string();
            guest.command(&[&["ip", "address", "add", &address, "dev", "eth0"][..], nodad].concat());
        }
        guest.command(&["ip", "link", "set", "eth0", "up", "mtu", &network.mtu.to_string()]);
        for route in &network.routes {
            let (to, family) =
                (route.destination.to_string(), if route.destination.addr().is_ipv4() { "-4" } else { "-6" });
            match route.gateway.map(|gateway| gateway.to_string()) {
                Some(via) => guest.command(&["ip", family, "route", "add", &to, "via", &via, "dev", "eth0"]),
                None => guest.command(&["ip", family, "route", "add", &to, "dev", "eth0"]),
            }
        }
        let (tap, inner) = (Arc::new(tap), Arc::new(inner));
        pump(&tap, &inner);
        pump(&inner, &tap);
        guest
    }

    /// A machine on a link with the test's namespace: addresses here and there, of both families.
    pub fn beside(here: &str, there: &str, here6: &str, there6: &str) -> Self {
        let guest = Self::new();
        let pid = guest.holder.id().to_string();
        let here_side = |words: &[&str]| assert!(Command::new("ip").args(words).status().expect("it runs").success());
        here_side(&["link", "add", "outside", "type", "veth", "peer", "name", "eth0", "netns", &pid]);
        here_side(&["address", "add", here, "dev", "outside"]);
        here_side(&["address", "add", here6, "dev", "outside", "nodad"]);
        here_side(&["link", "set", "outside", "up"]);
        guest.command(&["ip", "address", "add", there, "dev", "eth0"]);
        guest.command(&["ip", "address", "add", there6, "dev", "eth0", "nodad"]);
        guest.command(&["ip", "link", "set", "eth0", "up"]);
        guest
    }

    /// Does `work` in the namespace.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = self.namespace.try_clone().expect("cloned");
        let thread = std::thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("moved");
            work()
        });
        thread.join().expect("it does not panic")
    }

    /// Runs a program in the namespace, which has to succeed.
    pub fn command(&self, words: &[&str]) {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let output = self.run(move || {
            Command::new(&words[0]).args(&words[1..]).stdin(Stdio::null()).output().map(|output| (words, output))
        });
        let (words, output) = output.expect("it runs");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Passes frames on until one of the taps is gone.
fn pump(from: &Arc<OwnedFd>, to: &Arc<OwnedFd>) {
    let (from, to) = (Arc::clone(from), Arc::clone(to));
    std::thread::spawn(move || {
        let mut buffer = vec![0; 70_000];
        loop {
            match rustix::io::read(&*from, &mut buffer) {
                Ok(length) => {
                    // A tap that is down loses frames, as a cable does.
                    let _ = rustix::io::write(&*to, &buffer[..length]);
                }
                Err(rustix::io::Errno::AGAIN) => {
                    let _ = poll(&mut [PollFd::new(&*from, PollFlags::IN)], None);
                }
                Err(_) => return,
            }
        }
    });
}
