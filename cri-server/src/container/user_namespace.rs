//! The pod's user namespace: which ids of the guest its containers' ids are.
//!
//! A pod that asks for one (`hostUsers: false`) has it in its guest, with the ids that it was given for the host. They mean
//! nothing there, but are what its programs see in /proc/self/uid_map, and what no other user of the guest has.

use isopod_proto::agent::{self, IdMapping};

use super::SpecError;
use crate::cri;

const FIELD: &str = "namespace_options.userns_options";

fn invalid(problem: impl Into<String>) -> SpecError {
    SpecError::Invalid { field: FIELD, problem: problem.into() }
}

/// The user namespace that these options ask for; none for the guest's own.
///
/// # Errors
/// `Invalid` for another mode than NODE and POD, and if not exactly one range of users and one of groups, each with the
/// container's id 0, is mapped.
pub fn of_options(options: Option<&cri::NamespaceOption>) -> Result<Option<agent::UserNamespace>, SpecError> {
    let Some(userns) = options.and_then(|options| options.userns_options.as_ref()) else { return Ok(None) };
    match cri::NamespaceMode::try_from(userns.mode) {
        Ok(cri::NamespaceMode::Node) if userns.uids.is_empty() && userns.gids.is_empty() => Ok(None),
        Ok(cri::NamespaceMode::Node) => Err(invalid("mode NODE has no ids to map")),
        Ok(cri::NamespaceMode::Pod) => {
            Ok(Some(agent::UserNamespace { uids: ranges("user", &userns.uids)?, gids: ranges("group", &userns.gids)? }))
        }
        Ok(mode) => Err(invalid(format!("the mode {} is none of user namespaces", mode.as_str_name()))),
        Err(_) => Err(invalid(format!("{} is not a namespace mode", userns.mode))),
    }
}

fn ranges(what: &str, mappings: &[cri::IdMapping]) -> Result<Vec<IdMapping>, SpecError> {
    let [cri::IdMapping { host_id, container_id, length }] = *mappings else {
        return Err(invalid(format!("{} ranges of {what} ids are mapped, and it must be one", mappings.len())));
    };
    if container_id != 0 {
        return Err(invalid(format!("the {what} id 0 of the container is not mapped")));
    }
    // The last id, u32::MAX, is nobody's.
    if length == 0 || host_id.checked_add(length).is_none() {
        return Err(invalid(format!("there are no {length} {what} ids from {host_id} on")));
    }
    Ok(vec![IdMapping { container_id, guest_id: host_id, length }])
}

/// The user namespace of a container: its pod's. A container may say the same again, but nothing else.
pub fn of_container(
    sandbox: &cri::PodSandboxConfig,
    container: &cri::ContainerConfig,
) -> Result<Option<agent::UserNamespace>, SpecError> {
    let context = sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let pod = of_options(context.and_then(|context| context.namespace_options.as_ref()))?;
    let context = container.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.as_ref());
    let said = options.is_some_and(|options| options.userns_options.is_some());
    if said && of_options(options)? != pod {
        return Err(invalid("the container's user namespace is not that of its pod"));
    }
    Ok(pod)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(container_id: u32, host_id: u32, length: u32) -> Vec<cri::IdMapping> {
        vec![cri::IdMapping { host_id, container_id, length }]
    }

    fn options(mode: cri::NamespaceMode, ids: &[cri::IdMapping]) -> cri::NamespaceOption {
        let userns = cri::UserNamespace { mode: mode.into(), uids: ids.to_vec(), gids: ids.to_vec() };
        cri::NamespaceOption { userns_options: Some(userns), ..Default::default() }
    }

    fn of(mode: cri::NamespaceMode, ids: &[cri::IdMapping]) -> Result<Option<agent::UserNamespace>, SpecError> {
        of_options(Some(&options(mode, ids)))
    }

    #[test]
    fn one_range_with_the_root_is_mapped() {
        let made = of(cri::NamespaceMode::Pod, &range(0, 1000, 100_000)).expect("valid").expect("one");
        let expected = vec![IdMapping { container_id: 0, guest_id: 1000, length: 100_000 }];
        assert_eq!((made.uids, made.gids), (expected.clone(), expected));
        assert_eq!(of(cri::NamespaceMode::Node, &[]), Ok(None));
        assert_eq!(of_options(None), Ok(None));
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        use cri::NamespaceMode::{Container, Node, Pod, Target};
        let two = [range(0, 1000, 10), range(10, 2000, 10)].concat();
        for (mode, ids) in [
            (Pod, Vec::new()),
            (Pod, two),
            (Pod, range(1, 1000, 10)),
            (Pod, range(0, 1000, 0)),
            (Pod, range(0, u32::MAX - 9, 10)),
            (Container, Vec::new()),
            (Target, Vec::new()),
            (Node, range(0, 1000, 10)),
        ] {
            let error = of(mode, &ids).expect_err("refused");
            assert_eq!(error.kind(), isopod_proto::ErrorKind::InvalidArgument, "{error}");
        }
    }

    #[test]
    fn a_container_has_the_user_namespace_of_its_pod() {
        let mapped = options(cri::NamespaceMode::Pod, &range(0, 1000, 10));
        let pod = |options: Option<cri::NamespaceOption>| {
            let context = cri::LinuxSandboxSecurityContext { namespace_options: options, ..Default::default() };
            let linux = cri::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
            cri::PodSandboxConfig { linux: Some(linux), ..Default::default() }
        };
        let container = |options: Option<cri::NamespaceOption>| {
            let context = cri::LinuxContainerSecurityContext { namespace_options: options, ..Default::default() };
            let linux = cri::LinuxContainerConfig { security_context: Some(context), ..Default::default() };
            cri::ContainerConfig { linux: Some(linux), ..Default::default() }
        };
        assert!(of_container(&pod(Some(mapped.clone())), &container(None)).expect("valid").is_some());
        assert!(of_container(&pod(Some(mapped.clone())), &container(Some(mapped.clone()))).expect("valid").is_some());
        assert_eq!(of_container(&pod(None), &container(None)), Ok(None));
        assert!(of_container(&pod(None), &container(Some(mapped.clone()))).is_err());
        let other = options(cri::NamespaceMode::Pod, &range(0, 2000, 10));
        assert!(of_container(&pod(Some(mapped)), &container(Some(other))).is_err());
    }
}
