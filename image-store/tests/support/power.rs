//! A disk that loses power: what a program did to the files below a directory, recorded by strace, and what may be left of it at
//! any moment.
//!
//! It keeps as little as POSIX allows. A name is there for certain once its directory was synced after it was made, and of the other
//! changes of names any may be lost. Of what was written to a file since its last sync any part may be lost, and the write of the
//! very moment is torn.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;
use std::process::{Command, ExitStatus};

use super::world::{Chance, Files};

/// Calls that change files, or make changes last.
const CALLS: &str = "openat,write,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,unlink,mkdir";
/// No write of a test is longer.
const LONGEST: &str = "10000000";

/// A file, whatever it is called, or a directory.
type Node = usize;

enum Change {
    /// Of names, each of which from then on is this one, or nothing.
    Names(Vec<(String, Option<Node>)>),
    Write(Node, u64, Vec<u8>),
    Length(Node, u64),
    /// What was written before change `since` lasts.
    Sync(Node, usize),
    Said(String),
}

/// What a program did, in order.
pub struct Recording {
    changes: Vec<Change>,
    /// The names of directories.
    directories: BTreeMap<Node, String>,
}

/// Runs `program` under strace, and gives what it did below `root`, and said in lines that begin with `op`.
pub fn record(program: &mut Command, root: &Path) -> (ExitStatus, Recording) {
    let trace = tempfile::NamedTempFile::new().unwrap();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-y", "-xx", "-s", LONGEST, "-e", &format!("trace={CALLS}"), "-o"]).arg(trace.path());
    strace.arg(program.get_program()).args(program.get_args());
    strace.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let status = strace.stdout(std::process::Stdio::null()).status().unwrap();
    let mut text = String::new();
    trace.reopen().unwrap().read_to_string(&mut text).unwrap();
    (status, Recorder::new(root).record(&text))
}

/// Whether this machine has what [`record`] takes.
pub fn can_record() -> bool {
    Command::new("strace").arg("-V").output().is_ok_and(|output| output.status.success())
}

struct Recorder {
    root: String,
    names: BTreeMap<String, Node>,
    /// Lengths of files, and where in them an open descriptor is; one that appends is nowhere.
    lengths: BTreeMap<Node, u64>,
    positions: BTreeMap<u32, Option<u64>>,
    next: Node,
    recording: Recording,
}

impl Recorder {
    fn new(root: &Path) -> Self {
        let recording = Recording { changes: Vec::new(), directories: BTreeMap::from([(0, String::new())]) };
        let root = root.to_str().unwrap().to_owned();
        let names = BTreeMap::from([(String::new(), 0)]);
        Self { root, names, lengths: BTreeMap::new(), positions: BTreeMap::new(), next: 1, recording }
    }

    fn record(mut self, text: &str) -> Recording {
        // What a thread has begun: with the call, how many changes there were then.
        let mut begun: BTreeMap<&str, (&str, usize)> = BTreeMap::new();
        for line in text.lines() {
            let (thread, event) = line.split_once(' ').unwrap();
            let (event, since) = (event.trim_start(), self.recording.changes.len());
            if let Some(call) = event.strip_suffix(" <unfinished ...>") {
                begun.insert(thread, (call, since));
            } else if let Some(rest) = event.strip_prefix("<... ") {
                let (call, since) = begun.remove(thread).unwrap();
                self.call(&format!("{call}{}", rest.split_once("resumed>").unwrap().1), since);
            } else if !event.starts_with(['+', '-']) {
                self.call(event, since);
            }
        }
        self.recording
    }

