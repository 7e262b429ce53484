//! Speaks with a guest on hold, before there is an agent in it: one record each way.
//!
//! # Invariants
//! 1. Each guest that goes on gets a seed of its own, from this host's kernel, and the time as it is
//!    when it is told.
//! 2. No more is read than the record: whoever connects next begins with a handshake of its own.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use matchlock_wire::hold::{NOTE_BYTES, Note, Resume, SEED_BYTES};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::LinkError;
use super::codec;
use super::session::no_random;
use crate::hypervisor::Machine;

/// What a deadline that passed was for.
const HOLD: &str = "while it was on hold";

/// Waits until a guest is on hold.
pub(super) async fn held(machine: &dyn Machine, deadline: Duration) -> Result<(), LinkError> {
    within(deadline, async {
        let mut stream = open(machine).await?;
        expect(&mut stream, Note::Held).await
    })
    .await
}

/// Tells a guest on hold to go on, and waits until it does.
pub(super) async fn resume(machine: &dyn Machine, deadline: Duration) -> Result<(), LinkError> {
    within(deadline, async {
        let mut stream = open(machine).await?;
        let mut seed = [0; SEED_BYTES];
        getrandom::fill(&mut seed).map_err(|error| no_random(&error))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let clock_unix_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let record = Resume { clock_unix_ns, seed }.encode();
        stream.write_all(&record).await.map_err(|error| LinkError::from_io(&error))?;
        expect(&mut stream, Note::Resumed).await
    })
    .await
}

async fn within(
    deadline: Duration,
    work: impl Future<Output = Result<(), LinkError>>,
) -> Result<(), LinkError> {
    let late = LinkError::Timeout { what: HOLD, waited: deadline };
    timeout(deadline, work).await.unwrap_or(Err(late))
}

async fn open(machine: &dyn Machine) -> Result<UnixStream, LinkError> {
    let opened = machine.open_link().await;
    opened.map_err(|error| LinkError::Lost { cause: codec::with_sources(&error) })
}

async fn expect(stream: &mut UnixStream, note: Note) -> Result<(), LinkError> {
    let mut said = [0; NOTE_BYTES];
    stream.read_exact(&mut said).await.map_err(|error| LinkError::from_io(&error))?;
    note.expect(&said).map_err(|bad| LinkError::Protocol { what: format!("on hold it said {bad}") })
}
