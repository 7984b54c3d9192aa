use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use super::list::parse;
use super::*;
use crate::cri;
use crate::network::ports::{HostPort, Protocol};

/// A directory with plugins that are shell scripts, and CNI with it.
struct Site {
    directory: tempfile::TempDir,
    cni: Cni,
}

impl Site {
    fn new(plugins: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let config = CniConfig {
            config_directory: directory.path().join("net.d"),
            plugin_directories: vec![directory.path().join("none"), directory.path().join("bin")],
            deadline: Duration::from_secs(5),
        };
        for folder in ["net.d", "bin"] {
            std::fs::create_dir(directory.path().join(folder)).expect("made");
        }
        for (name, script) in plugins {
            let path = directory.path().join("bin").join(name);
            std::fs::write(&path, format!("#!/bin/sh\ncd {}\n{script}\n", directory.path().display()))
                .expect("written");
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("set");
        }
        Self { cni: Cni::new(&config), directory }
    }

    fn configure(&self, file: &str, text: &str) {
        std::fs::write(self.directory.path().join("net.d").join(file), text).expect("written");
    }

    fn written(&self, file: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(file)).unwrap_or_default()
    }

    fn attachment(&self, version: &str, plugins: &[&str]) -> Attachment {
        let plugins: Vec<_> =
            plugins.iter().map(|kind| json!({ "type": kind, "capabilities": { "portMappings": true } })).collect();
        let list = json!({ "cniVersion": version, "name": "net", "plugins": plugins }).to_string();
        Attachment {
            sandbox: ObjectId::from_random([7; 32]),
            list: parse(list.as_bytes()).expect("valid"),
            namespace: self.directory.path().into(),
            arguments: "IgnoreUnknown=1;K8S_POD_NAME=p".to_owned(),
            runtime_config: Map::from_iter([
                ("portMappings".to_owned(), json!([{ "hostPort": 80 }])),
                ("bandwidth".to_owned(), json!({})),
            ]),
            result: None,
        }
    }
}

const RESULT: &str = r#"{"cniVersion":"1.0.0","ips":[{"address":"10.1.0.2/24"}]}"#;

