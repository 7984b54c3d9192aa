use std::collections::BTreeSet;
use std::io::Write as _;

use proptest::prelude::*;
use syscalls::{x86, x86_64};

use super::bpf::Instruction;
use super::compile::{MAX_INSTRUCTIONS, compile};
use super::profile::{Action, Condition, Operator, Profile, Rule};
use super::*;
use crate::cri::SecurityProfile;

const NATIVE: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0026;
const KILL: u32 = 0x8000_0000;

/// A system call as a filter sees it, `struct seccomp_data`.
#[derive(Clone, Copy, Debug)]
struct Call {
    number: u32,
    architecture: u32,
    arguments: [u64; 6],
}

impl Call {
    fn native(name: &str, arguments: [u64; 6]) -> Self {
        let number = name.parse::<x86_64::Sysno>().expect("it exists").id() as u32;
        Self { number, architecture: NATIVE, arguments }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.number.to_le_bytes(), self.architecture.to_le_bytes()].concat();
        bytes.extend([0; 8]);
        self.arguments.iter().for_each(|argument| bytes.extend(argument.to_le_bytes()));
        bytes
    }
}

/// Runs a program as the kernel does, and as strictly.
fn run(program: &[Instruction], call: &Call) -> u32 {
    let (data, mut accumulator, mut at) = (call.bytes(), 0u32, 0usize);
    loop {
        let Instruction { code, when_true, when_false, k } = program[at];
        let branch = |condition: bool| usize::from(if condition { when_true } else { when_false });
        at += 1;
        match code {
            0x20 => {
                assert!(k.is_multiple_of(4));
                accumulator = u32::from_le_bytes(data[k as usize..][..4].try_into().expect("four bytes"));
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += branch(accumulator == k),
            0x25 => at += branch(accumulator > k),
            0x35 => at += branch(accumulator >= k),
            0x06 => return k,
            other => panic!("{other:#x} is no instruction of a filter"),
        }
    }
}

/// What the profile says of a call, straight from its rules.
fn meaning(profile: &Profile, call: &Call) -> Action {
    let name_of = |number: u32| match call.architecture {
        NATIVE => x86_64::Sysno::new(number as usize).map(|call| call.name()),
        _ => x86::Sysno::new(number as usize).map(|call| call.name()),
    };
    match call.architecture {
        NATIVE if call.number >= 0x4000_0000 => return Action::Errno(38),
        NATIVE => {}
        I386 if profile.x86 => {}
        _ => return Action::KillProcess,
    }
    let named = |name: &str| profile.rules.iter().any(|rule| rule.names.iter().any(|named| named == name));
    let newest = (0..1000).rev().find(|number| name_of(*number).is_some_and(named));
    if !profile.default.permits() && newest.is_some_and(|newest| call.number > newest) {
        return Action::Errno(38);
    }
    let Some(name) = name_of(call.number) else { return profile.default };
    let rules: Vec<&Rule> = profile
        .rules
        .iter()
        .filter(|rule| rule.action != profile.default && rule.names.iter().any(|named| named == name))
        .collect();
    if let Some(rule) = rules.iter().find(|rule| rule.conditions.is_empty()) {
        return rule.action;
    }
    let holds = |condition: &Condition| {
        let argument = call.arguments[usize::from(condition.index)];
        match condition.operator {
            Operator::NotEqual(value) => argument != value,
            Operator::Less(value) => argument < value,
            Operator::LessOrEqual(value) => argument <= value,
            Operator::Equal(value) => argument == value,
            Operator::GreaterOrEqual(value) => argument >= value,
            Operator::Greater(value) => argument > value,
            Operator::MaskedEqual { mask, value } => argument & mask == value & mask,
        }
    };
    let fits = |rule: &&&Rule| {
        let indexes: BTreeSet<u8> = rule.conditions.iter().map(|condition| condition.index).collect();
        if indexes.len() == rule.conditions.len() {
            rule.conditions.iter().all(holds)
        } else {
            rule.conditions.iter().any(holds)
        }
    };
    rules.iter().find(fits).map_or(profile.default, |rule| rule.action)
}

/// Few values with many neighbours, so that comparisons come out either way.
fn value() -> impl Strategy<Value = u64> {
    let word = prop_oneof![Just(0u64), Just(1), Just(2), Just(0x7fff_ffff), Just(0x8000_0000), Just(0xffff_ffff)];
    (word.clone(), word).prop_map(|(high, low)| high << 32 | low)
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        Just(Action::Allow),
        Just(Action::Log),
        Just(Action::Errno(1)),
        Just(Action::Errno(4095)),
        Just(Action::Trap),
        Just(Action::Trace(7)),
        Just(Action::KillThread),
        Just(Action::KillProcess),
    ]
}

