//! From a process as the daemon asks for it to one with every name resolved.

use isopod_proto::agent;

use crate::error::{Error, Result};
use crate::limits;
use crate::stub::message::Program;
use crate::users::Identity;

/// Checks `process` and resolves its names; `identity` is what its user is in the container.
pub fn resolve(process: &agent::Process, identity: &Identity) -> Result<Program> {
    let agent::Process {
        args,
        env,
        cwd,
        user: _,
        capabilities,
        no_new_privs,
        rlimits,
        terminal,
        stdin: _,
        seccomp_filter,
        oom_score_adj,
        seccomp_flags,
        terminal_columns: _,
        terminal_rows: _,
    } = process;
    if args.is_empty() || args[0].is_empty() {
        return Err(Error::invalid("the command is empty"));
    }
    if let Some(argument) = args.iter().find(|argument| argument.contains('\0')) {
        return Err(Error::invalid(format!("the argument {argument:?} has a NUL byte")));
    }
    if let Some(variable) = env.iter().find(|variable| !variable.contains(&b'=') || variable.contains(&0)) {
        let shown = String::from_utf8_lossy(variable);
        return Err(Error::invalid(format!("the environment variable {shown:?} is not of the form NAME=value")));
    }
    if !(cwd.is_empty() || cwd.starts_with('/')) || cwd.contains('\0') {
        return Err(Error::invalid(format!("the working directory {cwd:?} is not an absolute path")));
    }
    if !(-1000..=1000).contains(oom_score_adj) {
        return Err(Error::invalid(format!("oom_score_adj {oom_score_adj} is not between -1000 and 1000")));
    }
    if seccomp_filter.len() % 8 != 0 {
        return Err(Error::invalid(format!(
            "a seccomp filter of {} bytes is not a number of instructions",
            seccomp_filter.len()
        )));
    }
    let capabilities = limits::capability_bits(&capabilities.clone().unwrap_or_default())?;
    Ok(Program {
        args: args.iter().map(|argument| argument.clone().into_bytes()).collect(),
        env: with_home(env, identity),
        cwd: cwd.clone(),
        uid: identity.uid,
        gid: identity.gid,
        groups: identity.groups.clone(),
        capabilities: Some(capabilities),
        no_new_privs: *no_new_privs,
        rlimits: rlimits.iter().map(limits::resource_limit).collect::<Result<_>>()?,
        terminal: *terminal,
        seccomp_filter: seccomp_filter.clone(),
        seccomp_flags: *seccomp_flags,
        oom_score_adj: *oom_score_adj,
    })
}

fn with_home(env: &[Vec<u8>], identity: &Identity) -> Vec<Vec<u8>> {
    let mut env = env.to_vec();
    if !env.iter().any(|variable| variable.starts_with(b"HOME=")) {
        let home = identity.home.as_deref().unwrap_or("/");
        env.push(format!("HOME={home}").into_bytes());
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> agent::Process {
        agent::Process { args: vec!["sh".into()], ..agent::Process::default() }
    }

    #[test]
    fn home_comes_from_passwd_unless_given() {
        let identity = Identity { home: Some("/root".into()), ..Identity::default() };
        assert_eq!(resolve(&process(), &identity).unwrap().env, [b"HOME=/root".to_vec()]);
        let given = agent::Process { env: vec![b"HOME=/x".to_vec()], ..process() };
        assert_eq!(resolve(&given, &identity).unwrap().env, [b"HOME=/x".to_vec()]);
        assert_eq!(resolve(&process(), &Identity::default()).unwrap().env, [b"HOME=/".to_vec()]);
    }

    #[test]
    fn bad_values_are_named() {
        let cases = [
            (agent::Process::default(), "command"),
            (agent::Process { args: vec!["a\0b".into()], ..process() }, "NUL"),
            (agent::Process { env: vec![b"novalue".to_vec()], ..process() }, "novalue"),
            (agent::Process { cwd: "relative".into(), ..process() }, "relative"),
            (agent::Process { oom_score_adj: 1001, ..process() }, "1001"),
            (agent::Process { seccomp_filter: vec![0; 7], ..process() }, "7 bytes"),
        ];
        for (process, named) in cases {
            let error = resolve(&process, &Identity::default()).unwrap_err();
            assert!(error.chain().contains(named), "{}", error.chain());
        }
    }
}
