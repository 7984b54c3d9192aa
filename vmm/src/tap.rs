//! Opening a tap interface.
