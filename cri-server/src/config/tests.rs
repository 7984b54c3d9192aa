use super::check::*;
use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("test.toml"))
}

#[test]
fn an_empty_file_is_the_same_as_the_default_file() {
    let (empty, default) = (parse("").expect("valid"), parse(DEFAULT_FILE).expect("valid"));
    assert_eq!(format!("{empty:?}"), format!("{default:?}"));
}

#[test]
fn the_group_of_the_socket_is_a_name_or_a_number_and_can_reach_it() {
    let elsewhere = "socket = \"unix:///run/cri.sock\"\nsocket_group = ";
    assert_eq!(parse(&format!("{elsewhere}4321")).expect("valid").socket_group, Some(4321));
    assert_eq!(parse(&format!("{elsewhere}\"root\"")).expect("valid").socket_group, Some(0));
    assert_eq!(parse("").expect("valid").socket_group, None);
    for bad in [format!("{elsewhere}\"no such group\""), "socket_group = 4321".to_owned()] {
        let Err(ConfigError::Mistakes { mistakes, .. }) = parse(&bad) else { panic!("{bad} is a mistake") };
        assert_eq!(mistakes.iter().map(|mistake| mistake.field).collect::<Vec<_>>(), ["socket_group"]);
    }
}

#[test]
fn every_mistake_is_reported_in_one_run() {
    let text = "socket = \"tcp://x\"\nroot = \"var\"\n[vmm]\nvcpus = 65\n[network]\nsubnet = \"10.88.0.1/16\"\nsubnet6 = \"fe80::/64\"\nmtu = 1\nbridge = \"a/b\"\n[images.mirrors]\n\"docker.io\" = \"localhost:5000\"";
    let Err(ConfigError::Mistakes { mistakes, .. }) = parse(text) else { panic!("it has mistakes") };
    let fields: Vec<_> = mistakes.iter().map(|mistake| mistake.field).collect();
    assert_eq!(
        fields,
        [
            "socket",
            "root",
            "vmm.vcpus",
            "images.mirrors",
            "network.bridge",
            "network.subnet",
            "network.subnet6",
            "network.mtu"
        ]
    );
}

#[test]
fn an_ipv6_subnet_has_room_for_all_pods() {
    assert!(parse_subnet6("fd00::/112", 16).is_ok());
    assert!(parse_subnet6("fd00::/113", 16).expect_err("too small").contains("112"));
    for bad in ["fd00::1/64", "10.0.0.0/8", "ff02::/64", "::/64", "fd00::"] {
        assert!(parse_subnet6(bad, 16).is_err(), "{bad}");
    }
}

#[test]
fn the_streaming_server_is_for_this_machine_alone() {
    assert_eq!(parse("[streaming]\naddress = \"::1\"").expect("valid").streaming.address.to_string(), "[::1]:0");
    for address in ["0.0.0.0", "192.0.2.1", "localhost"] {
        assert!(parse(&format!("[streaming]\naddress = {address:?}")).is_err());
    }
}

#[test]
fn an_unknown_field_is_refused() {
    let error = parse("[vmm]\nkernle = \"/x\"").expect_err("no such field");
    assert!(std::error::Error::source(&error).is_some_and(|source| source.to_string().contains("kernle")));
}

#[test]
fn a_state_directory_too_long_for_a_socket_is_refused() {
    let text = format!("state = \"/{}\"", "x".repeat(MAX_STATE_DIR));
    assert!(matches!(parse(&text), Err(ConfigError::Mistakes { .. })));
}
