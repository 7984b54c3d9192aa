//! One pod of a round: what the kubelet does with it, and what must come of that whatever is killed meanwhile.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use isopod_cri_server::cri;
use tokio::sync::Mutex;
use tokio::time::sleep;

use crate::fixture::{Cri, LogLine, TestContainer, TestPod, eventually, shell};

/// Lines that a container prints.
const LINES: usize = 400;
/// How its other container ends.
const EXIT_CODE: i32 = 7;
const PATIENCE: Duration = Duration::from_secs(150);
const PAUSE: Duration = Duration::from_millis(200);

/// What the pods of a round and whoever kills have in common.
pub struct World {
    cri: Mutex<Cri>,
    /// Sandboxes whose VMM is killed, or may be.
    doomed: Mutex<BTreeSet<String>>,
    ids: Mutex<Vec<String>>,
}

impl World {
    /// A daemon with nobody to kill it yet.
    pub fn new(cri: Cri) -> Self {
        Self { cri: Mutex::new(cri), doomed: Mutex::default(), ids: Mutex::default() }
    }

    /// The client of the daemon that runs now.
    pub async fn cri(&self) -> Cri {
        self.cri.lock().await.clone()
    }

    /// There is a new daemon.
    pub async fn reconnect(&self, cri: Cri) {
        *self.cri.lock().await = cri;
    }

    /// The sandbox's VMM is going to be killed.
    pub async fn doom(&self, id: &str) {
        self.doomed.lock().await.insert(id.to_owned());
    }

    async fn is_doomed(&self, id: &str) -> bool {
        self.doomed.lock().await.contains(id)
    }

    /// The sandboxes that there were since the last time.
    pub async fn take_ids(&self) -> Vec<String> {
        std::mem::take(&mut *self.ids.lock().await)
    }

    /// Asks until there is an answer: a daemon that is killed cuts a call off, and the next one is asked again.
    async fn ask<T>(&self, mut call: impl AsyncFnMut(Cri) -> Result<T, tonic::Status>) -> Result<T, tonic::Status> {
        loop {
            match call(self.cri().await).await {
                Err(status) if cut_off(&status) => sleep(PAUSE).await,
                answer => return answer,
            }
        }
    }
}

/// Whether a call did not reach a daemon, or its answer never came.
fn cut_off(status: &tonic::Status) -> bool {
    use std::error::Error as _;
    // What the daemon answers itself has no source.
    status.source().is_some()
}

/// A pod from its creation to its removal.
pub async fn live(world: &World) -> Result<()> {
    let config = TestPod::config("soak");
    std::fs::create_dir_all(&config.log_directory)?;
    let request = cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
    let answer = world.ask(async |mut cri| cri.runtime.run_pod_sandbox(request.clone()).await).await;
    let id = answer.context("RunPodSandbox")?.into_inner().pod_sandbox_id;
    world.ids.lock().await.push(id.clone());
    let worked = work(world, &id, &config).await;
    if world.is_doomed(&id).await {
        dead(world, &id).await?;
    } else {
        worked.with_context(|| format!("in sandbox {id}"))?;
    }
    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() };
    world.ask(async |mut cri| cri.runtime.stop_pod_sandbox(stop.clone()).await).await.context("StopPodSandbox")?;
    let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: id.clone() };
    world
        .ask(async |mut cri| cri.runtime.remove_pod_sandbox(remove.clone()).await)
        .await
        .context("RemovePodSandbox")?;
    Ok(std::fs::remove_dir_all(&config.log_directory)?)
}

