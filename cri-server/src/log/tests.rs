use proptest::prelude::*;
use time::format_description::well_known::Rfc3339;

use super::*;

/// An entry as the kubelet reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    stream: String,
    tag: String,
    content: Vec<u8>,
}

fn new_log() -> (tempfile::TempDir, PathBuf, ContainerLog) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("pod/container/0.log");
    let log = ContainerLog::create(&path).expect("a log");
    (directory, path, log)
}

fn read(path: &Path) -> Vec<Entry> {
    let bytes = std::fs::read(path).expect("the log");
    assert!(bytes.is_empty() || bytes.ends_with(b"\n"), "the last entry is torn");
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    lines.map(|line| parse(&line[..line.len() - 1])).collect()
}

fn parse(line: &[u8]) -> Entry {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let mut text = || String::from_utf8(fields.next().expect("a field").to_vec()).expect("UTF-8");
    let (time, stream, tag) = (text(), text(), text());
    OffsetDateTime::parse(&time, &Rfc3339).expect("a time");
    assert_eq!(time.len(), "2006-01-02T15:04:05.000000000Z".len());
    Entry { stream, tag, content: fields.next().expect("content").to_vec() }
}

fn entries(input: &[u8], sizes: &[usize]) -> Vec<Entry> {
    let (_directory, path, log) = new_log();
    let mut writer = log.writer(LogStream::Stdout);
    let (mut rest, mut sizes) = (input, sizes.iter().copied().cycle());
    while !rest.is_empty() {
        let (now, later) = rest.split_at(sizes.next().unwrap_or(rest.len()).clamp(1, rest.len()));
        writer.write(now).expect("written");
        assert!(writer.pending() <= MAX_CONTENT + 1);
        rest = later;
    }
    writer.finish().expect("finished");
    read(&path)
}

fn entry(tag: &str, content: &[u8]) -> Entry {
    Entry { stream: "stdout".to_owned(), tag: tag.to_owned(), content: content.to_vec() }
}

/// What a reader shows: entries joined, a line's end behind each `F`.
fn shown(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        bytes.extend_from_slice(&entry.content);
        if entry.tag == "F" {
            bytes.push(b'\n');
        }
    }
    bytes
}

/// The input with `\r\n` as `\n`.
fn plain(input: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in input.split_inclusive(|byte| *byte == b'\n') {
        match line.strip_suffix(b"\r\n") {
            Some(content) => bytes.extend_from_slice(&[content, b"\n"].concat()),
            None => bytes.extend_from_slice(line),
        }
    }
    bytes
}

/// Text in which lines' ends, carriage returns and lengths around the limit are frequent.
fn output() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..40),
        3 => Just(b"\n".to_vec()),
        2 => Just(b"\r".to_vec()),
        2 => Just(b"\r\n".to_vec()),
        2 => (MAX_CONTENT - 3..MAX_CONTENT + 4).prop_map(|length| vec![b'x'; length]),
        1 => Just(vec![b'y'; 2 * MAX_CONTENT]),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn output_is_shown_as_written_however_it_arrives(
        input in output(),
        sizes in prop::collection::vec(1..20_000usize, 1..5),
    ) {
        let whole = entries(&input, &[]);
        prop_assert_eq!(&entries(&input, &sizes), &whole);
        prop_assert_eq!(shown(&whole), plain(&input));
        for (index, entry) in whole.iter().enumerate() {
            let last = index + 1 == whole.len();
            prop_assert!(entry.content.len() <= MAX_CONTENT);
            prop_assert!(entry.tag == "F" || entry.content.len() == MAX_CONTENT || last);
        }
    }
}

#[test]
fn lines_arriving_byte_by_byte_are_entries() {
    let found = entries(b"one\r\n\ntwo\rthree\nrest", &[1]);
    assert_eq!(found, [entry("F", b"one"), entry("F", b""), entry("F", b"two\rthree"), entry("P", b"rest")]);
}

#[test]
fn a_line_of_just_the_limit_is_one_entry() {
    let full = vec![b'x'; MAX_CONTENT];
    assert_eq!(entries(&[&full[..], b"\r\n"].concat(), &[]), [entry("F", &full)]);
    // The line's end arrives in two pieces.
    assert_eq!(entries(&[&full[..], b"\r\n"].concat(), &[MAX_CONTENT + 1]), [entry("F", &full)]);
    assert_eq!(entries(&full, &[]), [entry("P", &full)]);
    assert_eq!(entries(&[&full[..], b"y\n"].concat(), &[]), [entry("P", &full), entry("F", b"y")]);
    assert_eq!(entries(&[&full[..], b"\r"].concat(), &[]), [entry("P", &full), entry("P", b"\r")]);
}

