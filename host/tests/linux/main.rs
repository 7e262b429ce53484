//! The host's resources on the real kernel, and each fake beside them under the same suite.
//!
//! One program for all of them, because some tests start themselves again as a helper process.

// Marked as tests for clippy, which otherwise lets only the test functions unwrap.
#[cfg(test)]
mod common;
#[cfg(test)]
mod hypervisor;
#[cfg(test)]
mod initramfs;
#[cfg(test)]
mod namespaces;
#[cfg(test)]
mod nic;
#[cfg(test)]
mod owner_lock;
#[cfg(test)]
mod process;
#[cfg(test)]
mod reuse;
#[cfg(test)]
mod rootfs;
