//! The actor tree on fakes of the host and a real store: what is promised holds when effects fail,
//! hang or come late, and when actors are killed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod db_writer;
mod faults;
mod gc;
mod life;
mod network;
mod reconciling;
mod subnets;
mod supervision;
mod warm;
mod world;