#[test]
fn the_form_of_an_entry_is_the_kubelets() {
    let mut out = Vec::new();
    let time = OffsetDateTime::from_unix_timestamp_nanos(1_475_712_123_004_050_060).expect("a time");
    append(&mut out, time, LogStream::Stderr, Tag::Partial, b"text");
    assert_eq!(out, b"2016-10-06T00:02:03.004050060Z stderr P text\n");
}

#[test]
fn what_has_no_end_yet_is_pending_and_not_in_the_file() {
    let (_directory, path, log) = new_log();
    let mut writer = log.writer(LogStream::Stderr);
    writer.write(b"done\nhalf").expect("written");
    assert_eq!((writer.pending(), read(&path).len()), (4, 1));
    writer.finish().expect("finished");
    writer.finish().expect("nothing more to do");
    assert_eq!((writer.pending(), read(&path).len()), (0, 2));
}

#[test]
fn an_existing_log_is_continued() {
    let (_directory, path, log) = new_log();
    log.writer(LogStream::Stdout).write(b"before\n").expect("written");
    let log = ContainerLog::create(&path).expect("it exists");
    log.writer(LogStream::Stdout).write(b"after\n").expect("written");
    assert_eq!(read(&path), [entry("F", b"before"), entry("F", b"after")]);
}

#[test]
fn a_failed_reopen_leaves_the_old_file_in_use() {
    let (directory, path, log) = new_log();
    let moved = directory.path().join("moved");
    std::fs::rename(&path, &moved).expect("renamed");
    std::fs::create_dir(&path).expect("in the way");
    assert!(matches!(log.reopen(), Err(LogError::Open { .. })));
    log.writer(LogStream::Stdout).write(b"still here\n").expect("written");
    assert_eq!(read(&moved), [entry("F", b"still here")]);
}

#[test]
fn a_fifo_in_the_files_place_does_not_block() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).expect("a FIFO");
    assert!(matches!(ContainerLog::create(&path), Err(LogError::Open { .. })));
}

#[test]
fn a_write_to_a_full_disk_fails_and_the_writer_goes_on() {
    let log = ContainerLog::create(Path::new("/dev/full")).expect("opened");
    let mut writer = log.writer(LogStream::Stdout);
    let error = writer.write(b"lost\nhalf").expect_err("full");
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert_eq!(writer.pending(), 4);
}

#[test]
fn entries_are_whole_and_in_order_with_both_streams_writing_and_a_rotation_going_on() {
    const LINES: usize = 3000;
    const ROTATIONS: usize = 20;
    let (directory, path, log) = new_log();
    let write = |stream| {
        let mut writer = log.writer(stream);
        move || {
            for line in 0..LINES {
                writer.write(format!("{line} {}\n", "x".repeat(line % 300)).as_bytes()).expect("written");
            }
        }
    };
    let rotated = |number: usize| directory.path().join(number.to_string());
    std::thread::scope(|scope| {
        scope.spawn(write(LogStream::Stdout));
        scope.spawn(write(LogStream::Stderr));
        for number in 0..ROTATIONS {
            std::fs::rename(&path, rotated(number)).expect("renamed");
            log.reopen().expect("reopened");
            assert!(path.exists());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    });
    let mut all: Vec<Entry> = (0..ROTATIONS).flat_map(|number| read(&rotated(number))).collect();
    all.extend(read(&path));
    for stream in ["stdout", "stderr"] {
        let of_stream = all.iter().filter(|entry| entry.stream == stream);
        let numbers = of_stream.map(|entry| {
            let text = String::from_utf8(entry.content.clone()).expect("UTF-8");
            text.split(' ').next().and_then(|number| number.parse::<usize>().ok()).expect("a number")
        });
        assert!(numbers.eq(0..LINES), "{stream}");
    }
}

#[test]
fn entries_after_a_reopen_are_in_the_new_file_only() {
    let (directory, path, log) = new_log();
    let (moved, mut writer) = (directory.path().join("moved"), log.writer(LogStream::Stdout));
    writer.write(b"one\ntw").expect("written");
    std::fs::rename(&path, &moved).expect("renamed");
    log.reopen().expect("reopened");
    assert_eq!(read(&path), []);
    writer.write(b"o\n").expect("written");
    assert_eq!(read(&moved), [entry("F", b"one")]);
    assert_eq!(read(&path), [entry("F", b"two")]);
}

#[test]
fn what_a_failed_write_left_of_an_entry_is_taken_back() {
    let (_directory, path, log) = new_log();
    log.write(b"2016-10-06T00:02:03.004050060Z stdout F whole\n2016-").expect("written");
    take_back(&log.0.file.lock(), 5);
    log.writer(LogStream::Stdout).write(b"next\n").expect("written");
    assert_eq!(read(&path), [entry("F", b"whole"), entry("F", b"next")]);
}
