//! Whether this host can run VMs: one check per thing that people trip over, each with what to do.
//!
//! | file | checks |
//! |---|---|
//! | `machine` | hypervisor, KVM, kernel, memory |
//! | `network` | TUN, nftables, forwarding, rights: tried for real, in a network namespace made for it |
//! | `files` | programs, space, the state directory, a second installation |
//!
//! # Invariants
//! 1. Nothing is left behind and nothing of the host is changed. What has to be made to be tried (a
//!    TAP, tables) is made in a network namespace that goes with the thread that made it.
//! 2. What could not be looked at is never a pass.
//! 3. Files of the kernel and of `/etc` are read below a root, so that tests can show other hosts.

mod files;
mod machine;
mod network;
mod throwaway;

pub use files::{private_directory, programs, second_installation, space};
pub use machine::{cpu_virtualization, hypervisor, kernel, kvm_access, kvm_device, memory};
pub use network::{alike, capabilities, ip_forwarding, nf_tables, obstacles, tun_device};

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Pass,
    /// VMs run, but something is slower, missing or to be known.
    Warn,
    /// Something will not work.
    Fail,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked; scripts may rely on it.
    pub name: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was found, in one line.
    pub message: String,
    /// What to do about it, in one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Check {
    /// It is as it should be.
    #[must_use]
    pub fn pass(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, status: Status::Pass, message: message.into(), fix: None }
    }

    /// VMs run all the same.
    #[must_use]
    pub fn warn(name: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, message: message.into(), fix: Some(fix.into()) }
    }

    /// Something will not work.
    #[must_use]
    pub fn fail(name: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, status: Status::Fail, message: message.into(), fix: Some(fix.into()) }
    }
}

/// Where the files of the host are: `/`, but in tests.
#[derive(Debug, Clone)]
pub struct Root(PathBuf);

impl Default for Root {
    fn default() -> Self {
        Self(PathBuf::from("/"))
    }
}

impl Root {
    /// Another host's files.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self(root.to_owned())
    }

    fn path(&self, below: &str) -> PathBuf {
        self.0.join(below.trim_start_matches('/'))
    }

    fn read(&self, below: &str) -> io::Result<String> {
        fs::read_to_string(self.path(below))
    }
}

/// An error with its causes.
fn told(error: &(dyn std::error::Error + 'static)) -> String {
    matchlock_model::failure::chain(error)
}
