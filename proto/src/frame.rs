//! Length-prefixed messages: a u32, little endian, then that many bytes of protobuf.

use prost::Message;

/// Bytes that are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length says more than is allowed here.
    #[error("a message of {length} bytes is longer than the {limit} allowed")]
    TooLong {
        /// What the prefix says.
        length: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The bytes are not the protobuf they should be.
    #[error("a message of {length} bytes cannot be decoded")]
    Malformed {
        /// Bytes in the message.
        length: usize,
        /// Why.
        #[source]
        source: prost::DecodeError,
    },
}

/// The bytes of `message` with its length before it.
pub fn encode_frame(message: &impl Message) -> Vec<u8> {
    let length = u32::try_from(message.encoded_len()).expect("our own messages are below 4 GiB");
    let mut frame = Vec::with_capacity(4 + message.encoded_len());
    frame.extend_from_slice(&length.to_le_bytes());
    message.encode(&mut frame).expect("a Vec grows as needed");
    frame
}

/// Takes one message from the front of `bytes`. `Ok(None)`: more bytes are needed. Otherwise the message, and how many bytes
/// it took. `limit` bounds the message without its prefix.
pub fn decode_frame<M: Message + Default>(bytes: &[u8], limit: usize) -> Result<Option<(M, usize)>, FrameError> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*prefix) as usize;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    let message = M::decode(body).map_err(|source| FrameError::Malformed { length, source })?;
    Ok(Some((message, 4 + length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Hello;

    #[test]
    fn a_frame_is_read_back_once_it_is_whole() {
        let hello = Hello { agent_version: "x".into(), ..Hello::default() };
        let mut bytes = encode_frame(&hello);
        bytes.push(0xff);
        for cut in 0..bytes.len() - 1 {
            assert!(decode_frame::<Hello>(&bytes[..cut], 100).expect("only short").is_none());
        }
        let (read, used) = decode_frame::<Hello>(&bytes, 100).expect("valid").expect("whole");
        assert_eq!((read, used), (hello, bytes.len() - 1));
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_before_it_arrives() {
        assert!(matches!(
            decode_frame::<Hello>(&101u32.to_le_bytes(), 100),
            Err(FrameError::TooLong { length: 101, limit: 100 })
        ));
    }
}
