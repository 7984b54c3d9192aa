//! The user a process runs as, from the image's /etc/passwd and /etc/group (passwd(5), group(5)).

use std::io::Read as _;
use std::os::fd::BorrowedFd;

use isopod_proto::agent::User;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::beneath;
use crate::error::{Context as _, Error, Result};

/// Most bytes of a passwd or group file that are read; the rest is as if it were not there.
const MAX_FILE: u64 = 4 * 1024 * 1024;
/// Most groups a process can have in Linux (NGROUPS_MAX).
const MAX_GROUPS: usize = 65536;

/// A user with everything a process needs of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplemental groups, without repetition. The first is the group id: a process that could drop it, as a set-group-id
    /// program can, would get past files that deny their group what they allow others (CVE-2022-36109).
    pub groups: Vec<u32>,
    /// Home directory, if passwd knows the user.
    pub home: Option<String>,
}

/// Resolves `user` in the container's root file system.
pub fn resolve(root: BorrowedFd<'_>, user: &User) -> Result<Identity> {
    let passwd = read_file(root, "/etc/passwd")?;
    let group = read_file(root, "/etc/group")?;
    resolve_in(&passwd, &group, user)
}

/// A file the image controls: any type, any size, or none.
fn read_file(root: BorrowedFd<'_>, path: &str) -> Result<Vec<u8>> {
    let text = || format!("read {path} of the image");
    // O_NONBLOCK: a FIFO must not make the agent wait.
    let file = match beneath::open(root, path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(text(), error)),
    };
    if beneath::file_type(&file).context(text)? != FileType::RegularFile {
        return Ok(Vec::new());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(file).take(MAX_FILE).read_to_end(&mut bytes).context(text)?;
    Ok(bytes)
}

/// The same, from the two files' contents.
pub(crate) fn resolve_in(passwd: &[u8], group: &[u8], request: &User) -> Result<Identity> {
    let User { user, supplemental_groups, strict_groups } = request;
    let (user_part, group_part) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (user.as_str(), None),
    };
    let user_part = if user_part.is_empty() { "0" } else { user_part };
    let entry = find_user(passwd, user_part);
    let uid = match (&entry, id(user_part)) {
        (Some(entry), _) => entry.uid,
        (None, Some(uid)) => uid,
        (None, None) => {
            return Err(Error::invalid(format!("the user {user_part:?} is not in the image's /etc/passwd")));
        }
    };
    let gid = match group_part {
        None | Some("") => entry.as_ref().map_or(0, |entry| entry.gid),
        Some(name) => find_group(group, name)
            .or_else(|| id(name))
            .ok_or_else(|| Error::invalid(format!("the group {name:?} is not in the image's /etc/group")))?,
    };
    let mut groups = Vec::new();
    let mut add = |gid: u32| {
        if !groups.contains(&gid) && groups.len() < MAX_GROUPS {
            groups.push(gid);
        }
    };
    add(gid);
    // With a group of its own in the request a process still has the groups of its user, unless that is asked not to be.
    if let (Some(entry), false) = (&entry, *strict_groups) {
        groups_of(group, &entry.name).for_each(&mut add);
    }
    supplemental_groups.iter().copied().for_each(&mut add);
    Ok(Identity { uid, gid, groups, home: entry.map(|entry| entry.home).filter(|home| home.starts_with('/')) })
}

