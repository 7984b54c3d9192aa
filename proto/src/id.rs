//! Checked identifiers.

use std::fmt;

/// An identifier that does not have the form it must have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is not valid: {rule}")]
pub struct InvalidId {
    what: &'static str,
    value: String,
    rule: &'static str,
}

/// The id of a sandbox, a container or an exec process: 64 lower-case hexadecimal digits.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId(String);

impl ObjectId {
    /// The id made of 32 random bytes.
    pub fn from_random(random: [u8; 32]) -> Self {
        Self(random.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Checks `value`'s form.
    pub fn parse(value: &str) -> Result<Self, InvalidId> {
        let hexadecimal = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if value.len() == 64 && value.bytes().all(hexadecimal) {
            return Ok(Self(value.to_owned()));
        }
        Err(InvalidId { what: "id", value: shortened(value), rule: "it must be 64 lower-case hexadecimal digits" })
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 digits, for names and logs.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

/// The id of a disk of a VM, which is its virtio-blk serial: 1 to 20 ASCII letters, digits and '-'
/// (virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID returns 20 bytes).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskId(String);

impl DiskId {
    /// Most bytes a serial may have.
    pub const MAX: usize = 20;

    /// Checks `value`'s form.
    pub fn parse(value: &str) -> Result<Self, InvalidId> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if (1..=Self::MAX).contains(&value.len()) && value.bytes().all(allowed) {
            return Ok(Self(value.to_owned()));
        }
        Err(InvalidId {
            what: "disk id",
            value: shortened(value),
            rule: "it must be 1 to 20 ASCII letters, digits and '-'",
        })
    }

    /// The serial.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Enough of a bad value to recognise it by; it may be of any length.
fn shortened(value: &str) -> String {
    value.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_parse() {
        let id = ObjectId::from_random([0xa5; 32]);
        assert_eq!(ObjectId::parse(id.as_str()), Ok(id.clone()));
        assert_eq!(id.short(), "a5a5a5a5a5a5");
    }

    #[test]
    fn bad_ids_are_refused() {
        for bad in ["", "abc", &"g".repeat(64), &"A".repeat(64), &"a".repeat(65)] {
            assert!(ObjectId::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn disk_ids_have_at_most_20_plain_bytes() {
        assert!(DiskId::parse("img-0123456789abcdef").is_ok());
        for bad in ["", "img/1", "a b", "ä", &"x".repeat(21)] {
            assert!(DiskId::parse(bad).is_err(), "{bad}");
        }
    }
}
