//! The virtio devices.
