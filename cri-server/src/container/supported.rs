//! What a configuration may not ask for: refused where it is asked, never ignored.

use super::SpecError;
use crate::cri;
use crate::cri::security_profile::ProfileType;
use crate::network::ports;

fn invalid(field: &'static str, problem: &str) -> SpecError {
    SpecError::Invalid { field, problem: problem.to_owned() }
}

fn unsupported(field: &'static str, what: impl Into<String>) -> SpecError {
    SpecError::Unsupported { field, what: what.into() }
}

fn shown(text: &str) -> String {
    text.chars().take(200).collect()
}

/// Checks what a sandbox is asked to be.
pub fn check_sandbox(config: &cri::PodSandboxConfig) -> Result<(), SpecError> {
    let metadata = config.metadata.as_ref().ok_or_else(|| invalid("config.metadata", "it is missing"))?;
    for (field, value) in [
        ("config.metadata.name", &metadata.name),
        ("config.metadata.namespace", &metadata.namespace),
        ("config.metadata.uid", &metadata.uid),
    ] {
        if value.is_empty() {
            return Err(invalid(field, "it is empty"));
        }
    }
    if config.hostname.len() > 64 || config.hostname.contains(|byte: char| byte.is_control() || byte == '/') {
        return Err(invalid("config.hostname", "it is not a host name of at most 64 bytes"));
    }
    if let Err(problem) = ports::parse(&config.port_mappings) {
        return Err(SpecError::Invalid { field: "config.port_mappings", problem });
    }
    let Some(linux) = &config.linux else { return Ok(()) };
    for (name, value) in &linux.sysctls {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
        if name.is_empty() || !name.bytes().all(plain) || name.contains("..") || value.contains('\0') {
            return Err(SpecError::Invalid {
                field: "config.linux.sysctls",
                problem: format!("{:?} is not a sysctl", shown(name)),
            });
        }
    }
    let Some(context) = &linux.security_context else { return Ok(()) };
    if context.run_as_group.is_some() && context.run_as_user.is_none() {
        let field = "config.linux.security_context.run_as_group";
        return Err(invalid(field, "it is given without run_as_user"));
    }
    // Nothing of a sandbox runs on the host or in the guest but its containers, which have a profile each: the sandbox's
    // own seccomp profile, which the kubelet always gives, is for a pause container that does not exist.
    check_selinux("config.linux.security_context.selinux_options", context.selinux_options.as_ref())?;
    check_namespaces(context.namespace_options.as_ref())
}

/// Checks what a container is asked to be.
pub fn check(config: &cri::ContainerConfig) -> Result<(), SpecError> {
    match &config.metadata {
        Some(metadata) if !metadata.name.is_empty() => {}
        _ => return Err(invalid("config.metadata.name", "it is empty")),
    }
    if config.image.as_ref().is_none_or(|image| image.image.is_empty()) {
        return Err(invalid("config.image.image", "it is empty"));
    }
    crate::volume::plan::plan(&config.mounts)?;
    let options = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let user_namespace = options
        .and_then(|context| context.namespace_options.as_ref())
        .and_then(|options| options.userns_options.as_ref());
    crate::volume::plan::check_mappings(&config.mounts, user_namespace)?;
    crate::volume::device::plan(&config.devices)?;
    if let Some(device) = config.cdi_devices.first() {
        return Err(unsupported("config.CDI_devices", format!("CDI devices ({:?})", shown(&device.name))));
    }
    let Some(context) = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref()) else { return Ok(()) };
    if context.run_as_user.is_some() && !context.run_as_username.is_empty() {
        let field = "config.linux.security_context.run_as_username";
        return Err(invalid(field, "it is given together with run_as_user"));
    }
    if context.run_as_group.is_some() && context.run_as_user.is_none() && context.run_as_username.is_empty() {
        let field = "config.linux.security_context.run_as_group";
        return Err(invalid(field, "it is given without run_as_user or run_as_username"));
    }
    check_apparmor(context)?;
    check_selinux("config.linux.security_context.selinux_options", context.selinux_options.as_ref())?;
    check_namespaces(context.namespace_options.as_ref())
}

/// The guest has no AppArmor, so that no profile is loaded there. Seccomp profiles are looked at where they are compiled.
fn check_apparmor(context: &cri::LinuxContainerSecurityContext) -> Result<(), SpecError> {
    // A privileged container is never confined, whatever is asked for.
    if context.privileged {
        return Ok(());
    }
    let field = "config.linux.security_context.apparmor";
    match &context.apparmor {
        None => {}
        Some(profile) if profile.profile_type() == ProfileType::Unconfined => return Ok(()),
        Some(profile) => {
            let (kind, name) = (profile.profile_type().as_str_name(), shown(&profile.localhost_ref));
            return Err(unsupported(field, format!("AppArmor (the profile {kind} {name})")));
        }
    }
    #[expect(deprecated, reason = "clients may still set the old field, and it must not be ignored")]
    let old = context.apparmor_profile.as_str();
    match old {
        "" | "unconfined" => Ok(()),
        _ => Err(unsupported(field, format!("AppArmor (the profile {})", shown(old)))),
    }
}

