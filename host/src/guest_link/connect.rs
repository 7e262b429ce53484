//! Shakes hands over a machine's link and starts a session, the first or another one.
//!
//! ```text
//!   open_link ─► preamble ‖ hello ─► hunt the acknowledgement ─► yamux client ─► Hello? Hello!
//!   └──────────────────────────────── one deadline ──────────────────────────────────────────┘
//! ```
//!
//! # Invariants
//! 1. Writing and hunting go on at the same time: neither a guest that is still booting nor one
//!    that floods us with an old session's bytes can block the handshake for good.
//! 2. Only an acknowledgement with this connection's nonce counts; what came before is thrown
//!    away, what comes after it belongs to the session.
//! 3. A failed or cancelled connect closes the transport.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use matchlock_model::guest::AgentInfo;
use matchlock_wire::PROTOCOL_VERSION;
use matchlock_wire::message::{Reply, Request};
use matchlock_wire::resync::{self, Hunter, MAX_STALE_BYTES, NONCE_BYTES, Nonce};
use tokio::io::{AsyncReadExt, BufReader, BufWriter};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::codec;
use super::driver::Mux;
use super::session::{Requests, YamuxLink, no_random};
use super::{GuestLink, LinkConnector, LinkError, hold};
use crate::hypervisor::Machine;

/// What a deadline that passed was for.
pub(super) const HANDSHAKE: &str = "the handshake";

/// How much is read from or written to the transport at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// Connects to the agent of a machine, over yamux.
#[derive(Debug, Clone, Copy, Default)]
pub struct YamuxConnector;

#[async_trait]
impl LinkConnector for YamuxConnector {
    async fn connect(
        &self,
        machine: &dyn Machine,
        deadline: Duration,
    ) -> Result<Arc<dyn GuestLink>, LinkError> {
        let (session, agent) = begin(machine, deadline).await?;
        Ok(Arc::new(YamuxLink::new(session, agent)))
    }

    async fn held(&self, machine: &dyn Machine, deadline: Duration) -> Result<(), LinkError> {
        hold::held(machine, deadline).await
    }

    async fn resume(&self, machine: &dyn Machine, deadline: Duration) -> Result<(), LinkError> {
        hold::resume(machine, deadline).await
    }
}

/// Begins a session over this machine's link: the first or another one.
pub(super) async fn begin(
    machine: &dyn Machine,
    deadline: Duration,
) -> Result<(Requests, AgentInfo), LinkError> {
    let connected = async {
        let transport = machine
            .open_link()
            .await
            .map_err(|error| LinkError::Lost { cause: codec::with_sources(&error) })?;
        start(transport, deadline).await
    };
    timeout(deadline, connected)
        .await
        .unwrap_or(Err(LinkError::Timeout { what: HANDSHAKE, waited: deadline }))
}

/// Shakes hands over this transport and asks the agent who it is.
async fn start(
    transport: UnixStream,
    deadline: Duration,
) -> Result<(Requests, AgentInfo), LinkError> {
    let leftover = shake_hands(&transport).await?;
    let (reader, writer) = transport.into_split();
    let reader = io::Cursor::new(leftover).chain(BufReader::with_capacity(BUFFER_BYTES, reader));
    let writer = BufWriter::with_capacity(BUFFER_BYTES, writer);
    let session = Requests::new(Mux::start(reader, writer));
    match session.ask(HANDSHAKE, Request::Hello, deadline).await? {
        Reply::Hello(agent) => Ok((session, codec::agent_info(agent))),
        Reply::Failed(message) => {
            Err(LinkError::Refused { what: HANDSHAKE, message: codec::clean(&message) })
        }
        Reply::Done => Err(session.wrong_reply(HANDSHAKE)),
    }
}

/// Returns what was read beyond the acknowledgement.
async fn shake_hands(transport: &UnixStream) -> Result<Vec<u8>, LinkError> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(|error| no_random(&error))?;
    let ((), leftover) = tokio::try_join!(greet(transport, &nonce), hunt(transport, &nonce))?;
    Ok(leftover)
}

async fn greet(transport: &UnixStream, nonce: &Nonce) -> Result<(), LinkError> {
    let hello = resync::hello(nonce);
    let mut left = hello.as_slice();
    while !left.is_empty() {
        transport.writable().await.map_err(|error| LinkError::from_io(&error))?;
        match transport.try_write(left) {
            Ok(written) => left = &left[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(LinkError::from_io(&error)),
        }
    }
    Ok(())
}

async fn hunt(transport: &UnixStream, nonce: &Nonce) -> Result<Vec<u8>, LinkError> {
    let mut hunter = Hunter::for_acknowledgement();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut seen = 0;
    loop {
        transport.readable().await.map_err(|error| LinkError::from_io(&error))?;
        let read = match transport.try_read(&mut buffer) {
            Ok(0) => {
                let cause = "the machine closed the connection during the handshake".to_owned();
                return Err(LinkError::Lost { cause });
            }
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(LinkError::from_io(&error)),
        };
        if let Some(leftover) = find(&mut hunter, nonce, &buffer[..read])? {
            return Ok(leftover);
        }
        seen += read;
        if seen > MAX_STALE_BYTES {
            let what = format!("it sent {seen} bytes without an acknowledgement");
            return Err(LinkError::Protocol { what });
        }
    }
}

/// Hunts in these bytes; returns what follows the acknowledgement, if it is complete.
fn find(hunter: &mut Hunter, nonce: &Nonce, bytes: &[u8]) -> Result<Option<Vec<u8>>, LinkError> {
    let mut fresh = bytes;
    while !fresh.is_empty() {
        let (taken, greeting) = hunter.feed(fresh);
        fresh = &fresh[taken..];
        let Some(greeting) = greeting else { continue };
        if greeting.nonce != *nonce {
            tracing::debug!("another handshake's acknowledgement came");
            // It may have been cut off, so that ours began within what was taken for its rest. The
            // rest is shorter than a greeting: it cannot complete one.
            hunter.feed(&greeting.version.to_be_bytes());
            hunter.feed(&greeting.nonce);
        } else if greeting.version != PROTOCOL_VERSION {
            return Err(LinkError::Version { guest: greeting.version, host: PROTOCOL_VERSION });
        } else {
            tracing::debug!(stale = hunter.stale_bytes(), "the guest acknowledged");
            return Ok(Some(fresh.to_vec()));
        }
    }
    Ok(None)
}
