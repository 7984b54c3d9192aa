//! OCI images as read-only EROFS block images: registry client, conversion, content store.
