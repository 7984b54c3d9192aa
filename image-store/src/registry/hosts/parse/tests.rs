use proptest::prelude::*;

use super::*;

const FILE: &str = "/certs.d/r.example/hosts.toml";

fn hosts(text: &str) -> Vec<Host> {
    let parsed = parse(text, Path::new(FILE)).unwrap();
    assert_eq!(parsed.unknown, Vec::<String>::new());
    parsed.hosts
}

fn url(host: &Host) -> &str {
    host.api.as_ref().map_or("itself", Url::as_str)
}

#[test]
fn the_example_of_containerd_s_documentation_is_understood() {
    let hosts = hosts(
        r#"
        server = "https://registry-1.docker.io"    # Exclude this to not use upstream

        [host."https://public-mirror.example.com"]
          capabilities = ["pull"]
        [host."https://docker-mirror.internal"]
          capabilities = ["pull", "resolve", "push"]
          ca = "docker-mirror.crt"
          dial_timeout = "1.5s"
          [host."https://docker-mirror.internal".header]
            x-custom-1 = ["custom header part a", "part b"]
        [host."http://192.168.31.250:5000/a/"]
          skip_verify = true
          client = [["client.cert", "/etc/client.key"]]
          proxy = "http://proxy:8080"
        [host."bare.example/v2/"]
          override_path = true
          client = ["both.pem"]
        "#,
    );
    let urls: Vec<_> = hosts.iter().map(url).collect();
    assert_eq!(
        urls,
        [
            "https://public-mirror.example.com/v2",
            "https://docker-mirror.internal/v2",
            "http://192.168.31.250:5000/a/v2",
            "https://bare.example/v2",
            "https://registry-1.docker.io/v2"
        ]
    );
    let can: Vec<_> = hosts.iter().map(|host| (host.pull, host.resolve)).collect();
    assert_eq!(can, [(true, false), (true, true), (true, true), (true, true), (true, true)]);
    assert_eq!(hosts[1].ca, [Path::new("/certs.d/r.example/docker-mirror.crt")]);
    assert_eq!(hosts[1].connect_timeout, Some(Duration::from_millis(1500)));
    assert_eq!(hosts[1].headers.get_all("X-Custom-1").iter().count(), 2);
    assert!(hosts[2].skip_verify && !hosts[1].skip_verify);
    assert_eq!(hosts[2].proxy.as_ref().unwrap().as_str(), "http://proxy:8080/");
    assert_eq!(hosts[2].client, Some(("/certs.d/r.example/client.cert".into(), Some("/etc/client.key".into()))));
    assert_eq!(hosts[3].client, Some(("/certs.d/r.example/both.pem".into(), None)));
}

#[test]
fn the_registry_itself_comes_last_where_no_server_is_named() {
    let hosts = hosts("ca = [\"a.crt\"]\ncapabilities = [\"push\"]\n[host.\"https://m\"]\n");
    assert_eq!(hosts.iter().map(url).collect::<Vec<_>>(), ["https://m/v2", "itself"]);
    assert_eq!((hosts[1].ca.len(), hosts[1].pull, hosts[1].resolve), (1, true, true));
    let without = parse("", Path::new(FILE)).unwrap().hosts;
    assert_eq!(without, [Host::itself()]);
}

#[test]
fn a_mistake_is_named_with_its_file_and_key() {
    for (text, key) in [
        ("server = 1", "server"),
        ("server = \"ftp://x\"", "server"),
        ("server = \"https://u:p@x\"", "server"),
        ("host = 1", "host"),
        ("[host]\n\"https://m\" = 1", "host.\"https://m\""),
        ("[host.\"https://m?x\"]", "host.\"https://m?x\""),
        ("[host.\"https://m\"]\ncapabilities = [\"fetch\"]", "host.\"https://m\".capabilities"),
        ("[host.\"https://m\"]\nca = [1]", "host.\"https://m\".ca"),
        ("client = [\"a\", \"b\"]", "client"),
        ("client = [[\"a\", \"b\", \"c\"]]", "client"),
        ("client = {}", "client"),
        ("skip_verify = \"yes\"", "skip_verify"),
        ("override_path = 1\nserver = \"x\"", "override_path"),
        ("dial_timeout = \"soon\"", "dial_timeout"),
        ("dial_timeout = \"1000h\"", "dial_timeout"),
        ("proxy = \"socks5://x\"", "proxy"),
        ("header = [\"x\"]", "header"),
        ("[header]\n\"a b\" = \"x\"", "header.\"a b\""),
        ("[header]\na = \"x\\ny\"", "header.\"a\""),
    ] {
        let error = parse(text, Path::new(FILE)).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{FILE}: {key}: ")), "{text:?} gives {error:?}");
    }
    assert!(matches!(parse("server =", Path::new(FILE)), Err(RegistryError::Syntax { .. })));
    let many: String = (0..=MAX_HOSTS).map(|number| format!("[host.\"https://m{number}\"]\n")).collect();
    assert!(parse(&many, Path::new(FILE)).is_err());
}

