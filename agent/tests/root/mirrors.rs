//! Directories of the host that are kept in the guest's memory.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use isopod_proto::agent::{
    CreateContainerRequest, IdMapping, MirrorDirectory, MirrorEntry, MirrorPart, Mount, RemoveContainerRequest,
    RemoveMirrorRequest, StartContainerRequest, UserNamespace, mirror_entry, mount,
};
use prost::Message as _;
use tonic::Code;

use crate::fixture::{Fixture, fixture, request};

const NAME: &str = "0af1";

fn entry(name: &str, mode: u32, kind: mirror_entry::Kind) -> MirrorEntry {
    MirrorEntry { name: name.into(), mode, uid: 0, gid: 33, kind: Some(kind) }
}

fn directory(name: &str, entries: Vec<MirrorEntry>) -> MirrorEntry {
    entry(name, 0o755, mirror_entry::Kind::Directory(MirrorDirectory { entries }))
}

/// A volume as the kubelet makes it, with the file `f`.
fn volume(version: &str, text: &[u8]) -> MirrorEntry {
    let link = |name: &str, target: &str| entry(name, 0o777, mirror_entry::Kind::Symlink(target.into()));
    let file = entry("f", 0o440, mirror_entry::Kind::File(text.into()));
    directory("", vec![directory(version, vec![file]), link("..data", version), link("f", "..data/f")])
}

/// Sends the mirror, read later than all before it, in parts of three bytes or, if it is large, of a megabyte.
async fn set(fixture: &mut Fixture, name: &str, create: bool, content: &[u8]) -> Result<(), tonic::Status> {
    static NOW: AtomicU64 = AtomicU64::new(1);
    set_as_of(fixture, name, create, content, NOW.fetch_add(1, Ordering::Relaxed)).await
}

async fn set_as_of(
    fixture: &mut Fixture,
    name: &str,
    create: bool,
    content: &[u8],
    read_at_nanos: u64,
) -> Result<(), tonic::Status> {
    let size = if content.len() < 10_000 { 3 } else { 1 << 20 };
    let parts = content.chunks(size).enumerate().map(|(number, part)| {
        let (name, create) = if number == 0 { (name.to_owned(), create) } else { (String::new(), false) };
        MirrorPart { name, create, content: part.to_vec(), read_at_nanos }
    });
    let parts: Vec<_> = parts.collect();
    fixture.client.set_mirror(tokio_stream::iter(parts)).await.map(drop)
}

fn mirrored(script: &str) -> CreateContainerRequest {
    let mirror = Mount {
        destination: "/config".into(),
        source: Some(mount::Source::Mirror(NAME.into())),
        readonly: true,
        ..Mount::default()
    };
    CreateContainerRequest { mounts: vec![mirror], ..request(script) }
}

#[tokio::test]
async fn root_a_mirror_is_one_for_all_containers_and_follows_its_updates() {
    let Some(mut fixture) = fixture().await else { return };
    set(&mut fixture, NAME, true, &volume("..1", b"one").encode_to_vec()).await.unwrap();
    let first = mirrored("exec sleep 100");
    let id = first.id.clone();
    fixture.client.create_container(first).await.unwrap();
    fixture.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap();
    let script = "cat /config/f; stat -Lc ' %a %u:%g' /config/f; ls -A /config; touch /config/x /config/f 2>&1 | grep -c Read-only";
    assert_eq!(fixture.exec(&id, script).await.1, "one 440 0:33\n..1\n..data\nf\n2\n");

    // The owners in a user namespace are the host's, as those of all volumes.
    let ids = vec![IdMapping { container_id: 0, guest_id: 200_000, length: 65_536 }];
    let namespace = UserNamespace { uids: ids.clone(), gids: ids };
    let second = CreateContainerRequest {
        user_namespace: Some(namespace),
        ..mirrored("cat /config/f; stat -Lc ' %u:%g' /config/f; touch /config/f 2>/dev/null || echo readonly")
    };
    assert_eq!(fixture.output_of(second).await, "one 0:33\nreadonly\n");

    set(&mut fixture, NAME, false, &volume("..2", b"two").encode_to_vec()).await.unwrap();
    assert_eq!(fixture.exec(&id, "cat /config/f; ls -A /config").await.1, "two..2\n..data\nf\n");

    // One that was overtaken by it.
    set_as_of(&mut fixture, NAME, true, &volume("..0", b"zero").encode_to_vec(), 0).await.unwrap();
    assert_eq!(fixture.exec(&id, "cat /config/f").await.1, "two");

    let remove = || RemoveMirrorRequest { name: NAME.into() };
    fixture.client.remove_container(RemoveContainerRequest { id }).await.unwrap();
    assert!(fixture.path("run/mirrors").join(NAME).exists());
    fixture.client.remove_mirror(remove()).await.unwrap();
    assert!(!fixture.path("run/mirrors").join(NAME).exists());
    fixture.client.remove_mirror(remove()).await.unwrap();
    // What is removed is not made again by an update that comes late.
    let late = set(&mut fixture, NAME, false, &volume("..3", b"three").encode_to_vec()).await.unwrap_err();
    assert_eq!(late.code(), Code::NotFound);
    set(&mut fixture, NAME, true, &volume("..4", b"four").encode_to_vec()).await.unwrap();
    assert_eq!(fixture.output_of(mirrored("cat /config/f")).await, "four");
}

#[tokio::test]
async fn root_a_mirror_is_large_at_most_and_whole_or_not_at_all() {
    let Some(mut fixture) = fixture().await else { return };
    let large = volume("..1", &vec![b'x'; 7 << 20]).encode_to_vec();
    set(&mut fixture, NAME, true, &large).await.unwrap();
    // Both states are there for a moment.
    set(&mut fixture, NAME, false, &volume("..2", &vec![b'y'; 7 << 20]).encode_to_vec()).await.unwrap();
    assert_eq!(fixture.output_of(mirrored("wc -c < /config/f; head -c 3 /config/f")).await, "7340032\nyyy");

    let error = set(&mut fixture, NAME, false, &vec![0; 10 << 20]).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    let cut = &volume("..3", b"three").encode_to_vec()[..20];
    for (name, content) in [(NAME, cut), ("../up", large.as_slice()), ("", large.as_slice())] {
        let error = set(&mut fixture, name, true, content).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    }
    assert_eq!(fs::read(fixture.path("run/mirrors").join(NAME).join("root/f")).ok(), None, "only the agent sees it");
    assert_eq!(fixture.output_of(mirrored("head -c 3 /config/f")).await, "yyy");
}
