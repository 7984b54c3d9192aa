//! Frames of SPDY/3.1 (draft-mbelshe-httpbis-spdy-00, section 2.2 and 2.6): bytes in, frames out, and back. No I/O.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Most bytes of a control frame behind its first eight. Clients send headers of some hundred bytes.
pub const MAX_CONTROL: usize = 32 * 1024;
/// Bytes before the contents of every frame.
const PREFIX: usize = 8;
const VERSION: u16 = 3;
const FLAG_FIN: u8 = 0x01;
/// The highest bit of a stream's number is reserved.
const ID_MASK: u32 = 0x7fff_ffff;

/// RST_STREAM: the stream is not taken.
pub const REFUSED_STREAM: u32 = 3;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// What a client sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A new stream, with its compressed headers.
    SynStream {
        /// Its number.
        id: u32,
        /// The client will send nothing on it.
        fin: bool,
        /// Compressed headers.
        block: Bytes,
    },
    /// SYN_REPLY or HEADERS: compressed headers that mean nothing to us, yet change the state of the compression.
    OtherHeaders {
        /// Compressed headers.
        block: Bytes,
    },
    /// A part of the contents of a DATA frame; `fin` only on the last part.
    Data {
        /// The stream.
        id: u32,
        /// Contents; may be empty.
        bytes: Bytes,
        /// The client will send no more on it.
        fin: bool,
    },
    /// The client is done with a stream, in both directions.
    Reset {
        /// The stream.
        id: u32,
    },
    /// To be answered with the same.
    Ping {
        /// The client's number for it.
        id: u32,
    },
    /// The client opens no further streams.
    GoAway,
    /// SETTINGS and WINDOW_UPDATE: the clients that there are do no flow control.
    Ignored,
}

/// Bytes that are not SPDY/3.1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another version.
    #[error("a control frame of SPDY version {0}")]
    Version(u16),
    /// A frame the protocol does not have.
    #[error("a control frame of the unknown type {0}")]
    Kind(u16),
    /// A control frame with a length that it cannot have.
    #[error("a control frame of type {kind} with {length} bytes")]
    Length {
        /// The type.
        kind: u16,
        /// Its length.
        length: usize,
    },
}

/// Finds the frames in a stream of bytes. It keeps less than a control frame of what it was given and has not handed out.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    /// The DATA frame whose contents are due: its stream, how many bytes, and whether it is the last.
    data: Option<(u32, usize, bool)>,
}

impl Decoder {
    /// Adds bytes. All frames in what came before should have been taken.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame, or part of one; none if more bytes are needed. After an error there is no way on.
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.data.is_some() {
            return Ok(self.next_data());
        }
        let Some(prefix) = self.buffer.first_chunk::<PREFIX>() else { return Ok(None) };
        let [a, b, c, d, flags, high, middle, low] = *prefix;
        let length = u32::from_be_bytes([0, high, middle, low]) as usize;
        if a & 0x80 == 0 {
            self.buffer.advance(PREFIX);
            self.data = Some((u32::from_be_bytes([a, b, c, d]), length, flags & FLAG_FIN != 0));
            return Ok(self.next_data());
        }
        let (version, kind) = (u16::from_be_bytes([a & 0x7f, b]), u16::from_be_bytes([c, d]));
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(FrameError::Length { kind, length });
        }
        if self.buffer.len() < PREFIX + length {
            return Ok(None);
        }
        self.buffer.advance(PREFIX);
        control(kind, flags, self.buffer.split_to(length).freeze()).map(Some)
    }

    fn next_data(&mut self) -> Option<Frame> {
        let (id, left, last) = self.data?;
        if left > 0 && self.buffer.is_empty() {
            return None;
        }
        let bytes = self.buffer.split_to(left.min(self.buffer.len())).freeze();
        let left = left - bytes.len();
        self.data = (left > 0).then_some((id, left, last));
        Some(Frame::Data { id, bytes, fin: last && left == 0 })
    }
}

fn control(kind: u16, flags: u8, mut contents: Bytes) -> Result<Frame, FrameError> {
    let length = contents.len();
    let (least, most) = match kind {
        SYN_STREAM => (10, MAX_CONTROL),
        SYN_REPLY | HEADERS | SETTINGS => (4, MAX_CONTROL),
        RST_STREAM | GOAWAY | WINDOW_UPDATE => (8, 8),
        PING => (4, 4),
        _ => return Err(FrameError::Kind(kind)),
    };
    if !(least..=most).contains(&length) {
        return Err(FrameError::Length { kind, length });
    }
    if matches!(kind, GOAWAY | SETTINGS | WINDOW_UPDATE) {
        return Ok(if kind == GOAWAY { Frame::GoAway } else { Frame::Ignored });
    }
    let id = contents.get_u32();
    Ok(match kind {
        SYN_STREAM => {
            contents.advance(6); // The associated stream, the priority and the credential slot.
            Frame::SynStream { id: id & ID_MASK, fin: flags & FLAG_FIN != 0, block: contents }
        }
        RST_STREAM => Frame::Reset { id: id & ID_MASK },
        PING => Frame::Ping { id },
        _ => Frame::OtherHeaders { block: contents },
    })
}

