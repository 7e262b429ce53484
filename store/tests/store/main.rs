//! The store from outside: what other crates rely on, and what operators type.

#![expect(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy.toml allows it only in the test functions themselves"
)]

mod child;
mod concurrency;
mod hostile_disk;
mod hostile_files;
mod hostile_writers;
mod images;
mod open;
mod phases;
mod reference;
mod schema;
mod subnets;
mod support;
mod unreadable;
mod write;
