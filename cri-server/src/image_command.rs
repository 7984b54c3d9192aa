//! `isopod image`: the store's images for people without crictl. A daemon that runs is asked; without one, the store is opened.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use isopod_image_store::{Auth, ImageStore, Progress, open_archive};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::client::{connect, said};
use crate::config::Config;
use crate::cri::image_service_client::ImageServiceClient;
use crate::cri::{AuthConfig, ImageSpec, ListImagesRequest, MAX_MESSAGE, PullImageRequest, RemoveImageRequest};
use crate::daemon::image_config;
use crate::images::images_client::ImagesClient;
use crate::images::{ImportRequest, import_event::Event};

/// Bytes of an archive in one message.
const CHUNK: usize = 256 << 10;

/// What to do with images.
#[derive(Subcommand)]
pub enum ImageCommand {
    /// Take in the images of an archive: an OCI layout or what `docker save` writes.
    Import {
        /// A tar, which may be compressed with gzip or zstd; the directory of a layout; or - for standard input.
        archive: PathBuf,
        /// The name of an image that has none in the archive; a tag in the archive is added to it.
        #[arg(long)]
        name: Option<String>,
    },
    /// List the images.
    Ls,
    /// Remove images, by name or id.
    Rm {
        /// Which.
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Pull images from their registries.
    Pull {
        /// Which.
        #[arg(required = true)]
        images: Vec<String>,
        /// The user to log in as; the password is read from standard input.
        #[arg(long)]
        username: Option<String>,
    },
}

/// Who has the store.
enum Images {
    Daemon(Channel),
    Store(ImageStore),
}

/// An image in a list.
struct Listed {
    id: String,
    names: Vec<String>,
    size: u64,
}

/// Does what `command` says.
pub async fn run(command: ImageCommand, config: &Config) -> anyhow::Result<()> {
    let images = match connect(&config.socket).await? {
        Some(channel) => Images::Daemon(channel),
        None => Images::Store(ImageStore::open(image_config(config))?),
    };
    match command {
        ImageCommand::Import { archive, name } => {
            let bar = ProgressBar::new_spinner();
            let imported = images.import(&archive, name, &bar).await;
            bar.finish_and_clear();
            imported
        }
        ImageCommand::Ls => {
            println!("{:<12}  {:>10}  NAMES", "ID", "MB");
            for image in images.list().await? {
                let id = image.id.trim_start_matches("sha256:").get(..12).unwrap_or(&image.id);
                println!("{id:<12}  {:>10.1}  {}", image.size as f64 / 1e6, image.names.join(" "));
            }
            Ok(())
        }
        ImageCommand::Rm { images: names } => {
            for name in names {
                images.remove(&name).await.with_context(|| format!("image {name:?} is not removed"))?;
            }
            Ok(())
        }
        ImageCommand::Pull { images: names, username } => {
            let user = username.map(|user| Ok::<_, std::io::Error>((user, std::io::read_to_string(std::io::stdin())?)));
            let user = user.transpose().context("the password cannot be read from standard input")?;
            for name in names {
                println!("{}", images.pull(&name, user.as_ref()).await?);
            }
            Ok(())
        }
    }
}

fn service(channel: &Channel) -> ImageServiceClient<Channel> {
    ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE)
}

fn spec(image: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() })
}

impl Images {
    async fn list(&self) -> anyhow::Result<Vec<Listed>> {
        match self {
            Self::Daemon(channel) => {
                let answer = service(channel).list_images(ListImagesRequest::default()).await.map_err(said)?;
                let listed = answer.into_inner().images.into_iter().map(|image| Listed {
                    id: image.id,
                    names: [image.repo_tags, image.repo_digests].concat(),
                    size: image.size,
                });
                Ok(listed.collect())
            }
            Self::Store(store) => {
                let listed = store.images()?.into_iter().map(|image| Listed {
                    id: image.id.to_string(),
                    names: [image.repo_tags, image.repo_digests].concat(),
                    size: image.size,
                });
                Ok(listed.collect())
            }
        }
    }