fn condition() -> impl Strategy<Value = Condition> {
    let operator = (0..7, value(), value()).prop_map(|(operator, value, mask)| match operator {
        0 => Operator::NotEqual(value),
        1 => Operator::Less(value),
        2 => Operator::LessOrEqual(value),
        3 => Operator::Equal(value),
        4 => Operator::GreaterOrEqual(value),
        5 => Operator::Greater(value),
        _ => Operator::MaskedEqual { mask, value },
    });
    (0..6u8, operator).prop_map(|(index, operator)| Condition { index, operator })
}

fn profile() -> impl Strategy<Value = Profile> {
    let name =
        (0..470usize).prop_filter_map("a hole", |number| x86_64::Sysno::new(number).map(|call| call.name().to_owned()));
    let conditions = prop_oneof![Just(Vec::new()), prop::collection::vec(condition(), 0..7)];
    let rule = (prop::collection::vec(name, 1..40), action(), conditions)
        .prop_map(|(names, action, conditions)| Rule { names, action, conditions });
    (action(), any::<bool>(), prop::collection::vec(rule, 0..8)).prop_map(|(default, x86, rules)| Profile {
        default,
        x86,
        flags: 0,
        rules,
    })
}

fn call() -> impl Strategy<Value = Call> {
    let number = prop_oneof![8 => 0..480u32, 1 => 0x4000_0000..0x4000_0300u32, 1 => any::<u32>()];
    let architecture = prop_oneof![6 => Just(NATIVE), 2 => Just(I386), 1 => any::<u32>()];
    let arguments = prop::array::uniform6(value());
    (number, architecture, arguments).prop_map(|(number, architecture, arguments)| Call {
        number,
        architecture,
        arguments,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_program_does_what_its_profile_says(profile in profile(), calls in prop::collection::vec(call(), 60)) {
        if let Ok(program) = compile(&profile) {
            prop_assert!(program.len() <= MAX_INSTRUCTIONS);
            for call in calls {
                prop_assert_eq!(run(&program, &call), meaning(&profile, &call).value(), "{:?}", call);
            }
        }
    }

    #[test]
    fn any_text_is_read(text: Vec<u8>) {
        let _ = profile::parse(&text, &|_| false);
    }

    #[test]
    fn text_that_is_nearly_a_profile_is_read(
        action in "SCMP_ACT_(ALLOW|ERRNO|NOTIFY|X)", name in "[a-z_0-9]{0,9}", index in 0..9u32, errno in prop::option::of(0..5000u32),
    ) {
        let errno = errno.map(|errno| format!(r#","errnoRet":{errno}"#)).unwrap_or_default();
        let text = format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["{name}"],"action":"{action}"{errno},"args":[{{"index":{index},"value":1,"op":"SCMP_CMP_EQ"}}]}}]}}"#
        );
        if let Ok(profile) = profile::parse(text.as_bytes(), &|_| false) {
            prop_assert!(index < 6 && action != "SCMP_ACT_NOTIFY");
            prop_assert!(errno.is_empty() || action == "SCMP_ACT_ERRNO");
            prop_assert!(compile(&profile).is_ok());
        }
    }
}

