//! isopod's own image service: messages, client and server, generated from `proto/images.proto`.
#![allow(missing_docs, clippy::all, clippy::too_many_lines, reason = "generated code")]

tonic::include_proto!("isopod.images.v1");
