//! Content digests and image ids.

use std::fmt;

/// A SHA-256 digest in the form `sha256:` and 64 lower-case hexadecimal digits (OCI image-spec, descriptor.md "Digests").
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

/// The id of an image: the digest of its configuration.
pub type ImageId = Digest;

/// A digest that does not have the form it must have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not sha256: and 64 lower-case hexadecimal digits")]
pub struct InvalidDigest {
    value: String,
}

impl Digest {
    /// Checks `value`'s form.
    pub fn parse(value: &str) -> Result<Self, InvalidDigest> {
        match value.strip_prefix("sha256:") {
            Some(hex) if hex.len() == 64 && is_hex(hex) => Ok(Self(value.to_owned())),
            _ => Err(InvalidDigest { value: value.chars().take(100).collect() }),
        }
    }

    /// The digest made of its 32 bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        debug_assert_eq!(hex.len(), 64);
        Self(format!("sha256:{hex}"))
    }

    /// The digest of `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self::from_bytes(&sha2::Sha256::digest(bytes))
    }

    /// The first 16 of its bytes, as the UUID of what it names.
    pub(crate) fn first_half(&self) -> [u8; 16] {
        let value = |digit: u8| (digit as char).to_digit(16).expect("a digest's digits are hexadecimal") as u8;
        let digits = self.hex().as_bytes();
        std::array::from_fn(|index| value(digits[2 * index]) << 4 | value(digits[2 * index + 1]))
    }

    /// `sha256:` and the digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 digits.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

/// Whether `text` is lower-case hexadecimal digits alone.
pub(crate) fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_of_nothing_is_the_known_one() {
        let digest = Digest::of(b"");
        assert_eq!(digest.hex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(digest.first_half()[..3], [0xe3, 0xb0, 0xc4]);
        assert_eq!(Digest::parse(digest.as_str()), Ok(digest));
    }

    #[test]
    fn bad_digests_are_refused() {
        let upper = format!("sha256:{}", "A".repeat(64));
        let slash = format!("sha256:{}", "/".repeat(64));
        for bad in ["", "sha256:", "sha512:00", &upper, &slash, &"a".repeat(64)] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
    }
}