#[test]
fn the_first_file_in_lexical_order_is_the_network() {
    let site = Site::new(&[]);
    assert_eq!(site.cni.network().expect("nothing is wrong"), None);
    site.configure("00-readme.txt", "not a configuration");
    assert_eq!(site.cni.network().expect("nothing is wrong"), None);
    site.configure("20-b.conflist", r#"{"cniVersion":"1.0.0","name":"b","plugins":[{"type":"x"}]}"#);
    site.configure("10-a.conf", r#"{"cniVersion":"0.4.0","name":"a","type":"bridge","mtu":1400}"#);
    let list = site.cni.network().expect("valid").expect("there");
    assert_eq!((list.name.as_str(), list.version, list.plugins[0].kind.as_str()), ("a", Version::V0_4_0, "bridge"));
    assert_eq!(list.plugins[0].config.get("mtu"), Some(&json!(1400)));
    site.configure("05-broken.conflist", "{");
    let error = site.cni.network().expect_err("it is broken");
    assert!(error.to_string().contains("05-broken.conflist"), "{error}");
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
}

#[test]
fn a_directory_that_is_not_there_configures_nothing() {
    let config = CniConfig {
        config_directory: "/nonexistent/net.d".into(),
        plugin_directories: Vec::new(),
        deadline: Duration::from_secs(1),
    };
    assert_eq!(Cni::new(&config).network().expect("nothing is wrong"), None);
}

#[test]
fn what_is_no_configuration_is_told() {
    for (text, part) in [
        ("[]", "object"),
        (r#"{"cniVersion":"1.0.0","plugins":[]}"#, "name"),
        (r#"{"cniVersion":"1.0.0","name":"a/b","plugins":[{"type":"x"}]}"#, "a/b"),
        (r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#, "0 plugins"),
        (r#"{"cniVersion":"1.0.0","name":"n","plugins":{}}"#, "list"),
        (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{}]}"#, "type"),
        (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"../x"}]}"#, "../x"),
        (r#"{"cniVersion":"9.0.0","name":"n","plugins":[{"type":"x"}]}"#, "9.0.0"),
        (r#"{"name":"n","plugins":[{"type":"x"}]}"#, "cniVersion"),
    ] {
        let problem = parse(text.as_bytes()).expect_err(text);
        assert!(problem.contains(part), "{text}: {problem}");
    }
    let several =
        r#"{"cniVersion":"0.3.1","cniVersions":["0.4.0","1.1.0","2.0.0"],"name":"n","plugins":[{"type":"x"}]}"#;
    assert_eq!(parse(several.as_bytes()).expect("valid").version, Version::V1_1_0);
}

#[tokio::test]
async fn plugins_are_chained_and_told_what_they_ask_for() {
    let first = format!("cat >first.in; env >first.env; echo '{RESULT}'");
    let second = format!("cat >second.in; echo '{}'", RESULT.replace("10.1.0.2", "10.1.0.3"));
    let site = Site::new(&[("first", &first), ("second", &second)]);
    let mut attachment = site.attachment("1.0.0", &["first", "second"]);
    site.cni.add(&mut attachment).await.expect("added");

    let environment = site.written("first.env");
    let id = attachment.sandbox.to_string();
    let paths = format!("CNI_PATH={0}/none:{0}/bin", site.directory.path().display());
    let namespace = format!("CNI_NETNS={}", site.directory.path().display());
    for variable in [
        "CNI_COMMAND=ADD",
        &format!("CNI_CONTAINERID={id}"),
        "CNI_IFNAME=eth0",
        "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=p",
        &paths,
        &namespace,
    ] {
        assert!(environment.lines().any(|line| line == variable), "{variable} in {environment}");
    }
    let input: Value = serde_json::from_str(&site.written("first.in")).expect("JSON");
    assert_eq!((&input["name"], &input["cniVersion"]), (&json!("net"), &json!("1.0.0")));
    assert_eq!(input["runtimeConfig"], json!({ "portMappings": [{ "hostPort": 80 }] }));
    assert_eq!(input.get("prevResult"), None);
    let input: Value = serde_json::from_str(&site.written("second.in")).expect("JSON");
    assert_eq!(input["prevResult"]["ips"][0]["address"], "10.1.0.2/24");
    let outcome = Outcome::parse(attachment.result.as_ref().expect("entered")).expect("valid");
    assert_eq!(outcome.addresses, ["10.1.0.3".parse::<std::net::IpAddr>().expect("valid")]);

    // In reverse, with the result; and once more, with the namespace gone.
    let site = Site::new(&[
        ("first", "cat >>del.in; echo first $CNI_COMMAND >>order"),
        ("second", "cat >/dev/null; echo second $CNI_COMMAND [$CNI_NETNS] >>order"),
    ]);
    site.cni.del(&attachment).await.expect("deleted");
    attachment.namespace = "/nonexistent/namespace".into();
    site.cni.del(&attachment).await.expect("deleted again");
    assert_eq!(site.written("order").lines().filter(|line| *line == "first DEL").count(), 2);
    assert!(site.written("order").ends_with("second DEL []\nfirst DEL\n"));
    assert!(site.written("del.in").contains("10.1.0.3/24"));
}

#[tokio::test]
async fn before_0_4_0_there_is_no_check_and_no_result_at_del() {
    let site = Site::new(&[("p", "cat >input; echo $CNI_COMMAND >>order")]);
    let mut attachment = site.attachment("0.3.1", &["p"]);
    attachment.result = Some(serde_json::from_str(RESULT).expect("JSON"));
    site.cni.check(&attachment).await.expect("nothing to do");
    site.cni.gc(&attachment.list, &[]).await.expect("nothing to do");
    site.cni.del(&attachment).await.expect("deleted");
    assert_eq!((site.written("order").as_str(), site.written("input").contains("prevResult")), ("DEL\n", false));
}

#[tokio::test]
async fn status_and_gc_are_called_from_1_1_0_on() {
    let site = Site::new(&[(
        "p",
        "cat >input; echo $CNI_COMMAND >>order; [ $CNI_COMMAND != STATUS ] || { echo '{\"code\":50,\"msg\":\"not yet\"}'; exit 1; }",
    )]);
    let list = site.attachment("1.1.0", &["p"]).list;
    let error = site.cni.status(&list).await.expect_err("not available");
    assert_eq!(error.to_string(), "CNI plugin p failed at STATUS: not yet (code 50)");
    site.cni.gc(&list, &[ObjectId::from_random([7; 32])]).await.expect("done");
    assert_eq!(site.written("order"), "STATUS\nGC\n");
    assert!(site.written("input").contains("cni.dev/valid-attachments") && site.written("input").contains("0707"));
    site.cni.status(&site.attachment("1.0.0", &["p"]).list).await.expect("it is there");
    let error = site.cni.status(&site.attachment("1.0.0", &["p", "missing"]).list).await.expect_err("it is not");
    assert!(error.to_string().contains("missing"), "{error}");
}

#[tokio::test]
async fn a_plugin_that_fails_is_told_by_its_message() {
    let site = Site::new(&[
        (
            "says",
            "echo '{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"no address\",\"details\":\"pool is empty\"}'; exit 1",
        ),
        ("dies", "echo broken pipe dream >&2; exit 3"),
        ("rubbish", "echo hello"),
        ("other", "echo '{\"cniVersion\":\"0.2.0\"}'"),
    ]);
    for (plugin, message, kind) in [
        ("says", "failed at ADD: no address; pool is empty (code 11)", ErrorKind::Unavailable),
        ("dies", "exit status: 3; broken pipe dream", ErrorKind::Internal),
        ("rubbish", "not JSON", ErrorKind::Internal),
        ("other", "version \"0.2.0\"", ErrorKind::Internal),
        ("absent", "is in none of", ErrorKind::FailedPrecondition),
    ] {
        let mut attachment = site.attachment("1.0.0", &[plugin]);
        let error = site.cni.add(&mut attachment).await.expect_err(plugin);
        assert!(error.to_string().contains(plugin) && error.to_string().contains(message), "{error}");
        assert_eq!((error.kind(), attachment.result), (kind, None), "{error}");
    }
}

#[tokio::test]
async fn a_plugin_that_hangs_or_floods_is_killed_with_what_it_started() {
    let mut site = Site::new(&[
        ("hangs", "sleep 1000 & echo $! >child; wait"),
        ("floods", "sleep 1000 & echo $! >child; yes"),
        ("screams", "sleep 1000 & echo $! >child; yes >&2"),
    ]);
    site.cni.runner.deadline = Duration::from_secs(2);
    for plugin in ["hangs", "floods", "screams"] {
        let start = Instant::now();
        let mut attachment = site.attachment("1.0.0", &[plugin]);
        let error = site.cni.add(&mut attachment).await.expect_err(plugin);
        assert!(start.elapsed() < Duration::from_secs(8), "{plugin}: {:?}", start.elapsed());
        match plugin {
            "hangs" => assert_eq!(error.kind(), ErrorKind::DeadlineExceeded),
            _ => assert!(error.to_string().contains("printed more than"), "{error}"),
        }
        let child = site.written("child").trim().to_owned();
        assert!(!child.is_empty());
        // It is a zombie until init, or whoever stands in for it, has reaped it.
        let ended = || {
            let stat = std::fs::read_to_string(Path::new("/proc").join(&child).join("stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ") || stat.contains(") X ")
        };
        while !ended() {
            assert!(start.elapsed() < Duration::from_secs(8), "{plugin} has left a process");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn results_of_all_versions_are_read() {
    let old = json!({ "cniVersion": "0.3.1", "interfaces": [{ "name": "cni0" }, { "name": "veth1" },
        { "name": "eth0", "mac": "aa:bb:cc:dd:ee:ff", "sandbox": "/run/netns/x" }],
        "ips": [{ "version": "4", "address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 2 }],
        "routes": [{ "dst": "0.0.0.0/0" }], "dns": { "nameservers": ["10.1.0.1"], "search": ["x"] } });
    let outcome = Outcome::parse(&old).expect("valid");
    assert_eq!((outcome.addresses.len(), outcome.others.len()), (1, 0));
    assert_eq!(outcome.dns.expect("given").nameservers, ["10.1.0.1"]);
    let new = json!({ "cniVersion": "1.1.0", "interfaces": [{ "name": "eth0", "mtu": 1500, "sandbox": "/x" },
        { "name": "net1", "sandbox": "/x" }], "dns": {},
        "ips": [{ "address": "fd00::5/64", "interface": 0 }, { "address": "10.1.0.5/24", "interface": 0 },
            { "address": "10.2.0.5/24", "interface": 1 }] });
    let outcome = Outcome::parse(&new).expect("valid");
    assert_eq!((outcome.addresses.len(), outcome.others, outcome.dns), (2, vec!["net1".to_owned()], None));
    for bad in [
        json!({}),
        json!([]),
        json!({ "ips": [{ "address": "10.1.0.5" }] }),
        json!({ "ips": [{ "address": "10.1.0.5/24", "interface": 3 }], "interfaces": [] }),
        json!({ "ips": [{ "address": "10.1.0.5/24", "interface": 0 }], "interfaces": [{ "name": "cni0" }] }),
    ] {
        assert!(Outcome::parse(&bad).is_err(), "{bad}");
    }
}

#[test]
fn a_pod_that_a_plugin_cannot_be_told_of_is_refused() {
    let site = Site::new(&[]);
    let list = site.attachment("1.0.0", &["p"]).list;
    let plain = parse(br#"{"cniVersion":"1.0.0","name":"n","type":"x"}"#).expect("valid");
    let id = ObjectId::from_random([7; 32]);
    let metadata =
        cri::PodSandboxMetadata { name: "p".into(), namespace: "n".into(), uid: "u".into(), ..Default::default() };
    let mut config = cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
    config.annotations.insert("kubernetes.io/ingress-bandwidth".to_owned(), "10M".to_owned());
    let ports = [HostPort {
        protocol: Protocol::Udp,
        host_ip: Some("127.0.0.1".parse().expect("valid")),
        host_port: 53,
        container_port: 5353,
    }];
    let told = PodArguments::of(&list, &id, &config, &ports).expect("valid");
    assert_eq!(
        told.arguments,
        format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=n;K8S_POD_NAME=p;K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID=u")
    );
    let mapping = json!([{ "hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "127.0.0.1" }]);
    assert_eq!(told.runtime_config["portMappings"], mapping);
    assert_eq!(told.runtime_config["bandwidth"]["ingressRate"], json!(10_000_000));
    let error = PodArguments::of(&plain, &id, &config, &ports).expect_err("nobody makes them");
    assert!(error.to_string().contains("portMappings"), "{error}");
    config.annotations.insert("kubernetes.io/egress-bandwidth".to_owned(), "fast".to_owned());
    assert!(PodArguments::of(&list, &id, &config, &[]).expect_err("no rate").to_string().contains("fast"));
    config.annotations.clear();
    config.metadata.get_or_insert_default().name = "p;CNI_COMMAND=x".to_owned();
    assert!(PodArguments::of(&list, &id, &config, &[]).is_err());
}
