//! The guest as its host sees it: over a link, with real commands. Needs root, for namespaces.

#![expect(clippy::unwrap_used, reason = "all of this crate is a test")]

mod boot;
mod commands;
mod files;
mod network;
mod sessions;
mod stop;
mod streams;
mod support;
mod terminals;
