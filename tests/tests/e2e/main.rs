//! End-to-end tests: the daemon, its VMMs and guests, a registry. Run them with `make e2e [TEST=name]`.
//!
//! One daemon and one registry serve them all; a test that needs a daemon in a special state starts its own.

#![forbid(unsafe_code)]

mod bad_input;
mod cgroups;
mod containers;
mod empty_dirs;
mod events;
mod exec;
mod file_server_jail;
mod guest;
mod host;
mod hostile_agent;
mod hostile_clients;
mod ids;
mod image_command;
mod images;
mod integrity;
mod jail;
mod kills;
mod logs;
mod network;
mod network_builtin;
mod network_cni;
mod pods;
mod processes;
mod projected;
mod restart;
mod security;
mod socket;
mod stats;
mod stop_all;
mod streaming;
mod terminals;
mod update;
mod volumes;
mod websocket;
