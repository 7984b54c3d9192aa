//! What runs for minutes in `make soak`, and for a round in the end-to-end tests.

pub mod log;
pub mod many;
mod pod_life;
pub mod pods;
pub mod restart;

/// How long a guest may take to boot, in seconds: the longest that can be configured, for the one CPU of an emulated node.
const BOOT: i64 = 200;

/// Gives guests so long.
fn patient(config: &mut toml::Table) {
    if let Some(vmm) = config.get_mut("vmm").and_then(toml::Value::as_table_mut) {
        vmm.insert("boot_deadline_seconds".into(), BOOT.into());
    }
}