#[test]
fn unknown_keys_are_passed_over_and_told() {
    let parsed = parse("plan = 1\n[host.\"https://m\"]\nrewrite = {}\n", Path::new(FILE)).unwrap();
    assert_eq!(parsed.unknown, ["host.\"https://m\".rewrite", "plan"]);
    assert_eq!(parsed.hosts.len(), 2);
}

#[test]
fn times_are_as_go_writes_them() {
    for (text, millis) in [("1s", 1000), ("1m30s", 90_000), ("1.5s", 1500), ("250ms", 250), ("0", 0), ("0s", 0)] {
        assert_eq!(go_duration(text), Some(Duration::from_millis(millis)), "{text}");
    }
    for bad in ["", "1", "s", "1 s", "-1s", "1.2.3s", "1x", ".s", "9".repeat(400).as_str()] {
        assert_eq!(go_duration(bad), None, "{bad}");
    }
}

/// One host's settings and the text that says so.
fn settings() -> impl Strategy<Value = (Host, String)> {
    let capabilities = proptest::sample::subsequence(vec!["pull", "resolve", "push"], 0..=3);
    let files = proptest::collection::vec("[a-z]{1,8}\\.crt", 0..3);
    let header = proptest::option::of(("[a-z-]{1,10}", "[ -~&&[^\"\\\\]]{0,20}"));
    let timeout = proptest::option::of(1..600u64);
    (capabilities, files, header, timeout, any::<bool>()).prop_map(|(capabilities, files, header, timeout, skip)| {
        let mut host = Host::itself();
        let mut text = format!("capabilities = {capabilities:?}\nskip_verify = {skip}\nca = {files:?}\n");
        host.pull = capabilities.is_empty() || capabilities.contains(&"pull");
        host.resolve = capabilities.is_empty() || capabilities.contains(&"resolve");
        host.skip_verify = skip;
        host.ca = files.iter().map(|file| Path::new("/certs.d/r.example").join(file)).collect();
        if let Some(seconds) = timeout {
            host.connect_timeout = Some(Duration::from_secs(seconds));
            text += &format!("dial_timeout = \"{seconds}s\"\n");
        }
        if let Some((name, value)) = header {
            host.headers.insert(HeaderName::try_from(&name).unwrap(), HeaderValue::try_from(&value).unwrap());
            text += &format!("header = {{ {name:?} = {value:?} }}\n");
        }
        (host, text)
    })
}

proptest! {
    #[test]
    fn what_is_written_is_what_is_read(
        given in proptest::collection::btree_map("[a-z]{1,10}(:[1-9][0-9]{3})?(/[a-z]{1,5})?", settings(), 0..6),
        order in any::<u64>(),
    ) {
        let mut given: Vec<_> = given.into_iter().collect();
        let count = given.len().max(1);
        given.rotate_left(order as usize % count);
        let mut text = String::new();
        let mut wanted = Vec::new();
        for (name, (mut host, settings)) in given {
            text += &format!("[host.\"http://{name}\"]\n{settings}");
            host.api = Some(Url::parse(&format!("http://{name}/v2")).unwrap());
            wanted.push(host);
        }
        wanted.push(Host::itself());
        prop_assert_eq!(hosts(&text), wanted);
    }

    #[test]
    fn no_text_makes_it_panic(
        pieces in proptest::collection::vec(
            prop_oneof![
                Just("[host.\"https://m\"]\n".to_owned()),
                Just("[host.\"https://m\".header]\n".to_owned()),
                "(server|ca|client|capabilities|skip_verify|header|override_path|dial_timeout|proxy|host) = \
                 (1|true|\"[a-z:/.0-9]{0,12}\"|\\[\"[a-z]{0,4}\"(, \\[\"a\"(, \"b\")?\\])?\\]|\\{ a = [\"x1]{1,3} \\})\n",
                "\\PC{0,30}\n",
            ],
            0..12,
        ),
    ) {
        let text = pieces.concat();
        if let Ok(parsed) = parse(&text, Path::new(FILE)) {
            prop_assert!(!parsed.hosts.is_empty());
        }
    }
}
