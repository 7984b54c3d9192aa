//! From a container's configuration and its image's to what the agent is to run.

use isopod_image_store::ImageConfig;
use isopod_proto::ObjectId;
use isopod_proto::agent::{self, PidMode};

use super::{SpecError, capabilities, disk_id, resources};
use crate::cri;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the agent is asked to create. `hostname` is the pod's; `pid_target` the full id of namespace_options.target_id.
pub fn create_request(
    id: &ObjectId,
    config: &cri::ContainerConfig,
    (image_id, image): (&str, &ImageConfig),
    hostname: &str,
    pid_target: Option<&ObjectId>,
) -> Result<agent::CreateContainerRequest, SpecError> {
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    let limits = linux.resources.unwrap_or_default();
    let namespaces = context.namespace_options.clone().unwrap_or_default();
    let pid_mode = match namespaces.pid() {
        cri::NamespaceMode::Pod => PidMode::Pod,
        cri::NamespaceMode::Container => PidMode::Container,
        cri::NamespaceMode::Target => PidMode::Target,
        cri::NamespaceMode::Node => PidMode::Node,
    };
    if pid_mode == PidMode::Target && pid_target.is_none() {
        let problem = "PID mode TARGET needs the id of a container of this pod".to_owned();
        return Err(SpecError::Invalid { field: "namespace_options.target_id", problem });
    }
    let paths = |paths: &[String]| if context.privileged { Vec::new() } else { paths.to_vec() };
    let process = agent::Process {
        args: command_line(config, image)?,
        env: environment(config, image, hostname)?,
        cwd: working_directory(config, image)?,
        user: Some(user(&context, image)?),
        capabilities: Some(capabilities::of(context.privileged, &context.capabilities.clone().unwrap_or_default())?),
        no_new_privs: context.no_new_privs,
        rlimits: Vec::new(),
        terminal: config.tty,
        stdin: config.stdin,
        seccomp_filter: Vec::new(),
        seccomp_flags: 0,
        oom_score_adj: limits.oom_score_adj.clamp(-1000, 1000) as i32,
        ..agent::Process::default()
    };
    Ok(agent::CreateContainerRequest {
        id: id.to_string(),
        image_disk: disk_id(image_id).to_string(),
        process: Some(process),
        // The image's VOLUME paths are plain directories of the root file system, which is writable and, as a volume without
        // a name, goes with the container. An empty mount there would hide what the image has at the path.
        mounts: Vec::new(),
        pid_mode: pid_mode.into(),
        pid_target: pid_target.filter(|_| pid_mode == PidMode::Target).map(ToString::to_string).unwrap_or_default(),
        resources: Some(resources::to_guest(&limits)?),
        readonly_rootfs: context.readonly_rootfs,
        masked_paths: paths(&context.masked_paths),
        readonly_paths: paths(&context.readonly_paths),
        privileged: context.privileged,
        ipc_private: namespaces.ipc() == cri::NamespaceMode::Container,
        user_namespace: None,
        devices: Vec::new(),
    })
}

/// A further process of a container: as its first one, but for the command line.
pub fn exec_process(first: &agent::Process, command: Vec<String>, terminal: bool, stdin: bool) -> agent::Process {
    let mut process = agent::Process { args: command, terminal, stdin, ..first.clone() };
    if terminal && !process.env.iter().any(|variable| variable.starts_with(b"TERM=")) {
        process.env.push(b"TERM=xterm".to_vec());
    }
    process
}

/// `command` stands for the image's ENTRYPOINT and drops its CMD; `args` stand for CMD.
fn command_line(config: &cri::ContainerConfig, image: &ImageConfig) -> Result<Vec<String>, SpecError> {
    let (command, args) = match (config.command.is_empty(), config.args.is_empty()) {
        (true, true) => (&image.entrypoint, &image.cmd),
        (true, false) => (&image.entrypoint, &config.args),
        (false, _) => (&config.command, &config.args),
    };
    let line: Vec<String> = command.iter().chain(args).cloned().collect();
    let invalid = |problem: &str| SpecError::Invalid { field: "config.command", problem: problem.to_owned() };
    match line.first() {
        None => Err(invalid("neither the configuration nor the image has a command")),
        Some(_) if line.iter().any(|word| word.contains('\0')) => Err(invalid("it has a NUL")),
        Some(_) => Ok(line),
    }
}

/// HOSTNAME and TERM, the image's variables, and the configuration's; of variables with the same name the last one.
fn environment(config: &cri::ContainerConfig, image: &ImageConfig, hostname: &str) -> Result<Vec<Vec<u8>>, SpecError> {
    let mut variables: Vec<Vec<u8>> = Vec::new();
    let mut set = |variable: Vec<u8>| {
        let name = |variable: &[u8]| variable.split(|byte| *byte == b'=').next().map(<[u8]>::to_vec);
        match variables.iter_mut().find(|old| name(old) == name(&variable)) {
            Some(old) => *old = variable,
            None => variables.push(variable),
        }
    };
    set(DEFAULT_PATH.into());
    set(format!("HOSTNAME={hostname}").into());
    if config.tty {
        set(b"TERM=xterm".to_vec());
    }
    for variable in image.env.iter().filter(|variable| variable.contains('=')) {
        set(variable.clone().into());
    }
    for cri::KeyValue { key, value } in &config.envs {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains(&0) {
            let shown: String = key.chars().take(80).collect();
            let problem = format!("{shown:?} is not a name, or its value has a NUL");
            return Err(SpecError::Invalid { field: "config.envs", problem });
        }
        set([key.as_bytes(), b"=", value].concat());
    }
    Ok(variables)
}