    /// A call that has returned, and how many changes there had been when it began.
    fn call(&mut self, call: &str, since: usize) {
        let (name, rest) = call.split_once('(').unwrap();
        let (arguments, result) = rest.rsplit_once(" = ").unwrap();
        // A call that failed has changed nothing.
        let Ok(result) = number(result).parse::<u64>() else { return };
        let arguments: Vec<&str> = arguments.trim_end().trim_end_matches(')').split(", ").collect();
        let path = |index: usize| self.below(&text(arguments[index]));
        let node = self.opened(arguments[0]);
        match (name, node) {
            ("openat", _) => {
                let Some(path) = path(1) else { return };
                self.open(path, arguments[2], result as u32);
            }
            ("mkdir", _) => {
                let Some(path) = path(0) else { return };
                let node = self.node();
                self.recording.directories.insert(node, path.clone());
                self.rename(vec![(path, Some(node))]);
            }
            ("rename", _) => {
                let (Some(from), Some(to)) = (path(0), path(1)) else { return };
                let node = self.names[&from];
                self.rename(vec![(from, None), (to, Some(node))]);
            }
            ("unlink", _) => {
                let Some(path) = path(0) else { return };
                self.rename(vec![(path, None)]);
            }
            ("write", None) if arguments[0].starts_with("1<") => {
                let said = text(arguments[1]);
                let lines = said.lines().filter(|line| line.starts_with("op ")).map(str::to_owned);
                self.recording.changes.extend(lines.map(Change::Said));
            }
            ("write" | "pwrite64", Some(node)) => {
                let mut data = bytes(arguments[1]);
                data.truncate(result as usize);
                let descriptor = number(arguments[0]).parse().unwrap();
                self.write(node, descriptor, arguments.get(3).map(|at| at.parse().unwrap()), data);
            }
            ("ftruncate", Some(node)) => {
                let length = arguments[1].parse().unwrap();
                self.lengths.insert(node, length);
                self.recording.changes.push(Change::Length(node, length));
            }
            ("fsync" | "fdatasync", Some(node)) => self.recording.changes.push(Change::Sync(node, since)),
            (_, None) => {}
            (call, Some(_)) => panic!("what does {call} change?"),
        }
    }

    fn node(&mut self) -> Node {
        self.next += 1;
        self.next - 1
    }

    fn open(&mut self, path: String, flags: &str, descriptor: u32) {
        let known = self.names.get(&path).copied();
        if flags.contains("O_CREAT") && known.is_none() {
            let node = self.node();
            self.lengths.insert(node, 0);
            self.rename(vec![(path, Some(node))]);
        } else if let (Some(node), true) = (known, flags.contains("O_TRUNC")) {
            self.lengths.insert(node, 0);
            self.recording.changes.push(Change::Length(node, 0));
        }
        self.positions.insert(descriptor, (!flags.contains("O_APPEND")).then_some(0));
    }

    fn rename(&mut self, names: Vec<(String, Option<Node>)>) {
        for (name, node) in &names {
            match node {
                Some(node) => drop(self.names.insert(name.clone(), *node)),
                None => drop(self.names.remove(name)),
            }
        }
        self.recording.changes.push(Change::Names(names));
    }

    fn write(&mut self, node: Node, descriptor: u32, at: Option<u64>, data: Vec<u8>) {
        let length = self.lengths.get_mut(&node).unwrap();
        let end = |at: u64| at + data.len() as u64;
        let at = match (at, self.positions.get_mut(&descriptor)) {
            (Some(at), _) => at,
            (None, Some(Some(position))) => std::mem::replace(position, end(*position)),
            (None, _) => *length,
        };
        *length = end(at).max(*length);
        self.recording.changes.push(Change::Write(node, at, data));
    }

    /// A path, as it is below the root.
    fn below(&self, path: &str) -> Option<String> {
        let rest = path.strip_prefix(&self.root)?;
        if rest.is_empty() { Some(String::new()) } else { Some(rest.strip_prefix('/')?.to_owned()) }
    }

    /// What an open descriptor is of: its number, and its path in angle brackets. Nothing, if that has no name below the root.
    fn opened(&self, descriptor: &str) -> Option<Node> {
        let (_, path) = descriptor.split_once('<')?;
        self.names.get(&self.below(&text(path.trim_end_matches('>')))?).copied()
    }
}

