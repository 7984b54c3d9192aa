//! Container logs, in the format the kubelet reads:
//! `<RFC 3339 time with nanoseconds> <stdout|stderr> <P|F> <text>\n`, where P marks a part of a line and F its end.

mod file;
mod lines;
mod progress;

pub use file::{ContainerLog, LogError, LogStream};
pub use lines::{Lines, MAX_LINE};
