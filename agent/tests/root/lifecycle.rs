//! Creation, start, end, removal; errors that say what is wrong.

use isopod_proto::agent::{
    CreateContainerRequest, ExecRequest, PidMode, Process, RemoveContainerRequest, RemoveProcessRequest, SignalRequest,
    StartContainerRequest, StatsRequest, User,
};
use tonic::Code;

use crate::fixture::{fixture, new_id, process, request};

#[tokio::test]
async fn root_output_and_exit_code_are_those_of_the_program() {
    let Some(mut fixture) = fixture().await else { return };
    let (exit, output) = fixture.complete("echo hello; exit 7").await;
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed, output.as_str()), (7, 0, false, "hello\n"));
    assert!(exit.finished_at_nanos > 0);
}

#[tokio::test]
async fn root_a_signal_is_told_from_an_exit() {
    let Some(mut fixture) = fixture().await else { return };
    let id = fixture.run("trap 'exit 3' TERM; sleep 1000 & wait").await;
    let signal = |signal, all| SignalRequest { process_id: id.clone(), signal, all };
    // The shell needs a moment to set its trap.
    let (_, _) = fixture.exec(&id, "sleep 0.3").await;
    fixture.client.signal(signal(15, false)).await.unwrap();
    let exit = fixture.wait(&id).await;
    assert_eq!((exit.exit_code, exit.signal), (3, 0));
    assert_eq!(fixture.client.signal(signal(15, false)).await.unwrap_err().code(), Code::FailedPrecondition);

    let id = fixture.run("sleep 1000").await;
    fixture.client.signal(SignalRequest { process_id: id.clone(), signal: 9, all: true }).await.unwrap();
    let exit = fixture.wait(&id).await;
    assert_eq!((exit.exit_code, exit.signal), (137, 9));
}

#[tokio::test]
async fn root_a_command_that_cannot_run_is_an_error_of_the_start() {
    let Some(mut fixture) = fixture().await else { return };
    let cases = [
        ("no-such-command", Code::NotFound),
        ("/no/such/path", Code::NotFound),
        ("/etc/not-executable", Code::InvalidArgument),
        ("/etc", Code::InvalidArgument),
    ];
    for (command, code) in cases {
        let mut request = request("");
        let process = request.process.as_mut().unwrap();
        process.args = vec![command.into()];
        let id = request.id.clone();
        fixture.client.create_container(request).await.unwrap();
        let error = fixture.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(command), "{error}");
        fixture.client.remove_container(RemoveContainerRequest { id }).await.unwrap();
    }
}

#[tokio::test]
async fn root_a_user_that_is_not_in_the_image_is_named() {
    let Some(mut fixture) = fixture().await else { return };
    for (user, named) in [("nobody-here", "nobody-here"), ("web:no-group", "no-group")] {
        let mut request = request("true");
        request.process.as_mut().unwrap().user = Some(User { user: user.into(), ..User::default() });
        let id = request.id.clone();
        let error = fixture.client.create_container(request).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(named), "{error}");
        assert!(!fixture.path("run/scratch/containers").join(id).exists());
    }
    let mut request = request("id -u; id -g; id -G; echo $HOME");
    request.process.as_mut().unwrap().user =
        Some(User { user: "web".into(), supplemental_groups: vec![99], strict_groups: false });
    assert_eq!(fixture.output_of(request).await, "33\n34\n34 6 99\n/var/www\n");
}

#[tokio::test]
async fn root_removal_leaves_nothing_and_can_be_repeated() {
    let Some(mut fixture) = fixture().await else { return };
    let id = fixture.run("sleep 1000").await;
    for _ in 0..2 {
        fixture.client.remove_container(RemoveContainerRequest { id: id.clone() }).await.unwrap();
    }
    assert_eq!(
        fixture.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap_err().code(),
        Code::NotFound
    );
    let left = |directory: &str| fixture.path(directory).join(&id).exists();
    assert!(!left("run/containers"));
    let stats = fixture.client.clone().stats(StatsRequest::default()).await.unwrap().into_inner();
    assert!(stats.containers.is_empty());
}

#[tokio::test]
async fn root_an_id_is_used_once() {
    let Some(mut fixture) = fixture().await else { return };
    let id = fixture.run("sleep 1000").await;
    let again = CreateContainerRequest { id: id.clone(), ..request("true") };
    assert_eq!(fixture.client.create_container(again).await.unwrap_err().code(), Code::AlreadyExists);
    let start = fixture.client.start_container(StartContainerRequest { id }).await.unwrap_err();
    assert_eq!(start.code(), Code::FailedPrecondition);
    let bad = CreateContainerRequest { id: "../x".into(), ..request("true") };
    assert_eq!(fixture.client.create_container(bad).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn root_exec_runs_in_the_container() {
    let Some(mut fixture) = fixture().await else { return };
    let id = fixture.run("touch /tmp/mark; sleep 1000").await;
    assert_eq!(fixture.exec(&id, "sleep 0.2; ls /tmp; exit 4").await, (4, "mark\n".into()));
    let (_, processes) = fixture.exec(&id, "ps -o comm | grep -cx sleep").await;
    assert_eq!(processes, "1\n");

    let exec = |args: &[&str]| ExecRequest {
        container_id: id.clone(),
        process_id: new_id(),
        process: Some(Process { args: args.iter().map(|arg| (*arg).into()).collect(), ..process("") }),
    };
    let error = fixture.client.exec(exec(&["no-such-command"])).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    let running = exec(&["sleep", "1000"]);
    let process_id = running.process_id.clone();
    fixture.client.exec(running).await.unwrap();
    fixture.client.signal(SignalRequest { process_id: id.clone(), signal: 9, all: false }).await.unwrap();
    assert_eq!(fixture.wait(&process_id).await.exit_code, 137, "it is killed with its container");
    fixture.client.remove_process(RemoveProcessRequest { process_id: process_id.clone() }).await.unwrap();
    fixture.client.remove_process(RemoveProcessRequest { process_id }).await.unwrap();
    assert_eq!(fixture.client.exec(exec(&["true"])).await.unwrap_err().code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn root_pid_namespaces_are_shared_as_asked() {
    let Some(mut fixture) = fixture().await else { return };
    let in_mode = |mode: PidMode, script: &str| CreateContainerRequest { pid_mode: mode as i32, ..request(script) };
    let first = in_mode(PidMode::Pod, "sleep 4321");
    let id = first.id.clone();
    fixture.client.create_container(first).await.unwrap();
    fixture.client.start_container(StartContainerRequest { id: id.clone() }).await.unwrap();
    let see = "ps -o pid,args | grep -c '[s]leep 4321'";
    assert_eq!(fixture.output_of(in_mode(PidMode::Pod, see)).await, "1\n");
    let target = CreateContainerRequest { pid_target: id.clone(), ..in_mode(PidMode::Target, see) };
    assert_eq!(fixture.output_of(target).await, "1\n");
    assert_eq!(fixture.output_of(in_mode(PidMode::Container, "echo $$")).await, "1\n");
    // In the pod's namespace process 1 is not the container's, so nothing but the agent ends the rest of a container.
    let parent = in_mode(PidMode::Pod, "sleep 5678 & echo started");
    let parent_id = parent.id.clone();
    assert_eq!(fixture.output_of(parent).await, "started\n");
    fixture.wait(&parent_id).await;
    assert_eq!(fixture.output_of(in_mode(PidMode::Pod, "ps -o args | grep -c '[s]leep 5678' || true")).await, "0\n");
}
