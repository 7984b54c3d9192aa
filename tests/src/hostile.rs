//! What the fake VMM `hostile-agent` does to the daemon. A pod chooses it by its memory limit, which is all that a VMM learns of
//! its pod; any other limit is that of a real VM.

/// MiB that the limit of the first behaviour has.
const FIRST: u64 = 1000;
/// MiB between two of them: the daemon rounds to this.
const STEP: u64 = 2;
/// What the daemon adds to these limits for the guest itself (`cri-server/src/sandbox/size.rs`), in MiB: 64, and for the records of pages a
/// 64th of the limit, in steps of 2.
const OVERHEAD: u64 = 80;

/// How an agent, or its VMM, behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Never says hello.
    NoHello,
    /// Says it in bytes that mean nothing.
    RubbishHello,
    /// Says that its hello is 4 GiB long.
    HugeHello,
    /// Ends in the middle of it.
    CutHello,
    /// Answers the connection with a line that has no end.
    EndlessLine,
    /// Says hello, one byte a second.
    SlowHello,
    /// Says hello, and never another word.
    Mute,
    /// Answers what it takes to start a container, and then nothing: nor does its VMM.
    Silent,
    /// Answers with ids, names, numbers and times that cannot be.
    Lying,
    /// Sends output without end.
    Flooding,
    /// Answers more than is allowed, or than there can be.
    Bloated,
    /// Ends each stream one byte later than the one before, and every second connection at once.
    Closing,
    /// Has the pod made, and then answers nothing that a container takes.
    Idle,
}

impl Behaviour {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::NoHello,
        Self::RubbishHello,
        Self::HugeHello,
        Self::CutHello,
        Self::EndlessLine,
        Self::SlowHello,
        Self::Mute,
        Self::Silent,
        Self::Lying,
        Self::Flooding,
        Self::Bloated,
        Self::Closing,
        Self::Idle,
    ];

    /// The memory limit, in bytes, of a pod whose agent behaves so.
    pub fn memory_limit(self) -> i64 {
        ((FIRST + STEP * self as u64) << 20) as i64
    }

    /// The behaviour of a VM of so many bytes; none if it is to be a real one.
    pub fn of(memory_bytes: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|behaviour| memory_bytes == behaviour.memory_limit() as u64 + (OVERHEAD << 20))
    }
}
