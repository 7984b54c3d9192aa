//! The operations, by what they are about. Each reads its request to the end before it does anything.

mod attributes;
mod directories;
mod files;
mod names;
mod xattrs;
