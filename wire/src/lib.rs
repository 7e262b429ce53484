//! Frames and messages between the supervisor on the host and the agent in the guest.
//!
//! One byte stream (a virtio-serial port, later a vsock connection) carries everything:
//!
//! ```text
//!  host                                             guest
//!   │ preamble (0xFF…) ‖ HELLO ‖ version ‖ nonce      │   resync: throws an old session off the line
//!   │ ───────────────────────────────────────────────►│
//!   │                      ACK ‖ version ‖ same nonce │
//!   │ ◄───────────────────────────────────────────────│
//!   │ yamux session, host = client, guest = server    │
//!   │   stream: Request → Reply                       │   hello, configure, shutdown
//!   │   stream: Request → ExecInput / ExecOutput …    │   exec, file, attach
//! ```
//!
//! # Invariants
//! 1. Every length is capped before memory is reserved for it ([`frame::MAX_FRAME_BYTES`]).
//! 2. The guest never opens a stream; the host does.
//! 3. Nothing relies on half-close: the end of input is a message.
//! 4. The version travels in the handshake, before the first frame; a peer of another version is
//!    named and refused.
//!
//! This crate knows nothing of Matchlock's model: an old guest must be able to meet a new host.

pub mod frame;
pub mod hold;
pub mod message;
pub mod resync;

/// The protocol's version, sent in the handshake by both sides.
pub const PROTOCOL_VERSION: u16 = 6;

/// The name of the virtio-serial port that carries the link (`/sys/class/virtio-ports/*/name`).
pub const PORT_NAME: &str = "org.matchlock.link.0";

/// The `serial=` of the disk that holds the image (EROFS, read-only).
pub const BASE_DISK_SERIAL: &str = "base";

/// The `serial=` of the disk that holds the VM's writable layer (ext4).
pub const ROOTFS_DISK_SERIAL: &str = "rootfs";

/// How many streams a session may hold at once, on either side.
pub const MAX_STREAMS: usize = 64;

/// The receive window of one stream, in bytes; yamux cannot go lower.
pub const STREAM_WINDOW_BYTES: usize = 256 * 1024;

/// The largest yamux data frame that either side writes. It must stay below 65,536: the resync
/// preamble is sized to swallow one frame of this length.
pub const SPLIT_SEND_BYTES: usize = 16 * 1024;