fn defaults(capabilities: &[&str]) -> Vec<Instruction> {
    compile(&default::profile(&|name| capabilities.contains(&name))).expect("it fits")
}

#[test]
fn the_default_profile_allows_by_capability_and_argument() {
    let (none, admin) = (defaults(&[]), defaults(&["CAP_SYS_ADMIN"]));
    assert!(none.len() < 512, "{} instructions", none.len());
    let ask =
        |program: &[Instruction], name: &str, first: u64| run(program, &Call::native(name, [first, 0, 0, 0, 0, 0]));
    assert_eq!(ask(&none, "read", 0), ALLOW);
    for name in ["mount", "unshare", "setns", "bpf", "perf_event_open", "sethostname"] {
        assert_eq!((ask(&none, name, 0), ask(&admin, name, 0)), (EPERM, ALLOW), "{name}");
    }
    assert_eq!(ask(&admin, "io_uring_setup", 0), EPERM);
    assert_eq!((ask(&none, "clone3", 0), ask(&admin, "clone3", 0)), (ENOSYS, ALLOW));
    assert_eq!((ask(&none, "clone", 0x1200011), ask(&none, "clone", 0x1000_0011)), (ALLOW, EPERM));
    assert_eq!((ask(&none, "socket", 2), ask(&none, "socket", 40)), (ALLOW, EPERM));
    assert_eq!((ask(&none, "personality", 8), ask(&none, "personality", 0x4_0000)), (ALLOW, EPERM), "ASLR stays on");
    let foreign = Call { number: 0, architecture: 0xc000_00b7, arguments: [0; 6] };
    assert_eq!(run(&none, &foreign), KILL, "aarch64");
    let old = Call { number: 1, architecture: I386, arguments: [0; 6] };
    assert_eq!(run(&none, &old), ALLOW, "exit of i386");
    let newer = Call { number: 900, architecture: NATIVE, arguments: [0; 6] };
    assert_eq!(run(&none, &newer), ENOSYS);
}

#[test]
fn rules_for_one_system_call_mean_what_they_mean_to_libseccomp() {
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["chmod"],"action":"SCMP_ACT_ERRNO","args":[{"index":1,"value":7,"op":"SCMP_CMP_EQ"}]},
        {"names":["chmod"],"action":"SCMP_ACT_ALLOW"},
        {"names":["chown"],"action":"SCMP_ACT_KILL","args":[{"index":1,"value":7,"op":"SCMP_CMP_EQ"}]},
        {"names":["chown"],"action":"SCMP_ACT_ERRNO","errnoRet":5},
        {"names":["mkdir"],"action":"SCMP_ACT_ERRNO","args":[
            {"index":1,"value":7,"op":"SCMP_CMP_EQ"},{"index":1,"value":9,"op":"SCMP_CMP_EQ"}]}]}"#;
    let program = compile(&profile::parse(text.as_bytes(), &|_| false).expect("valid")).expect("it fits");
    let ask = |name: &str, second: u64| run(&program, &Call::native(name, [0, second, 0, 0, 0, 0]));
    assert_eq!((ask("chmod", 7), ask("chmod", 8)), (EPERM, ALLOW), "a rule that says the default says nothing");
    assert_eq!((ask("chown", 7), ask("chown", 8)), (0x0005_0005, 0x0005_0005), "a rule without conditions decides");
    assert_eq!((ask("mkdir", 7), ask("mkdir", 9), ask("mkdir", 8)), (EPERM, EPERM, ALLOW), "either value");
}