fn working_directory(config: &cri::ContainerConfig, image: &ImageConfig) -> Result<String, SpecError> {
    let chosen = if config.working_dir.is_empty() { &image.working_dir } else { &config.working_dir };
    if chosen.is_empty() || (chosen.starts_with('/') && !chosen.contains('\0')) {
        return Ok(chosen.clone());
    }
    let shown: String = chosen.chars().take(200).collect();
    Err(SpecError::Invalid { field: "config.working_dir", problem: format!("{shown:?} is not an absolute path") })
}

fn user(context: &cri::LinuxContainerSecurityContext, image: &ImageConfig) -> Result<agent::User, SpecError> {
    let id = |field, value: i64| {
        u32::try_from(value).map_err(|_| SpecError::Invalid { field, problem: format!("{value} is not an id") })
    };
    let mut user = match &context.run_as_user {
        Some(uid) => id("config.linux.security_context.run_as_user", uid.value)?.to_string(),
        None => context.run_as_username.clone(),
    };
    if user.is_empty() {
        user.clone_from(&image.user);
    } else if let Some(gid) = &context.run_as_group {
        user = format!("{user}:{}", id("config.linux.security_context.run_as_group", gid.value)?);
    }
    let groups = context
        .supplemental_groups
        .iter()
        .map(|gid| id("config.linux.security_context.supplemental_groups", *gid))
        .collect::<Result<_, _>>()?;
    let strict_groups = context.supplemental_groups_policy() == cri::SupplementalGroupsPolicy::Strict;
    Ok(agent::User { user, supplemental_groups: groups, strict_groups })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn image() -> ImageConfig {
        ImageConfig { entrypoint: words("/entry"), cmd: words("a b"), ..ImageConfig::default() }
    }

    #[test]
    fn a_command_drops_the_images_cmd_and_args_replace_it() {
        for (command, args, expected) in
            [("", "", "/entry a b"), ("", "x", "/entry x"), ("/run", "", "/run"), ("/run", "x y", "/run x y")]
        {
            let config = cri::ContainerConfig { command: words(command), args: words(args), ..Default::default() };
            assert_eq!(command_line(&config, &image()), Ok(words(expected)), "{command:?} {args:?}");
        }
        assert!(command_line(&cri::ContainerConfig::default(), &ImageConfig::default()).is_err());
    }

    #[test]
    fn the_configurations_variables_replace_the_images() {
        let image = ImageConfig { env: words("A=image B=image"), ..ImageConfig::default() };
        let variable = |key: &str, value: &str| cri::KeyValue { key: key.into(), value: value.into() };
        let envs = vec![variable("A", "config"), variable("PATH", "/x")];
        let config = cri::ContainerConfig { envs, ..Default::default() };
        let made: Vec<String> = environment(&config, &image, "pod")
            .expect("valid")
            .into_iter()
            .map(|variable| String::from_utf8(variable).expect("text"))
            .collect();
        assert_eq!(made, words("PATH=/x HOSTNAME=pod A=config B=image"));
        let config = cri::ContainerConfig { envs: vec![variable("A=B", "")], ..Default::default() };
        assert!(environment(&config, &image, "pod").is_err());
    }

    #[test]
    fn a_user_is_the_configurations_or_else_the_images() {
        let image = ImageConfig { user: "www:www".into(), ..ImageConfig::default() };
        let with = |uid: Option<i64>, name: &str, gid: Option<i64>| {
            let context = cri::LinuxContainerSecurityContext {
                run_as_user: uid.map(|value| cri::Int64Value { value }),
                run_as_username: name.into(),
                run_as_group: gid.map(|value| cri::Int64Value { value }),
                ..Default::default()
            };
            user(&context, &image).map(|user| user.user)
        };
        assert_eq!(with(None, "", None).as_deref(), Ok("www:www"));
        assert_eq!(with(Some(0), "", None).as_deref(), Ok("0"));
        assert_eq!(with(Some(7), "", Some(8)).as_deref(), Ok("7:8"));
        assert_eq!(with(None, "nobody", Some(8)).as_deref(), Ok("nobody:8"));
        assert!(with(Some(-1), "", None).is_err());
        assert!(with(Some(1 << 32), "", None).is_err());
    }

    #[test]
    fn an_exec_with_a_terminal_has_a_term() {
        let first = agent::Process { args: words("/first"), env: vec![b"A=1".to_vec()], ..Default::default() };
        let process = exec_process(&first, words("ls"), true, false);
        assert_eq!(process.args, ["ls"]);
        assert!(process.terminal && process.env.contains(&b"TERM=xterm".to_vec()));
        assert!(!exec_process(&first, words("ls"), false, false).env.contains(&b"TERM=xterm".to_vec()));
    }
}