struct UserEntry {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

/// The first entry with this name, or else the first with this number. A name that looks like a number is found first, as in
/// other runtimes.
fn find_user(passwd: &[u8], wanted: &str) -> Option<UserEntry> {
    let entries = || lines(passwd).filter_map(parse_user);
    entries().find(|entry| entry.name == wanted).or_else(|| {
        let uid = id(wanted)?;
        entries().find(|entry| entry.uid == uid)
    })
}

fn parse_user(line: &str) -> Option<UserEntry> {
    let mut fields = line.split(':');
    let (name, _password, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (_comment, home) = (fields.next(), fields.next().unwrap_or_default());
    Some(UserEntry { name: name.into(), uid: id(uid)?, gid: id(gid)?, home: home.into() })
}

fn find_group(group: &[u8], wanted: &str) -> Option<u32> {
    let mut entries = lines(group).filter_map(parse_group);
    entries.find(|(name, _, _)| *name == wanted).map(|(_, gid, _)| gid)
}

fn groups_of<'a>(group: &'a [u8], user: &'a str) -> impl Iterator<Item = u32> + 'a {
    lines(group)
        .filter_map(parse_group)
        .filter(move |(_, _, members)| members.split(',').any(|member| member.trim() == user))
        .map(|(_, gid, _)| gid)
}

fn parse_group(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let (name, _password, gid) = (fields.next()?, fields.next()?, fields.next()?);
    Some((name, id(gid)?, fields.next().unwrap_or_default()))
}

/// The lines that are text; others can name nobody.
fn lines(file: &[u8]) -> impl Iterator<Item = &str> {
    file.split(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// A user or group id. u32::MAX means "no change" to the kernel, so nobody can have it.
fn id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|id| digits && *id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n# comment\n\xff\xfe\nbroken:line\n\
        web:x:33:34:Web:/var/www:/bin/false\n1000:x:7:8::/odd:\nnohome:x:50:51\n";
    const GROUP: &[u8] = b"root:x:0:\nweb:x:34:\ndisk:x:6:web, root\naudio:x:29:web\naudio:x:29:web\nstaff:x:50\n";

    fn request(user: &str) -> User {
        User { user: user.into(), ..User::default() }
    }

    fn ids(user: &str) -> (u32, u32, Vec<u32>) {
        let identity = resolve_in(PASSWD, GROUP, &request(user)).unwrap();
        (identity.uid, identity.gid, identity.groups)
    }

    #[test]
    fn users_and_groups_are_found_by_name_and_number() {
        assert_eq!(ids(""), (0, 0, vec![0, 6]));
        assert_eq!(ids("web"), (33, 34, vec![34, 6, 29]));
        assert_eq!(ids("33"), (33, 34, vec![34, 6, 29]));
        assert_eq!(ids("web:staff"), (33, 50, vec![50, 6, 29]));
        assert_eq!(ids("web:77"), (33, 77, vec![77, 6, 29]));
        assert_eq!(ids("4242"), (4242, 0, vec![0]));
        assert_eq!(ids("4242:4343"), (4242, 4343, vec![4343]));
        assert_eq!(ids("1000").0, 7, "a name of digits goes before the number");
    }

    #[test]
    fn unknown_names_are_named() {
        for (user, named) in
            [("nobody", "nobody"), ("web:nogroup", "nogroup"), ("-1", "-1"), ("4294967295", "4294967295")]
        {
            let error = resolve_in(PASSWD, GROUP, &request(user)).unwrap_err();
            assert_eq!(error.kind(), isopod_proto::ErrorKind::InvalidArgument);
            assert!(error.chain().contains(named), "{}", error.chain());
        }
    }

    #[test]
    fn strict_groups_leave_the_images_out() {
        let mut user = User { supplemental_groups: vec![5, 5, 29], ..request("web") };
        assert_eq!(resolve_in(PASSWD, GROUP, &user).unwrap().groups, [34, 6, 29, 5]);
        user.strict_groups = true;
        assert_eq!(resolve_in(PASSWD, GROUP, &user).unwrap().groups, [34, 5, 29]);
    }

    #[test]
    fn home_is_known_if_passwd_knows_it() {
        let home = |user| resolve_in(PASSWD, GROUP, &request(user)).unwrap().home;
        assert_eq!(home("web").as_deref(), Some("/var/www"));
        assert_eq!(home("nohome"), None);
        assert_eq!(home("4242"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed(passwd: Vec<u8>, group: Vec<u8>, user: String) {
            let _ = resolve_in(&passwd, &group, &request(&user));
        }
    }
}
