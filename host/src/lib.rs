//! The only crate of Matchlock that touches the kernel or a child process.
//!
//! Each kind of host resource is one folder: a narrow trait with its laws in `mod.rs`, the Linux
//! implementation, and a fake beside it that the same conformance suite checks. What is decided is
//! decided elsewhere: nothing here knows rows, phases or actors.
//!
//! | folder | owns |
//! |---|---|
//! | [`process`] | identity of processes, pidfds, the thread that spawns children, the search for marked ones |
//! | [`owner_lock`] | one lock byte per VM: held means that its owner lives |
//! | [`rootfs`] | a VM's directory, its writable disk, its sockets |
//! | [`vm_log`] | a VM's log: written with a cap, followed while it moves on |
//! | [`hypervisor`] | launch, watch, kill: QEMU, and a fake |
//! | [`guest_link`] | streams to the agent in the guest |
//! | [`image`] | archives and pulled layers in, EROFS out |
//! | [`registry`] | manifests and blobs from image registries |
//! | [`tap`] | a VM's link to the host, and what of the IPv4 space the host uses |
//! | [`firewall`] | a VM's nftables tables: what its guest may reach |
//! | [`netlock`] | one lock per network namespace, for choosing a subnet |
//! | [`guest_bundle`] | the kernel and initramfs to boot: which are installed, and whether they are whole |
//! | [`snapshot`] | what machines on hold were saved as, for others to go on from |
//! | [`diagnose`] | whether this host can run VMs, and what to do if not |

#[cfg(not(target_os = "linux"))]
compile_error!("Matchlock runs on Linux only, for now: other platforms are not supported");

pub mod diagnose;
pub mod facts;
pub mod fault;
mod fenced;
pub mod firewall;
pub mod guest_bundle;
pub mod guest_link;
pub mod hypervisor;
pub mod image;
mod locked;
pub mod netlock;
pub mod owner_lock;
pub mod points;
pub mod process;
pub mod registry;
pub mod rootfs;
pub mod snapshot;
pub mod socket;
pub mod tap;
pub mod vm_log;