fn put_control(out: &mut BytesMut, kind: u16, contents: &[&[u8]]) {
    let length: usize = contents.iter().map(|part| part.len()).sum();
    debug_assert!(length <= MAX_CONTROL);
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u32(length as u32);
    contents.iter().for_each(|part| out.put_slice(part));
}

/// Appends a SYN_REPLY with these compressed headers.
pub fn put_reply(out: &mut BytesMut, id: u32, block: &[u8]) {
    put_control(out, SYN_REPLY, &[&id.to_be_bytes(), block]);
}

/// Appends a RST_STREAM.
pub fn put_reset(out: &mut BytesMut, id: u32, status: u32) {
    put_control(out, RST_STREAM, &[&id.to_be_bytes(), &status.to_be_bytes()]);
}

/// Appends a PING.
pub fn put_ping(out: &mut BytesMut, id: u32) {
    put_control(out, PING, &[&id.to_be_bytes()]);
}

/// Appends a GOAWAY with status OK; `last` is the last stream that was taken.
pub fn put_go_away(out: &mut BytesMut, last: u32) {
    put_control(out, GOAWAY, &[&last.to_be_bytes(), &[0; 4]]);
}

/// Appends a DATA frame with fewer than 16 MiB.
pub fn put_data(out: &mut BytesMut, id: u32, bytes: &[u8], fin: bool) {
    debug_assert!(bytes.len() < 1 << 24);
    let flags = if fin { FLAG_FIN } else { 0 };
    out.put_u32(id & ID_MASK);
    out.put_u32(u32::from(flags) << 24 | bytes.len() as u32);
    out.put_slice(bytes);
}

/// What a client sends to open a stream.
#[cfg(any(test, feature = "fuzzing"))]
pub fn put_syn_stream(out: &mut BytesMut, id: u32, block: &[u8]) {
    put_control(out, SYN_STREAM, &[&id.to_be_bytes(), &[0; 6], block]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(decoder: &mut Decoder) -> Result<Vec<Frame>, FrameError> {
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next()? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[test]
    fn frames_have_the_bytes_of_the_specification() {
        let mut out = BytesMut::new();
        put_ping(&mut out, 7);
        assert_eq!(&out[..], b"\x80\x03\x00\x06\x00\x00\x00\x04\x00\x00\x00\x07");
        out.clear();
        put_data(&mut out, 5, b"ab", true);
        assert_eq!(&out[..], b"\x00\x00\x00\x05\x01\x00\x00\x02ab");
        out.clear();
        put_reset(&mut out, 3, REFUSED_STREAM);
        assert_eq!(&out[..], b"\x80\x03\x00\x03\x00\x00\x00\x08\x00\x00\x00\x03\x00\x00\x00\x03");
    }

    #[test]
    fn what_is_not_the_protocol_is_refused() {
        let refused = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            all(&mut decoder).expect_err("refused")
        };
        assert_eq!(refused(b"\x80\x02\x00\x06\x00\x00\x00\x04"), FrameError::Version(2));
        assert_eq!(refused(b"\x80\x03\x00\x63\x00\x00\x00\x00"), FrameError::Kind(99));
        assert_eq!(refused(b"\x80\x03\x00\x06\x00\x00\x00\x03xxx"), FrameError::Length { kind: 6, length: 3 });
        let long = FrameError::Length { kind: 1, length: 0xff_ffff };
        assert_eq!(refused(b"\x80\x03\x00\x01\x00\xff\xff\xff"), long);
    }

    proptest! {
        #[test]
        fn any_bytes_give_frames_or_an_error_and_little_is_kept(
            bytes in proptest::collection::vec(any::<u8>(), 0..4000),
            cuts in proptest::collection::vec(1usize..700, 1..20),
        ) {
            let mut decoder = Decoder::default();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.push(now);
                rest = later;
                if all(&mut decoder).is_err() {
                    break;
                }
                prop_assert!(decoder.buffer.len() <= PREFIX + MAX_CONTROL);
            }
        }

        #[test]
        fn data_arrives_whole_however_it_is_cut(
            contents in proptest::collection::vec(any::<u8>(), 0..3000),
            cut in 1usize..500,
            fin in any::<bool>(),
        ) {
            let mut out = BytesMut::new();
            put_data(&mut out, 9, &contents, fin);
            put_ping(&mut out, 1);
            let mut decoder = Decoder::default();
            let (mut taken, mut ended, mut pinged) = (Vec::new(), false, false);
            for piece in out.chunks(cut) {
                decoder.push(piece);
                for frame in all(&mut decoder).expect("valid") {
                    match frame {
                        Frame::Data { id: 9, bytes, fin } => {
                            prop_assert!(!ended);
                            taken.extend_from_slice(&bytes);
                            ended = fin;
                        }
                        Frame::Ping { id: 1 } => pinged = true,
                        other => prop_assert!(false, "{other:?}"),
                    }
                }
            }
            prop_assert_eq!((taken, ended, pinged), (contents, fin, true));
        }
    }
}