/// What its containers do.
async fn work(world: &World, id: &str, pod: &cri::PodSandboxConfig) -> Result<()> {
    let script = format!("n=0; while [ $n -lt {LINES} ]; do n=$((n+1)); echo $n; done; sleep 1000");
    let printer = run(world, id, pod, shell("printer", &script)).await?;
    let ending = run(world, id, pod, shell("ending", &format!("sleep 2; exit {EXIT_CODE}"))).await?;
    let said = world
        .ask(async |cri| {
            let container = TestContainer { cri, ..printer.clone() };
            container.exec(&["echo", "said"]).await
        })
        .await
        .context("ExecSync")?;
    ensure!(said.stdout == "said\n" && said.code == 0, "{said:?}");
    let status = eventually("end of a container", PATIENCE, async || {
        let status = world.ask(async |mut cri| cri.runtime.container_status(status_of(&ending.id)).await).await;
        let status = status.ok()?.into_inner().status?;
        (status.state() == cri::ContainerState::ContainerExited).then_some(status)
    })
    .await?;
    ensure!(status.exit_code == EXIT_CODE && status.reason == "Error", "{status:?}");
    ensure!(status.started_at >= status.created_at && status.finished_at >= status.started_at, "{status:?}");
    let lines = printer.logged("all lines", PATIENCE, |lines| lines.len() >= LINES).await?;
    let texts: Vec<String> = lines.iter().map(LogLine::text).collect();
    let expected: Vec<String> = (1..=LINES).map(|number| format!("{number}\n")).collect();
    ensure!(texts == expected, "a log with {} lines: {texts:?}", texts.len());
    Ok(())
}

pub(super) fn sandbox_status_of(id: &str) -> cri::PodSandboxStatusRequest {
    cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false }
}

fn status_of(id: &str) -> cri::ContainerStatusRequest {
    cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false }
}

/// Creates and starts a container. Asked again, the daemon gives the same one, and a start that was cut off may have been done.
async fn run(
    world: &World,
    pod: &str,
    sandbox: &cri::PodSandboxConfig,
    mut config: cri::ContainerConfig,
) -> Result<TestContainer> {
    config.log_path = format!("{}.log", config.metadata.clone().unwrap_or_default().name);
    let log = std::path::PathBuf::from(&sandbox.log_directory).join(&config.log_path);
    let request = cri::CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config),
        sandbox_config: Some(sandbox.clone()),
    };
    let created = world.ask(async |mut cri| cri.runtime.create_container(request.clone()).await).await;
    let id = created.context("CreateContainer")?.into_inner().container_id;
    let request = cri::StartContainerRequest { container_id: id.clone() };
    let started = world.ask(async |mut cri| cri.runtime.start_container(request.clone()).await).await;
    if let Err(status) = started {
        let now = world.ask(async |mut cri| cri.runtime.container_status(status_of(&id)).await).await?;
        let state = now.into_inner().status.unwrap_or_default().state();
        if state == cri::ContainerState::ContainerCreated {
            bail!("StartContainer: {status}");
        }
    }
    Ok(TestContainer { cri: world.cri().await, id, log })
}

/// Its VMM was killed: its sandbox is not ready, and its containers have ended so or before.
async fn dead(world: &World, id: &str) -> Result<()> {
    eventually("end of a sandbox whose VMM was killed", PATIENCE, async || {
        let status = world.ask(async |mut cri| cri.runtime.pod_sandbox_status(sandbox_status_of(id)).await).await;
        (status.ok()?.into_inner().status?.state() == cri::PodSandboxState::SandboxNotready).then_some(())
    })
    .await?;
    let filter = cri::ContainerFilter { pod_sandbox_id: id.to_owned(), ..Default::default() };
    let containers = world.ask(async |cri| cri.containers(Some(filter.clone())).await).await?;
    for container in containers {
        let status = world.ask(async |mut cri| cri.runtime.container_status(status_of(&container.id)).await).await?;
        let status = status.into_inner().status.context("a status")?;
        let end = match status.state() {
            cri::ContainerState::ContainerCreated => continue,
            cri::ContainerState::ContainerExited => (status.exit_code, status.reason.as_str()),
            _ => bail!("runs in a VM that was killed: {status:?}"),
        };
        // One that was being started never ran, as far as anybody knows.
        ensure!([(137, "Error"), (EXIT_CODE, "Error"), (128, "StartError")].contains(&end), "{status:?}");
    }
    Ok(())
}
