//! Object ids in stored records.

use isopod_proto::ObjectId;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};

pub fn serialize<S: Serializer>(id: &ObjectId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(id.as_str())
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectId, D::Error> {
    ObjectId::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}