fn check_selinux(field: &'static str, options: Option<&cri::SeLinuxOption>) -> Result<(), SpecError> {
    match options {
        Some(options) if *options != cri::SeLinuxOption::default() => Err(unsupported(field, "SELinux")),
        _ => Ok(()),
    }
}

fn check_namespaces(options: Option<&cri::NamespaceOption>) -> Result<(), SpecError> {
    let Some(options) = options else { return Ok(()) };
    let node = i32::from(cri::NamespaceMode::Node);
    for (field, mode, what) in [
        ("namespace_options.network", options.network, Some("the network namespace of the host")),
        // The node of a pod is its guest: its containers see all processes of that one, of every container and the agent.
        ("namespace_options.pid", options.pid, None),
        ("namespace_options.ipc", options.ipc, Some("the IPC namespace of the host")),
    ] {
        if let (Some(what), true) = (what, mode == node) {
            return Err(unsupported(field, what));
        }
        if cri::NamespaceMode::try_from(mode).is_err() {
            return Err(SpecError::Invalid { field, problem: format!("{mode} is not a namespace mode") });
        }
    }
    if options.network != i32::from(cri::NamespaceMode::Pod) {
        return Err(invalid("namespace_options.network", "containers of a pod share its network: it must be POD"));
    }
    super::user_namespace::of_options(Some(options)).map(drop)
}

#[cfg(test)]
mod tests {
    use isopod_proto::ErrorKind;

    use super::*;

    fn sandbox() -> cri::PodSandboxConfig {
        let metadata =
            cri::PodSandboxMetadata { name: "n".into(), uid: "u".into(), namespace: "ns".into(), attempt: 0 };
        cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
    }

    fn container(context: cri::LinuxContainerSecurityContext) -> cri::ContainerConfig {
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: "i".into(), ..Default::default() }),
            linux: Some(cri::LinuxContainerConfig { security_context: Some(context), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn empty_metadata_is_refused_by_the_fields_name() {
        assert!(check_sandbox(&sandbox()).is_ok());
        for field in ["name", "namespace", "uid"] {
            let mut config = sandbox();
            let metadata = config.metadata.as_mut().expect("set");
            match field {
                "name" => metadata.name.clear(),
                "namespace" => metadata.namespace.clear(),
                _ => metadata.uid.clear(),
            }
            let error = check_sandbox(&config).expect_err("empty");
            assert!(error.to_string().contains(&format!("metadata.{field}")), "{error}");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }

    #[test]
    fn the_hosts_namespaces_are_refused() {
        let options = cri::NamespaceOption { network: cri::NamespaceMode::Node.into(), ..Default::default() };
        let context = cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let mut config = sandbox();
        config.linux = Some(cri::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() });
        assert_eq!(check_sandbox(&config).expect_err("NODE").kind(), ErrorKind::Unimplemented);
    }

    #[test]
    fn a_group_without_a_user_is_refused() {
        let context = cri::LinuxContainerSecurityContext {
            run_as_group: Some(cri::Int64Value { value: 5 }),
            ..Default::default()
        };
        assert_eq!(check(&container(context)).expect_err("no user").kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn an_apparmor_profile_is_never_stripped() {
        let with = |profile_type: ProfileType| cri::LinuxContainerSecurityContext {
            apparmor: Some(cri::SecurityProfile { profile_type: profile_type.into(), localhost_ref: "p".into() }),
            ..Default::default()
        };
        assert!(check(&container(with(ProfileType::Unconfined))).is_ok());
        for kind in [ProfileType::RuntimeDefault, ProfileType::Localhost] {
            let error = check(&container(with(kind))).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Unimplemented);
            assert!(error.to_string().contains("AppArmor"), "{error}");
            let privileged = cri::LinuxContainerSecurityContext { privileged: true, ..with(kind) };
            assert!(check(&container(privileged)).is_ok());
        }
    }

    #[test]
    fn a_sysctl_that_leaves_proc_sys_is_refused() {
        let mut config = sandbox();
        let mut linux = cri::LinuxPodSandboxConfig::default();
        linux.sysctls.insert("net/../../x".into(), "1".into());
        config.linux = Some(linux);
        assert_eq!(check_sandbox(&config).expect_err("refused").kind(), ErrorKind::InvalidArgument);
    }
}
