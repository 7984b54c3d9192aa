//! Entry points for the fuzzer (`fuzz/`): texts of the guest's kernel and of images, and what the daemon asks for.

use isopod_proto::agent::{CreateContainerRequest, MirrorEntry, Process, User};
use isopod_proto::{MAX_AGENT_MESSAGE, MAX_MIRROR_BYTES, decode_frame};
use prost::Message;

use crate::container::plan;
use crate::layout::Layout;
use crate::limits;
use crate::mirror::entry::Tree;
use crate::stats::text;
use crate::stub::message::Report;
use crate::sysctl;
use crate::users;

/// Counters as the kernel prints them.
pub fn counters(input: &[u8]) {
    let Ok(input) = std::str::from_utf8(input) else { return };
    for limit in [text::limit(input), text::cpu_max(input).0].into_iter().flatten() {
        assert!(limit >= -1);
    }
    let _ = (text::pressure(input), text::device_lines(input), text::open_files_limit(input));
    let _ = (text::device_name(input), text::interfaces(input), text::meminfo(input, "MemTotal"));
    let _ = text::Keyed::new(input.to_owned()).number("anon");
}

/// An image's passwd, its group, and the user that is looked for: separated by NUL bytes.
pub fn users(input: &[u8]) {
    let mut parts = input.split(|byte| *byte == 0);
    let (user, passwd, group) = (parts.next(), parts.next(), parts.next());
    let user = String::from_utf8_lossy(user.unwrap_or_default()).into_owned();
    for strict_groups in [false, true] {
        let request = User { user: user.clone(), supplemental_groups: vec![7, 7], strict_groups };
        if let Ok(identity) = users::resolve_in(passwd.unwrap_or_default(), group.unwrap_or_default(), &request) {
            assert_eq!(identity.groups.first(), Some(&identity.gid));
            assert!(identity.home.is_none_or(|home| home.starts_with('/')));
        }
    }
}

/// The contents of a mirror.
pub fn mirror(input: &[u8]) {
    let Ok(root) = MirrorEntry::decode(input) else { return };
    if let Ok(tree) = Tree::check(root) {
        assert!(tree.entries.len() <= MAX_MIRROR_BYTES);
    }
}

/// Requests of the daemon, and reports of a stub.
pub fn requests(input: &[u8]) {
    let _ = decode_frame::<Report>(input, MAX_AGENT_MESSAGE);
    if let Ok(text) = std::str::from_utf8(input)
        && let Ok(path) = sysctl::path_of(text)
    {
        assert!(!path.starts_with('/') && !path.split('/').any(|part| part == ".."), "{path:?}");
    }
    let Ok(request) = CreateContainerRequest::decode(input) else { return };
    let process = request.process.clone().unwrap_or_default();
    check(&process);
    let layout = Layout::new("/run/isopod", "/sys/fs/cgroup/pod");
    let sources = vec![Some("/run/isopod/x".to_owned()); request.mounts.len()];
    for mount in plan::mounts(&request, &layout, &sources).into_iter().flatten() {
        let destination = &mount.destination;
        assert!(destination.starts_with('/') && !destination.split('/').any(|part| part == ".."), "{destination:?}");
    }
}

fn check(process: &Process) {
    let _ = limits::capability_bits(&process.capabilities.clone().unwrap_or_default());
}
