//! `matchlock-guest`: `/init` of a Matchlock guest, and the agent that runs its commands.
//!
//! ```text
//!  kernel ─► boot ── modules, disks, overlay, switch root, mounts, cgroup
//!              │
//!              ▼  (this process stays PID 1; one thread, one event loop)
//!            port ─► session ─► request ─┬─ Hello, Configure ─► configure
//!            virtio    resync   stream   ├─ Exec, Attach ─────► jobs ─► launch ─► small init ─► command
//!            serial    yamux             └─ Shutdown ─────────► shutdown ─► power off
//!                                                  reaper ◄── SIGCHLD
//! ```
//!
//! # Invariants
//! 1. Nothing in an image is executed, and nothing in it need exist, to boot it.
//! 2. One thread. Commands are cloned from it directly; state is shared by `Rc` and never locked.
//! 3. The end of a session ends no command; only `Release`, a signal or a shutdown does.
//! 4. Memory for every command and every session is bounded, whatever the host or a command sends.
//!
//! # Failure
//! Before the agent is ready a failure prints one line, `matchlock-guest: fatal: …`, on the
//! console and ends PID 1: the kernel panics and the host sees the machine reset. Later, a broken
//! session is dropped and the next one awaited; a broken stream is dropped with a line on the
//! console.

pub mod agent;
pub mod boot;
pub mod cgroup;
pub mod configure;
pub mod descent;
pub mod jobs;
pub mod latch;
pub mod launch;
pub mod network;
pub mod port;
pub mod reaper;
pub mod request;
pub mod session;
pub mod shutdown;
