//! Header blocks of SPDY/3 (section 2.6.10): names and values, compressed with one zlib stream a direction, which begins with a
//! dictionary that both sides know. No I/O.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Most bytes of a block after decompression.
const MAX_BLOCK: usize = 16 * 1024;
/// Most headers in a block.
const MAX_HEADERS: u32 = 64;

/// The words of the dictionary; each is in it with its length, as a u32, before it.
const WORDS: [&str; 65] = [
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];
/// What follows them.
const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Au\
     thoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidd\
     en404 Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr Ma\
     y Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,imag\
     e/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicpri\
     vatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in WORDS {
        bytes.extend_from_slice(&(word.len() as u32).to_be_bytes());
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.extend_from_slice(TEXT.as_bytes());
    bytes
}

/// Headers in the order they came; names are in lower case.
pub type Headers = Vec<(String, String)>;

/// Bytes that are not a block of headers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The compression.
    #[error("headers that cannot be decompressed")]
    Compression,
    /// Too many bytes or headers.
    #[error("headers of more than {MAX_BLOCK} bytes or {MAX_HEADERS} names")]
    TooMany,
    /// The lengths do not fit the bytes, or it is no text.
    #[error("malformed headers")]
    Malformed,
}

/// What the client's blocks are decompressed with.
#[derive(Debug)]
pub struct Decompressor(Decompress);

impl Default for Decompressor {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Decompressor {
    /// The headers in the connection's next block. After an error the connection is of no use.
    pub fn read(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        parse(&self.decompress(block)?)
    }

    fn decompress(&mut self, block: &[u8]) -> Result<Vec<u8>, HeaderError> {
        // One byte more than is allowed tells what is too long.
        let mut bytes = vec![0; MAX_BLOCK + 1];
        let (first_in, first_out) = (self.0.total_in(), self.0.total_out());
        loop {
            let (used, made) = ((self.0.total_in() - first_in) as usize, (self.0.total_out() - first_out) as usize);
            if made > MAX_BLOCK {
                return Err(HeaderError::TooMany);
            }
            match self.0.decompress(&block[used..], &mut bytes[made..], FlushDecompress::Sync) {
                Ok(status) => {
                    let still =
                        self.0.total_in() - first_in == used as u64 && self.0.total_out() - first_out == made as u64;
                    if status == Status::StreamEnd || (still && used < block.len()) {
                        return Err(HeaderError::Compression);
                    }
                    if still {
                        bytes.truncate(made);
                        return Ok(bytes);
                    }
                }
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&dictionary()).map_err(|_| HeaderError::Compression)?;
                }
                Err(_) => return Err(HeaderError::Compression),
            }
        }
    }
}

fn parse(mut bytes: &[u8]) -> Result<Headers, HeaderError> {
    let number = |bytes: &mut &[u8]| {
        let (first, rest) = bytes.split_first_chunk::<4>().ok_or(HeaderError::Malformed)?;
        *bytes = rest;
        Ok(u32::from_be_bytes(*first))
    };
    let text = |bytes: &mut &[u8]| {
        let length = number(bytes)? as usize;
        let (text, rest) = bytes.split_at_checked(length).ok_or(HeaderError::Malformed)?;
        *bytes = rest;
        String::from_utf8(text.to_vec()).map_err(|_| HeaderError::Malformed)
    };
    let count = number(&mut bytes)?;
    if count > MAX_HEADERS {
        return Err(HeaderError::TooMany);
    }
    let headers = (0..count).map(|_| Ok((text(&mut bytes)?.to_ascii_lowercase(), text(&mut bytes)?))).collect();
    if bytes.is_empty() { headers } else { headers.and(Err(HeaderError::Malformed)) }
}

/// What our blocks are compressed with.
#[derive(Debug)]
pub struct Compressor(Compress);

impl Default for Compressor {
    fn default() -> Self {
        let mut compress = Compress::new(Compression::fast(), true);
        compress.set_dictionary(&dictionary()).expect("nothing is compressed yet");
        Self(compress)
    }
}

impl Compressor {
    /// The connection's next block, with these headers.
    pub fn write(&mut self, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut bytes = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            bytes.extend_from_slice(&(text.len() as u32).to_be_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        let mut block = Vec::with_capacity(bytes.len() + 64);
        let first = self.0.total_in();
        loop {
            let used = (self.0.total_in() - first) as usize;
            block.reserve(64);
            let status = self.0.compress_vec(&bytes[used..], &mut block, FlushCompress::Sync);
            status.expect("the state of the compression is our own");
            // Room that is left says that the flush is complete.
            if self.0.total_in() - first == bytes.len() as u64 && block.len() < block.capacity() {
                return block;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_dictionary_is_that_of_the_specification() {
        let bytes = dictionary();
        assert_eq!(bytes.len(), 1423);
        // Adler-32, by which zlib tells dictionaries apart.
        let (a, b) = bytes.iter().fold((1u32, 0u32), |(a, b), byte| {
            let a = (a + u32::from(*byte)) % 65_521;
            (a, (b + a) % 65_521)
        });
        assert_eq!(b << 16 | a, 0xe3c6a7c2);
    }

    #[test]
    fn blocks_of_one_connection_are_one_compressed_stream() {
        let (mut compressor, mut decompressor) = (Compressor::default(), Decompressor::default());
        let headers = [("streamtype", "stdout"), ("port", "80")];
        let first = compressor.write(&headers);
        let second = compressor.write(&headers);
        assert!(second.len() < first.len(), "{} {}", first.len(), second.len());
        for block in [first, second] {
            let expected: Headers = headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            assert_eq!(decompressor.read(&block), Ok(expected));
        }
        assert_eq!(decompressor.read(&compressor.write(&[])), Ok(Vec::new()));
    }

    /// The first SYN_STREAM's headers as a Go client (moby/spdystream 0.5.1, compress/zlib) sends them.
    #[test]
    fn a_block_of_a_go_client_is_read() {
        let block = GO_BLOCK;
        let expected = vec![("streamtype".to_owned(), "error".to_owned())];
        assert_eq!(Decompressor::default().read(block), Ok(expected));
    }

    const GO_BLOCK: &[u8] = b"\x78\xf9\xe3\xc6\xa7\xc2\x62\x60\x60\x60\x04\xa7\xb3\x92\xa2\xd4\xc4\x5c\x68\x51\xc2\x9a\x0a\x0a\x68\x00\x00\x00\x00\xff\xff";

    #[test]
    fn a_block_that_grows_without_end_is_refused() {
        let value = "x".repeat(MAX_BLOCK);
        let block = Compressor::default().write(&[("a", &value)]);
        assert!(block.len() < 1000);
        assert_eq!(Decompressor::default().read(&block), Err(HeaderError::TooMany));
    }

    #[test]
    fn wrong_counts_and_lengths_are_refused() {
        assert_eq!(parse(b"\x00\x00\x00\x01\xff\xff\xff\xff"), Err(HeaderError::Malformed));
        assert_eq!(parse(b"\xff\xff\xff\xff"), Err(HeaderError::TooMany));
        assert_eq!(parse(b"\x00\x00\x00\x00more"), Err(HeaderError::Malformed));
        assert_eq!(parse(b"\x00"), Err(HeaderError::Malformed));
    }

    proptest! {
        #[test]
        fn any_bytes_are_headers_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Decompressor::default().read(&bytes);
            let _ = parse(&bytes);
            // Behind a valid beginning, where the decompression is under way.
            let mut block = Compressor::default().write(&[("a", "b")]);
            block.extend_from_slice(&bytes);
            let _ = Decompressor::default().read(&block);
        }
    }
}
