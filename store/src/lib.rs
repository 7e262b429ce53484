//! The only crate of Matchlock that knows SQLite.
//!
//! ```text
//! open_state ──► WriteConn ◄── Vec<WriteOp>   one per process, on the thread of its DbWriter
//!                    │ one IMMEDIATE transaction per batch, a savepoint per op
//!                    ▼
//!                state.db (WAL) ◄── ReadPool   many, read-only, never blocked by the writer
//!
//! open_images ─► ImageConn ──► metadata.db ◄── ImageReader
//! ```
//!
//! Start reading at [`op`] (what can be written), then [`write`](WriteConn) (how a batch is
//! written), [`reader`] (what can be read) and [`open`] (how a database comes to be).
//!
//! # Invariants
//! * Every write transaction is IMMEDIATE: one that starts by reading fails at once when another
//!   process writes, whatever the busy handler says.
//! * No file of a live database is ever opened, renamed or deleted past SQLite: closing any
//!   descriptor of it would drop the locks that SQLite holds in this process.
//! * Pragmas are set in one place, the module `connect`.
//!
//! # On error
//! Each error says what to do in one line; nothing is retried here but waiting for a lock, at
//! most [`LOCK_WAIT`].

pub mod error;
pub mod images;
pub mod op;
pub mod open;
pub mod points;
pub mod reader;

mod busy;
mod connect;
mod files;
mod migrate;
mod migrations;
mod rows;
mod write;

#[cfg(test)]
#[path = "../tests/store/child.rs"]
mod child;

pub use busy::LOCK_WAIT;
pub use error::{BadRow, DbFault, OpenError, ReadError, WriteError};
pub use images::{BlobInUse, ImageConn, ImageReader, RemovedImage, TaggedImage, read_images};
pub use op::{NewVm, WriteOp, WriteOutcome};
pub use open::{IMAGES_DB, STATE_DB, open_images, open_state};
pub use reader::{ReadConn, ReadPool, Vms, VmsLook};
pub use write::WriteConn;
