//! Records as CRI shows them, and CRI's filters over them.

use std::collections::HashMap;

use crate::container::{ContainerRecord, ContainerState};
use crate::cri;
use crate::sandbox::SandboxRecord;
use crate::sandbox::exec::Outcome;

fn has_labels(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether every part of `filter` that is given is true of the sandbox. An id may be shortened.
pub fn sandbox_matches(record: &SandboxRecord, filter: &cri::PodSandboxFilter) -> bool {
    record.id.as_str().starts_with(&filter.id)
        && filter.state.as_ref().is_none_or(|state| state.state() == record.phase.to_cri())
        && has_labels(&record.config.labels, &filter.label_selector)
}

/// Whether every part of `filter` that is given is true of the container. Ids may be shortened.
pub fn container_matches(record: &ContainerRecord, filter: &cri::ContainerFilter) -> bool {
    record.id.as_str().starts_with(&filter.id)
        && record.sandbox.as_str().starts_with(&filter.pod_sandbox_id)
        && filter.state.as_ref().is_none_or(|state| state.state() == record.state.to_cri())
        && has_labels(&record.config.labels, &filter.label_selector)
}

/// A sandbox in a list.
pub fn sandbox_item(record: &SandboxRecord) -> cri::PodSandbox {
    cri::PodSandbox {
        id: record.id.to_string(),
        metadata: record.config.metadata.clone(),
        state: record.phase.to_cri().into(),
        created_at: record.created_at,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

/// The status of a sandbox.
pub fn sandbox_status(record: &SandboxRecord) -> cri::PodSandboxStatus {
    let context = record.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.clone()).unwrap_or_default();
    let mut ips = record.network.iter().flat_map(|network| network.ips()).map(|ip| ip.to_string());
    let network = cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    };
    cri::PodSandboxStatus {
        id: record.id.to_string(),
        metadata: record.config.metadata.clone(),
        state: record.phase.to_cri().into(),
        created_at: record.created_at,
        network: Some(network),
        linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(cri::Namespace { options: Some(options) }) }),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

/// The image as the container's creator named it.
fn image(record: &ContainerRecord) -> cri::ImageSpec {
    record.config.image.clone().unwrap_or_default()
}

/// A container in a list.
pub fn container_item(record: &ContainerRecord) -> cri::Container {
    cri::Container {
        id: record.id.to_string(),
        pod_sandbox_id: record.sandbox.to_string(),
        metadata: record.config.metadata.clone(),
        image: Some(image(record)),
        image_ref: record.image_id.clone(),
        state: record.state.to_cri().into(),
        created_at: record.created_at,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        image_id: record.image_id.clone(),
    }
}

/// The status of a container: here an exit becomes what the kubelet reads.
pub fn container_status(record: &ContainerRecord) -> cri::ContainerStatus {
    let exit = match &record.state {
        ContainerState::Exited(exit) => Some(exit),
        ContainerState::Created | ContainerState::Running { .. } => None,
    };
    let linux = record.config.linux.clone().unwrap_or_default();
    let user = record.user.as_ref().map(|user| cri::ContainerUser {
        linux: Some(cri::LinuxContainerUser {
            uid: user.uid.into(),
            gid: user.gid.into(),
            supplemental_groups: user.supplemental_groups.iter().map(|gid| i64::from(*gid)).collect(),
        }),
    });
    cri::ContainerStatus {
        id: record.id.to_string(),
        metadata: record.config.metadata.clone(),
        state: record.state.to_cri().into(),
        created_at: record.created_at,
        started_at: record.state.started_at(),
        finished_at: exit.map(|exit| exit.finished_at).unwrap_or_default(),
        exit_code: exit.map(|exit| exit.exit_code).unwrap_or_default(),
        image: Some(image(record)),
        image_ref: record.image_id.clone(),
        reason: exit.map(|exit| exit.reason.clone()).unwrap_or_default(),
        message: exit.map(|exit| exit.message.clone()).unwrap_or_default(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        mounts: record.config.mounts.clone(),
        log_path: record.log_path.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
        resources: Some(cri::ContainerResources { linux: Some(linux.resources.unwrap_or_default()) }),
        image_id: record.image_id.clone(),
        user,
        stop_signal: record.config.stop_signal,
    }
}

/// The reply to ExecSync, within the size of a message.
pub fn exec_reply(outcome: Outcome) -> cri::ExecSyncResponse {
    let Outcome { mut stdout, mut stderr, exit_code } = outcome;
    // Room for the fields' own bytes; each output may be cut, the larger one first.
    let most = cri::MAX_MESSAGE - 1024;
    let excess = |stdout: &[u8], stderr: &[u8]| (stdout.len() + stderr.len()).saturating_sub(most);
    if stdout.len() >= stderr.len() {
        stdout.truncate(stdout.len() - excess(&stdout, &stderr).min(stdout.len()));
    } else {
        stderr.truncate(stderr.len() - excess(&stdout, &stderr).min(stderr.len()));
    }
    let excess = excess(&stdout, &stderr);
    stderr.truncate(stderr.len() - excess);
    cri::ExecSyncResponse { stdout, stderr, exit_code }
}

#[cfg(test)]
mod tests {
    use isopod_proto::ObjectId;

    use super::*;
    use crate::container::reason;

    fn container() -> ContainerRecord {
        let mut record =
            ContainerRecord::for_tests(ObjectId::from_random([0xab; 32]), ObjectId::from_random([0xcd; 32]));
        record.config.labels.insert("app".into(), "web".into());
        record.config.image = Some(cri::ImageSpec { image: "sha256:00".into(), ..Default::default() });
        record.state = ContainerState::Running { started_at: 5 };
        record
    }

    #[test]
    fn a_filter_is_true_only_if_all_of_it_is() {
        let record = container();
        let matches = |filter| container_matches(&record, &filter);
        assert!(matches(cri::ContainerFilter::default()));
        assert!(matches(cri::ContainerFilter { id: "abab".into(), pod_sandbox_id: "cd".into(), ..Default::default() }));
        assert!(!matches(cri::ContainerFilter { id: "abac".into(), ..Default::default() }));
        let labelled = |value: &str| cri::ContainerFilter {
            label_selector: [("app".to_owned(), value.to_owned())].into(),
            ..Default::default()
        };
        assert!(matches(labelled("web")));
        assert!(!matches(labelled("db")));
        let state = |state: cri::ContainerState| cri::ContainerFilter {
            state: Some(cri::ContainerStateValue { state: state.into() }),
            ..labelled("web")
        };
        assert!(matches(state(cri::ContainerState::ContainerRunning)));
        assert!(!matches(state(cri::ContainerState::ContainerCreated)));
    }

    #[test]
    fn a_sandbox_filter_is_true_only_if_all_of_it_is() {
        let mut record = SandboxRecord::for_tests(ObjectId::from_random([0xab; 32]));
        record.config.labels.insert("a".into(), "b".into());
        let ready = Some(cri::PodSandboxStateValue { state: cri::PodSandboxState::SandboxReady.into() });
        let label_selector: HashMap<_, _> = [("a".to_owned(), "b".to_owned())].into();
        let filter = cri::PodSandboxFilter { id: record.id.to_string(), state: ready, label_selector };
        assert!(sandbox_matches(&record, &filter));
        record.phase = crate::sandbox::SandboxPhase::NotReady;
        assert!(!sandbox_matches(&record, &filter));
    }

    #[test]
    fn an_exit_is_told_with_its_code_and_reason() {
        let mut record = container();
        let running = container_status(&record);
        assert_eq!((running.exit_code, running.finished_at, running.reason.as_str()), (0, 0, ""));
        record.state = ContainerState::Exited(record.state.ended(137, true, 9));
        let status = container_status(&record);
        assert_eq!(status.state(), cri::ContainerState::ContainerExited);
        assert_eq!((status.exit_code, status.started_at, status.finished_at), (137, 5, 9));
        assert_eq!(status.reason, reason::OOM_KILLED);
    }

    #[test]
    fn an_exec_reply_fits_into_a_message() {
        use prost::Message;
        let most = cri::MAX_MESSAGE;
        for (stdout, stderr) in [(most, most), (most, 0), (0, most), (10, most), (5, 6)] {
            let outcome = Outcome { stdout: vec![1; stdout], stderr: vec![2; stderr], exit_code: 3 };
            let reply = exec_reply(outcome);
            assert!(reply.encoded_len() <= most, "{stdout} {stderr}");
            assert!(stdout + stderr > 100 || (reply.stdout.len(), reply.stderr.len()) == (stdout, stderr));
        }
    }
}