/// The digits that `text` begins with.
fn number(text: &str) -> &str {
    &text[..text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len())]
}

/// What strace shows as `\x61\x62`, in quotation marks or not.
fn bytes(shown: &str) -> Vec<u8> {
    let digits = shown.trim_matches('"').split("\\x").skip(1);
    digits.map(|digits| u8::from_str_radix(&digits[..2], 16).unwrap()).collect()
}

fn text(shown: &str) -> String {
    String::from_utf8_lossy(&bytes(shown)).into_owned()
}

impl Recording {
    /// How many moments there are at which power can be lost.
    pub fn moments(&self) -> usize {
        self.changes.len() + 1
    }

    /// How many lines were said before `moment`.
    pub fn said(&self, moment: usize) -> usize {
        self.changes[..moment].iter().filter(|change| matches!(change, Change::Said(_))).count()
    }

    /// The files and directories that are left if power is lost at `moment`; chance decides on what does not last.
    pub fn left(&self, moment: usize, chance: &mut Chance) -> (Files, BTreeSet<String>) {
        let names = self.names(moment, chance);
        let mut contents: BTreeMap<Node, Vec<u8>> = BTreeMap::new();
        for (index, change) in self.changes[..moment].iter().enumerate() {
            let (Change::Write(node, ..) | Change::Length(node, _)) = change else { continue };
            let content = contents.entry(*node).or_default();
            let (lasts, last) = (self.is_synced(*node, index, moment), index + 1 == moment);
            match change {
                Change::Write(_, at, data) if lasts || last || chance.yes() => {
                    let torn = if last && !lasts { chance.below(data.len() + 1) } else { data.len() };
                    let (at, end) = (*at as usize, *at as usize + torn);
                    content.resize(content.len().max(end), 0);
                    content[at..end].copy_from_slice(&data[..torn]);
                }
                Change::Length(_, length) if lasts || chance.yes() => content.resize(*length as usize, 0),
                _ => {}
            }
        }
        let (mut files, mut directories) = (Files::new(), BTreeSet::new());
        for (name, node) in &names {
            // A name in a directory that has none is lost.
            if !parents(name).all(|parent| names.contains_key(parent)) {
                continue;
            }
            match self.directories.contains_key(node) {
                true => drop(directories.insert(name.clone())),
                false => drop(files.insert(name.clone(), contents.remove(node).unwrap_or_default())),
            }
        }
        (files, directories)
    }

    /// Whether change `index` of a file's content lasts at `moment`.
    fn is_synced(&self, node: Node, index: usize, moment: usize) -> bool {
        self.changes[index..moment]
            .iter()
            .any(|change| matches!(change, Change::Sync(synced, since) if *synced == node && *since > index))
    }

    fn names(&self, moment: usize, chance: &mut Chance) -> BTreeMap<String, Node> {
        let mut names = BTreeMap::new();
        for (index, change) in self.changes[..moment].iter().enumerate() {
            let Change::Names(changed) = change else { continue };
            let lasts = changed.iter().any(|(name, _)| {
                let parent = parents(name).next().unwrap_or_default();
                let directory = self.directories.iter().find(|(_, directory)| *directory == parent);
                directory.is_some_and(|(node, _)| self.is_synced(*node, index, moment))
            });
            if !lasts && !chance.yes() {
                continue;
            }
            for (name, node) in changed {
                match node {
                    Some(node) => drop(names.insert(name.clone(), *node)),
                    None => drop(names.remove(name)),
                }
            }
        }
        names
    }
}

/// The directories that `path` is in, the nearest first, without the root.
fn parents(path: &str) -> impl Iterator<Item = &str> {
    Path::new(path).ancestors().skip(1).filter_map(Path::to_str).filter(|parent| !parent.is_empty())
}
