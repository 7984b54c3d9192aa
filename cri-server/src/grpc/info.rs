//! What `crictl info`, `inspectp` and `inspect` show besides what CRI has fields for: JSON for people, under the key `info`
//! where it is about one object. No values of environment variables and no credentials: both may be secrets.

use std::collections::HashMap;

use isopod_proto::agent::Process;
use prost::Message;
use serde_json::{Value, json};

use crate::config::Config;
use crate::container::ContainerRecord;
use crate::context::Context;
use crate::cri;
use crate::sandbox::{SandboxRecord, resources};

/// What is shown for a value that may be a secret.
const HIDDEN: &str = "[hidden]";

type Info = HashMap<String, String>;

fn info(value: &Value) -> Info {
    [("info".to_owned(), value.to_string())].into()
}

/// Of the runtime: its configuration and its versions.
pub fn of_node(config: &Config) -> Info {
    let mut shown = json!(config);
    hide_credentials(&mut shown);
    let versions = json!({
        "isopod": env!("CARGO_PKG_VERSION"),
        "agentProtocol": isopod_proto::AGENT_PROTOCOL_VERSION,
        "cri": "v1",
    });
    [("config".to_owned(), shown.to_string()), ("versions".to_owned(), versions.to_string())].into()
}

/// Takes user and password out of every URL.
fn hide_credentials(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Some((scheme, rest)) = text.split_once("://") {
                let end = rest.find('/').unwrap_or(rest.len());
                if let Some(at) = rest[..end].rfind('@') {
                    *text = format!("{scheme}://{HIDDEN}{}", &rest[at..]);
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(hide_credentials),
        Value::Object(values) => values.values_mut().for_each(hide_credentials),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Of a sandbox: its VM, its network, where it is on the host.
pub fn of_sandbox(context: &Context, record: &SandboxRecord) -> Info {
    let size = record.size.map(|size| json!({ "vcpus": size.vcpus, "memoryBytes": size.memory_bytes }));
    info(&json!({
        "pid": record.vm.map(|vm| vm.pid),
        "vm": size,
        "stateDir": record.vm.map(|_| resources::directory(context, &record.id)),
        "cgroup": record.cgroup,
        "network": record.network,
        "runtimeHandler": record.runtime_handler,
        "config": record.config,
    }))
}

/// Of a container: what runs, and what it was made from.
pub fn of_container(record: &ContainerRecord, sandbox: Option<&SandboxRecord>) -> Info {
    // What we wrote ourselves is whole.
    let process = Process::decode(record.process.as_slice()).unwrap_or_default();
    info(&json!({
        "sandboxID": record.sandbox.as_str(),
        "pid": Value::Null,
        "vmmPid": sandbox.and_then(|sandbox| sandbox.vm).map(|vm| vm.pid),
        "process": shown_process(&process),
        "user": record.user,
        "mounts": record.config.mounts,
        "imageID": record.image_id,
        "imageLayers": record.layers,
        "config": shown_config(&record.config),
    }))
}

fn shown_config(config: &cri::ContainerConfig) -> cri::ContainerConfig {
    let mut shown = config.clone();
    for variable in &mut shown.envs {
        variable.value = HIDDEN.into();
    }
    shown
}

fn shown_process(process: &Process) -> Value {
    let name = |variable: &Vec<u8>| {
        let name = variable.split(|byte| *byte == b'=').next().unwrap_or_default();
        format!("{}={HIDDEN}", String::from_utf8_lossy(name))
    };
    let limit =
        |limit: &isopod_proto::agent::Rlimit| json!({ "type": limit.name, "soft": limit.soft, "hard": limit.hard });
    let capabilities = process.capabilities.clone().unwrap_or_default();
    json!({
        "args": process.args,
        "cwd": process.cwd,
        "env": process.env.iter().map(name).collect::<Vec<_>>(),
        "terminal": process.terminal,
        "noNewPrivileges": process.no_new_privs,
        "rlimits": process.rlimits.iter().map(limit).collect::<Vec<_>>(),
        "capabilities": {
            "bounding": capabilities.bounding,
            "effective": capabilities.effective,
            "permitted": capabilities.permitted,
            "inheritable": capabilities.inheritable,
            "ambient": capabilities.ambient,
        },
        "seccompFilterBytes": process.seccomp_filter.len(),
        "oomScoreAdj": process.oom_score_adj,
    })
}

#[cfg(test)]
mod tests {
    use isopod_proto::ObjectId;

    use super::*;

    #[test]
    fn no_value_of_an_environment_variable_is_shown() {
        let mut record = ContainerRecord::for_tests(ObjectId::from_random([1; 32]), ObjectId::from_random([2; 32]));
        record.config.envs.push(cri::KeyValue { key: "TOKEN".into(), value: "hunter2".into() });
        let process = Process {
            args: vec!["nginx".into()],
            env: vec![b"TOKEN=hunter2".to_vec(), b"odd\xff".to_vec()],
            ..Process::default()
        };
        record.process = process.encode_to_vec();
        let info = of_container(&record, None).remove("info").expect("given");
        assert!(!info.contains("hunter2"), "{info}");
        let info: Value = serde_json::from_str(&info).expect("JSON");
        assert_eq!(info["process"]["args"], json!(["nginx"]));
        assert_eq!(info["process"]["env"][0], "TOKEN=[hidden]");
        assert_eq!(info["config"]["envs"][0]["key"], "TOKEN");
    }

    #[test]
    fn no_password_in_a_url_is_shown() {
        let mut value =
            json!({ "mirrors": { "docker.io": "https://user:hunter2@mirror:5000/x@y", "a": "http://b/c@d" } });
        hide_credentials(&mut value);
        assert_eq!(value["mirrors"]["docker.io"], "https://[hidden]@mirror:5000/x@y");
        assert_eq!(value["mirrors"]["a"], "http://b/c@d");
    }
}
