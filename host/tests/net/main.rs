//! A VM's network on the real kernel, in network namespaces that each test makes for itself, and
//! each fake beside it under the same suite. Needs root, `ip` and `nft`; the host's own namespace
//! is never touched.

// Marked as tests for clippy, which otherwise lets only the test functions unwrap.
#[cfg(test)]
mod arp;
#[cfg(test)]
mod beside;
#[cfg(test)]
mod data_path;
#[cfg(test)]
mod firewall;
#[cfg(test)]
mod killed;
#[cfg(test)]
mod namespace;
#[cfg(test)]
mod netlock;
#[cfg(test)]
mod read_only;
#[cfg(test)]
mod stopped;
#[cfg(test)]
mod tap;
