//! Sessions: a program drives many VMs by lines of JSON (docs/RPC.md).
//!
//! ```text
//!   client ─ lines ─► LineReader ─► session ─┬─ at once, in order: cancel, close, input of commands
//!                                            └─ a task each: create, exec…, files, log…, list, wait, kill
//!   client ◄─ lines ─ Outbox (bounded) ◄─────── answers, notifications, events of VMs
//!                                                   │
//!                                                   ▼
//!                                              NodeClient ─► the actor tree
//! ```
//!
//! # Invariants
//! 1. The reader waits for its client's next line, and for a client that has tens of thousands of lines
//!    answered and reads none of it; for nothing else: `cancel` and `close` are always seen.
//! 2. Everything is bounded: lines, requests in flight, bytes held ([`Budget`]), VMs, lines that wait to
//!    be written. A slow client slows commands down and makes nothing grow.
//! 3. A session's VMs end with it, however it ends: `close`, the end of its input, a signal, a client
//!    that is gone or reads nothing. What is in flight is cancelled first, and nothing waits for a
//!    client that does not read.
//! 4. A fault in one request or one VM is no other's.
//!
//! # Failure
//! A line that is no request is answered with what is wrong with it, and the next is read. What of a VM
//! could not be cleaned up is the answer to `close`, and what [`serve`] returns.

mod budget;
mod calls;
mod create;
mod detached;
mod exec;
mod files;
mod input;
mod life;
mod line;
mod listener;
mod log;
mod methods;
mod outbox;
mod protocol;
mod session;
mod vms;

pub use budget::{BUDGET_BYTES, Budget};
pub use input::SPOOL_BYTES;
pub use listener::Listener;
pub use session::{RpcHost, SessionEnd, Why, serve};