#[test]
fn a_profile_in_dockers_form_goes_by_capabilities() {
    let text = br#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,
        "archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86","SCMP_ARCH_X32"]}],
        "syscalls":[
            {"names":["ptrace"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"},"comment":""},
            {"names":["getpid"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"99.0"}},
            {"names":["bpf"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_BPF"]}},
            {"names":["acct"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_BPF"]}},
            {"names":["mount","arm_sync_file_range"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["arm"]}}]}"#;
    let with = |cap: &'static str| profile::parse(text, &move |name| name == cap).expect("valid");
    let names = |profile: &Profile| profile.rules.iter().flat_map(|rule| rule.names.clone()).collect::<Vec<_>>();
    assert_eq!(names(&with("CAP_BPF")), ["ptrace", "bpf"]);
    assert_eq!(names(&with("")), ["ptrace", "acct"]);
    assert!(with("").x86);
    assert_eq!(with("").default, Action::Errno(38));
}

#[test]
fn what_a_profile_gets_wrong_is_named() {
    let rule = |rule: &str| format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rule}]}}"#);
    for (text, named) in [
        ("", "EOF"),
        ("[]", "invalid"),
        ("{}", "defaultAction"),
        (r#"{"defaultAction":"ALLOW"}"#, "ALLOW"),
        (r#"{"defaultAction":"SCMP_ACT_ALLOW","errnoRet":1}"#, "errnoRet"),
        (r#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":1}"#, "1"),
        (r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":4096}"#, "4096"),
        (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "NOTIFY"),
        (r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#, "listenerPath"),
        (r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["x86"]}"#, "x86"),
        (r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_NEW"]}"#, "FLAG_NEW"),
        (&rule(r#"{"names":["sethostnam"],"action":"SCMP_ACT_ERRNO"}"#), "sethostnam"),
        (&rule(r#"{"names":[],"action":"SCMP_ACT_ERRNO"}"#), "no system call"),
        (&rule(r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","errno":"EIO"}"#), "EIO"),
        (
            &rule(r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}"#),
            "6",
        ),
        (
            &rule(r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"value":-1,"op":"SCMP_CMP_EQ"}]}"#),
            "-1",
        ),
    ] {
        let error = profile::parse(text.as_bytes(), &|_| false).expect_err(text).to_string();
        assert!(error.contains(named), "{text}: {error}");
    }
}

#[test]
fn a_profile_that_needs_too_long_a_program_is_refused() {
    let operator = |value| Condition { index: 0, operator: Operator::Equal(value) };
    let rule = |value| Rule { names: vec!["read".into()], action: Action::Allow, conditions: vec![operator(value)] };
    let with =
        |count| Profile { default: Action::Errno(1), x86: false, flags: 0, rules: (0..count).map(rule).collect() };
    let program = compile(&with(800)).expect("it fits");
    assert_eq!(run(&program, &Call::native("read", [799, 0, 0, 0, 0, 0])), ALLOW);
    assert!(matches!(compile(&with(900)), Err(ProfileError::TooLarge)));
    assert!(matches!(compile(&with(100_000)), Err(ProfileError::TooLarge)));
}

fn asking(kind: ProfileType, path: &str) -> cri::LinuxContainerSecurityContext {
    let seccomp = SecurityProfile { profile_type: kind.into(), localhost_ref: path.to_owned() };
    cri::LinuxContainerSecurityContext { seccomp: Some(seccomp), ..Default::default() }
}

#[expect(deprecated, reason = "the old field is what is tested")]
fn asking_by_path(path: &str) -> cri::LinuxContainerSecurityContext {
    cri::LinuxContainerSecurityContext { seccomp_profile_path: path.to_owned(), ..Default::default() }
}

#[test]
fn profiles_are_chosen_by_either_field() {
    let none = cri::LinuxContainerSecurityContext::default();
    assert_eq!(choose(&none), Ok(Choice::Unconfined));
    assert_eq!(choose(&asking(ProfileType::RuntimeDefault, "")), Ok(Choice::Default));
    assert_eq!(choose(&asking(ProfileType::Unconfined, "")), Ok(Choice::Unconfined));
    assert_eq!(choose(&asking(ProfileType::Localhost, "/a")), Ok(Choice::File("/a")));
    assert!(choose(&asking(ProfileType::RuntimeDefault, "/a")).is_err());
    for (path, choice) in [
        ("unconfined", Choice::Unconfined),
        ("runtime/default", Choice::Default),
        ("docker/default", Choice::Default),
        ("localhost//a", Choice::File("/a")),
    ] {
        assert_eq!(choose(&asking_by_path(path)), Ok(choice), "{path}");
    }
    assert!(choose(&asking_by_path("default")).is_err());
    let privileged = cri::LinuxContainerSecurityContext { privileged: true, ..asking(ProfileType::RuntimeDefault, "") };
    assert_eq!(filter(&privileged, &Capabilities::default()), Ok(Filter::default()));
}

#[test]
fn a_file_that_is_no_profile_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(path("text"), "not JSON").expect("written");
    std::fs::write(path("large"), vec![b' '; 1 + MAX_FILE as usize]).expect("written");
    rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("made");
    for (path, problem) in [
        (path("missing"), "No such file"),
        (path("text"), "not a seccomp profile"),
        (path("large"), "too large"),
        (path("fifo"), "not a regular file"),
        (path(""), "not a regular file"),
        ("relative".to_owned(), "not an absolute path"),
        (String::new(), "not an absolute path"),
    ] {
        let error = filter(&asking(ProfileType::Localhost, &path), &Capabilities::default()).expect_err(&path);
        assert_eq!(error.kind(), isopod_proto::ErrorKind::InvalidArgument);
        let error = error.to_string();
        assert!(error.contains(problem) && error.contains(&path), "{error}");
    }
}

/// What libseccomp makes of a profile without conflicts, and which of its system calls libseccomp knows.
fn by_libseccomp(profile: &Profile) -> (Vec<Instruction>, BTreeSet<u32>) {
    let mut rules = String::new();
    for rule in profile.rules.iter().filter(|rule| rule.action != profile.default) {
        let conditions: Vec<String> = rule
            .conditions
            .iter()
            .map(|condition| {
                let (operator, first, second) = match condition.operator {
                    Operator::NotEqual(value) => (1, value, 0),
                    Operator::Less(value) => (2, value, 0),
                    Operator::LessOrEqual(value) => (3, value, 0),
                    Operator::Equal(value) => (4, value, 0),
                    Operator::GreaterOrEqual(value) => (5, value, 0),
                    Operator::Greater(value) => (6, value, 0),
                    Operator::MaskedEqual { mask, value } => (7, mask, value),
                };
                format!("({}, {operator}, {first}, {second})", condition.index)
            })
            .collect();
        rules += &format!("({:?}, {}, [{}]),", rule.names, rule.action.value(), conditions.join(","));
    }
    let script = format!(
        "import ctypes, sys\n\
         lib = ctypes.CDLL('libseccomp.so.2')\n\
         lib.seccomp_init.restype = ctypes.c_void_p\n\
         class Condition(ctypes.Structure):\n\
         \x20   _fields_ = [('index', ctypes.c_uint), ('operator', ctypes.c_int), ('a', ctypes.c_uint64), ('b', ctypes.c_uint64)]\n\
         context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32({default})))\n\
         for names, action, conditions in [{rules}]:\n\
         \x20   for name in names:\n\
         \x20       number = lib.seccomp_syscall_resolve_name(name.encode())\n\
         \x20       if number < 0: continue\n\
         \x20       print(number, file=sys.stderr)\n\
         \x20       array = (Condition * len(conditions))(*conditions)\n\
         \x20       assert lib.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(conditions), array) == 0, name\n\
         assert lib.seccomp_export_bpf(context, 1) == 0\n",
        default = profile.default.value()
    );
    let output = std::process::Command::new("python3").arg("-c").arg(script).output().expect("python3 is there");
    let errors = String::from_utf8(output.stderr).expect("text");
    assert!(output.status.success(), "{errors}");
    let instruction = |bytes: &[u8]| Instruction {
        code: u16::from_le_bytes([bytes[0], bytes[1]]),
        when_true: bytes[2],
        when_false: bytes[3],
        k: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    };
    let known = errors.lines().map(|number| number.parse().expect("a number")).collect();
    (output.stdout.chunks(8).map(instruction).collect(), known)
}

#[test]
fn the_default_profile_is_what_libseccomp_makes_of_it() {
    if !std::path::Path::new("/usr/lib/x86_64-linux-gnu/libseccomp.so.2").exists() {
        println!("skipped: there is no libseccomp");
        return;
    }
    for capabilities in [&[][..], &["CAP_SYS_ADMIN", "CAP_SYS_NICE"]] {
        let profile = default::profile(&|name| capabilities.contains(&name));
        let (ours, (theirs, known)) = (defaults(capabilities), by_libseccomp(&profile));
        assert!(known.len() > 280, "{}", known.len());
        let values = [0u64, 1, 2, 8, 40, 0x2_0008, 0xffff_ffff, 0x1000_0011, 0x7e02_0000, 1 << 32, (1 << 32) + 40];
        for (&number, value) in known.iter().flat_map(|number| values.map(|value| (number, value))) {
            let call = Call { number, architecture: NATIVE, arguments: [value, value, 0, 0, 0, 0] };
            assert_eq!(run(&ours, &call), run(&theirs, &call), "{call:?}");
        }
    }
}

/// Loads a filter with the real kernel and makes system calls under it; what each failed with, 0 for none.
fn under(filter: &Filter, calls: &str) -> String {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(&filter.program).expect("written");
    let script = format!(
        "import ctypes, sys\n\
         libc = ctypes.CDLL(None, use_errno=True)\n\
         def call(*arguments):\n\
         \x20   ctypes.set_errno(0)\n\
         \x20   libc.syscall(*[ctypes.c_long(argument) for argument in arguments])\n\
         \x20   return ctypes.get_errno()\n\
         code = open(sys.argv[1], 'rb').read()\n\
         buffer = ctypes.create_string_buffer(code, len(code))\n\
         class Program(ctypes.Structure):\n\
         \x20   _fields_ = [('length', ctypes.c_ushort), ('filter', ctypes.c_void_p)]\n\
         program = Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))\n\
         assert libc.prctl(38, 1, 0, 0, 0) == 0\n\
         assert libc.syscall(317, 1, 0, ctypes.byref(program)) == 0\n\
         print(*[call(*arguments) for arguments in [{calls}]])\n"
    );
    let output = std::process::Command::new("python3").arg("-c").arg(script).arg(file.path()).output();
    let output = output.expect("python3 is there: the test images are made with it");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

#[test]
fn the_kernel_takes_a_program_and_refuses_by_it() {
    let default = filter(&asking(ProfileType::RuntimeDefault, ""), &Capabilities::default()).expect("it compiles");
    // getpid; unshare(0); clone3; io_uring_setup; socket(AF_VSOCK, SOCK_STREAM); personality(tell); personality(ADDR_NO_RANDOMIZE)
    let calls = "(39,), (272, 0), (435, 0, 0), (425, 1, 0), (41, 40, 1, 0), (135, 0xffffffff), (135, 0x40000), (9999,)";
    assert_eq!(under(&default, calls), "0 1 38 1 1 0 1 38");

    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("profile.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["umask"],"action":"SCMP_ACT_ERRNO","errnoRet":42,"args":[{"index":0,"value":7,"op":"SCMP_CMP_GT"}]}]}"#;
    std::fs::write(&path, text).expect("written");
    let context = asking(ProfileType::Localhost, path.to_str().expect("text"));
    let local = filter(&context, &Capabilities::default()).expect("it compiles");
    assert_eq!(under(&local, "(95, 7), (95, 8), (95, 1 << 40)"), "0 42 42");
}
