//! The ImageService.

use std::collections::HashMap;

use isopod_image_store::{AuthFields, Credentials, Image as StoredImage, ImageStore, StoreError};
use tonic::{Request, Response, Status};

use super::{Batches, observe, status};
use crate::cri;

/// Serves images from the image store.
pub struct Images {
    store: ImageStore,
}

impl Images {
    /// The service over `store`.
    pub fn new(store: ImageStore) -> Self {
        Self { store }
    }

    /// Runs a reading or writing of the store, which blocks, on a thread of its own.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ImageStore) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let store = self.store.clone();
        let result = tokio::task::spawn_blocking(move || work(&store)).await;
        result.map_err(|_| status::internal("the image store's thread panicked"))?.map_err(|error| status::of(&error))
    }
}

fn reference(spec: Option<cri::ImageSpec>) -> Result<String, Status> {
    let image = spec.map(|spec| spec.image).unwrap_or_default();
    if image.is_empty() {
        return Err(status::invalid("image.image is empty"));
    }
    Ok(image)
}

/// The image as CRI shows it.
fn shown(image: StoredImage) -> cri::Image {
    let user = image.config.user.split(':').next().unwrap_or_default();
    let uid = user.parse::<u32>().ok().map(|value| cri::Int64Value { value: value.into() });
    cri::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags,
        repo_digests: image.repo_digests,
        size: image.size,
        username: if uid.is_some() { String::new() } else { user.to_owned() },
        uid,
        spec: Some(cri::ImageSpec { image: image.id.to_string(), ..Default::default() }),
        pinned: image.pinned,
    }
}

#[tonic::async_trait]
impl cri::image_service_server::ImageService for Images {
    type StreamImagesStream = Batches<cri::StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Result<Response<cri::ListImagesResponse>, Status> {
        let wanted = request.into_inner().filter.and_then(|filter| filter.image).map(|spec| spec.image);
        let images = match wanted.filter(|wanted| !wanted.is_empty()) {
            Some(wanted) => self.blocking(move |store| store.find(&wanted)).await?.into_iter().collect(),
            None => self.blocking(ImageStore::images).await?,
        };
        Ok(Response::new(cri::ListImagesResponse { images: images.into_iter().map(shown).collect() }))
    }

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let filter = request.into_inner().filter;
        let list = self.list_images(Request::new(cri::ListImagesRequest { filter })).await?.into_inner().images;
        Ok(Response::new(super::batches(list, |images| cri::StreamImagesResponse { images })))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Result<Response<cri::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let wanted = reference(request.image)?;
        let found = self.blocking(move |store| store.find(&wanted)).await?;
        let mut info = HashMap::new();
        if let Some(image) = found.as_ref().filter(|_| request.verbose) {
            let config = &image.config;
            let described = serde_json::json!({ "imageSpec": { "config": {
                "User": config.user, "Env": config.env, "Entrypoint": config.entrypoint, "Cmd": config.cmd,
                "WorkingDir": config.working_dir, "StopSignal": config.stop_signal, "Labels": config.labels,
            } }, "layers": image.layers });
            info.insert("info".to_owned(), described.to_string());
        }
        Ok(Response::new(cri::ImageStatusResponse { image: found.map(shown), info }))
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Result<Response<cri::PullImageResponse>, Status> {
        let request = request.into_inner();
        let wanted = reference(request.image)?;
        let fields = request.auth.unwrap_or_default();
        observe("PullImage", &wanted.clone(), async move {
            let fields = AuthFields {
                username: &fields.username,
                password: &fields.password,
                auth: &fields.auth,
                server_address: &fields.server_address,
                identity_token: &fields.identity_token,
                registry_token: &fields.registry_token,
            };
            let credentials = Credentials::from_fields(fields).map_err(|error| status::of(&error))?;
            let id = self.store.pull(&wanted, credentials).await.map_err(|error| status::of_pull(&error))?;
            Ok(Response::new(cri::PullImageResponse { image_ref: id.to_string() }))
        })
        .await
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Result<Response<cri::RemoveImageResponse>, Status> {
        let wanted = reference(request.into_inner().image)?;
        observe("RemoveImage", &wanted.clone(), async move {
            self.blocking(move |store| store.remove(&wanted)).await?;
            Ok(Response::new(cri::RemoveImageResponse {}))
        })
        .await
    }

    async fn image_fs_info(
        &self,
        _request: Request<cri::ImageFsInfoRequest>,
    ) -> Result<Response<cri::ImageFsInfoResponse>, Status> {
        let usage = self.blocking(ImageStore::usage).await?;
        let filesystem = cri::FilesystemUsage {
            timestamp: usage.timestamp_nanos,
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: usage.mountpoint.display().to_string() }),
            used_bytes: Some(cri::UInt64Value { value: usage.used_bytes }),
            inodes_used: Some(cri::UInt64Value { value: usage.inodes_used }),
        };
        // The same for both: the kubelet's CRI provider knows no split of the two (cri.md 1.2).
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: vec![filesystem.clone()],
            container_filesystems: vec![filesystem],
        }))
    }
}