    async fn remove(&self, image: &str) -> anyhow::Result<()> {
        match self {
            Self::Daemon(channel) => {
                let request = RemoveImageRequest { image: spec(image) };
                service(channel).remove_image(request).await.map(drop).map_err(said)
            }
            Self::Store(store) => Ok(store.remove(image)?),
        }
    }

    /// Gives the image's id. `user`: a name and a password.
    async fn pull(&self, image: &str, user: Option<&(String, String)>) -> anyhow::Result<String> {
        match self {
            Self::Daemon(channel) => {
                let auth = user.map(|(username, password)| AuthConfig {
                    username: username.clone(),
                    password: without_newline(password),
                    ..AuthConfig::default()
                });
                let request = PullImageRequest { image: spec(image), auth, ..PullImageRequest::default() };
                Ok(service(channel).pull_image(request).await.map_err(said)?.into_inner().image_ref)
            }
            Self::Store(store) => {
                let auth = user.map_or(Auth::Anonymous, |(username, password)| Auth::Basic {
                    username: username.clone(),
                    password: without_newline(password),
                });
                Ok(store.pull(image, &auth).await?.to_string())
            }
        }
    }

    async fn import(&self, archive: &Path, name: Option<String>, bar: &ProgressBar) -> anyhow::Result<()> {
        let shown = archive.display();
        let (input, size) = open_archive(archive).with_context(|| format!("{shown} cannot be read"))?;
        bar.set_style(style(match size {
            Some(_) => "reading {bytes}/{total_bytes} {wide_bar} {bytes_per_sec}",
            None => "reading {bytes} {spinner} {bytes_per_sec}",
        })?);
        bar.set_length(size.unwrap_or_default());
        let input = bar.wrap_read(input);
        let layers = style("converting, layers {pos}/{len} {wide_bar}")?;
        let contents = |count: u64| {
            bar.set_style(layers.clone());
            bar.reset();
            bar.set_length(count);
        };
        let here = |id: &str, names: &[String]| bar.suspend(|| println!("{id} {}", names.join(" ")));
        match self {
            Self::Store(store) => {
                let told = |progress| match progress {
                    Progress::Read { layers, .. } => contents(layers as u64),
                    Progress::Layers(done) => bar.set_position(done as u64),
                    Progress::Image(image) => here(&image.id.to_string(), &image.names),
                };
                store.import(input, name.as_deref(), told).await?;
            }
            Self::Daemon(channel) => {
                let (sender, requests) = mpsc::channel(4);
                let sending = tokio::task::spawn_blocking(move || send(input, name.unwrap_or_default(), &sender));
                let client = &mut ImagesClient::new(channel.clone());
                let mut events = client.import(ReceiverStream::new(requests)).await.map_err(said)?.into_inner();
                let told = async {
                    while let Some(event) = events.message().await? {
                        match event.event {
                            Some(Event::Contents(found)) => contents(found.layers),
                            Some(Event::LayersDone(done)) => bar.set_position(done),
                            Some(Event::Image(image)) => here(&image.id, &image.names),
                            None => {}
                        }
                    }
                    Ok(())
                };
                let told = told.await.map_err(said);
                // What the daemon got of an archive that cannot be read on makes no sense to it.
                if told.is_ok() || sending.is_finished() {
                    sending.await?.with_context(|| format!("{shown} cannot be read"))?;
                }
                told?;
            }
        }
        Ok(())
    }
}

/// Sends the archive, until it ends or nobody takes it.
fn send(mut input: impl Read, name: String, requests: &mpsc::Sender<ImportRequest>) -> std::io::Result<()> {
    let mut name = Some(name);
    loop {
        let mut data = vec![0; CHUNK];
        let length = input.read(&mut data)?;
        data.truncate(length);
        let first = name.is_some();
        let request = ImportRequest { name: name.take().unwrap_or_default(), data };
        // An empty archive is one message, so that the daemon says what it thinks of it.
        if (length == 0 && !first) || requests.blocking_send(request).is_err() {
            return Ok(());
        }
    }
}

fn style(template: &str) -> anyhow::Result<ProgressStyle> {
    Ok(ProgressStyle::with_template(template)?)
}

fn without_newline(password: &str) -> String {
    password.strip_suffix('\n').unwrap_or(password).to_owned()
}
