//! Writing replies.

use rustix::fs::Statx;

/// Bytes of struct fuse_out_header.
const HEADER: usize = 16;

/// struct fuse_attr, as far as the host gives it.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// The number of the file, made unique over all file systems of the shares.
    pub inode: u64,
    /// Everything else.
    pub stat: Statx,
}

/// A reply that is being written. It is kept and filled again for each request.
#[derive(Debug, Default)]
pub struct Reply(Vec<u8>);

impl Reply {
    /// Begins a reply.
    pub fn begin(&mut self) {
        self.0.clear();
        self.0.resize(HEADER, 0);
    }

    /// Completes the reply to the request `unique`; an error takes the place of what was written.
    pub fn finish(&mut self, unique: u64, result: rustix::io::Result<()>) -> &[u8] {
        let error = match result {
            Ok(()) => 0,
            Err(errno) => {
                self.0.truncate(HEADER);
                -errno.raw_os_error()
            }
        };
        let length = u32::try_from(self.0.len()).expect("a reply is bounded by what one request asks for");
        self.0[..4].copy_from_slice(&length.to_le_bytes());
        self.0[4..8].copy_from_slice(&error.to_le_bytes());
        self.0[8..16].copy_from_slice(&unique.to_le_bytes());
        &self.0
    }

    /// Bytes of the body so far.
    pub fn len(&self) -> usize {
        self.0.len() - HEADER
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Appends a u32.
    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Appends a u64.
    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// Appends up to `limit` bytes, which `fill` puts into the buffer it is given; it returns how many.
    pub fn fill(
        &mut self,
        limit: usize,
        fill: impl FnOnce(&mut [u8]) -> rustix::io::Result<usize>,
    ) -> rustix::io::Result<usize> {
        let before = self.0.len();
        self.0.resize(before + limit, 0);
        let count = fill(&mut self.0[before..]);
        self.0.truncate(before + count.unwrap_or(0).min(limit));
        count
    }

    /// struct fuse_entry_out. Neither the name nor the attributes may be kept: the host changes both without a word.
    pub fn entry(&mut self, node: u64, attributes: &Attributes) {
        self.u64(node);
        // generation: a number is never given to another file, see `Nodes`.
        self.u64(0);
        // entry_valid, attr_valid and their nanoseconds.
        self.bytes(&[0; 24]);
        self.attributes(attributes);
    }

    /// struct fuse_attr_out.
    pub fn attr_out(&mut self, attributes: &Attributes) {
        self.bytes(&[0; 16]);
        self.attributes(attributes);
    }

    /// struct fuse_open_out.
    pub fn open(&mut self, handle: u64, flags: u32) {
        self.u64(handle);
        self.u32(flags);
        self.u32(0);
    }

    /// struct fuse_attr.
    fn attributes(&mut self, Attributes { inode, stat }: &Attributes) {
        self.u64(*inode);
        self.u64(stat.stx_size);
        self.u64(stat.stx_blocks);
        let times = [&stat.stx_atime, &stat.stx_mtime, &stat.stx_ctime];
        times.iter().for_each(|time| self.bytes(&time.tv_sec.to_le_bytes()));
        times.iter().for_each(|time| self.u32(time.tv_nsec));
        self.u32(stat.stx_mode.into());
        self.u32(stat.stx_nlink);
        self.u32(stat.stx_uid);
        self.u32(stat.stx_gid);
        self.u32(rdev(stat));
        self.u32(stat.stx_blksize);
        // flags
        self.u32(0);
    }

    /// struct fuse_dirent, padded, if it fits into a body of `limit` bytes.
    pub fn directory_entry(&mut self, limit: usize, inode: u64, next: u64, kind: u32, name: &[u8]) -> bool {
        const DIRENT: usize = 24;
        let padded = (DIRENT + name.len()).next_multiple_of(8);
        if self.len() + padded > limit {
            return false;
        }
        self.u64(inode);
        self.u64(next);
        self.u32(name.len() as u32);
        self.u32(kind);
        self.bytes(name);
        self.bytes(&[0; 7][..padded - DIRENT - name.len()]);
        true
    }
}

/// new_encode_dev of the kernel.
fn rdev(stat: &Statx) -> u32 {
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}
