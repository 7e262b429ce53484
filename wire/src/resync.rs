//! The handshake that starts every host connection, whatever was on the line before.
//!
//! A virtio-serial port is one byte stream that survives its host: when the host side reconnects
//! quickly the guest notices nothing, and bytes of the old session are still on the way in both
//! directions. So the host first sends a run of `0xFF` that is long enough to complete any
//! truncated yamux frame and to make the next header invalid (version byte 255), which ends the
//! guest's old session; then a hello with a fresh nonce. The guest throws away everything up to
//! the hello and echoes version and nonce; the host throws away everything up to that echo.
//!
//! # Invariants
//! 1. An acknowledgement counts only with the nonce of this connection.
//! 2. Both sides hunt in a stream of any bytes, with memory bounded by the pattern's length.

use crate::PROTOCOL_VERSION;

/// Swallows a truncated yamux frame: the longest body whose length field may be completed by
/// `0xFF` bytes is 65,535, and 64 more reach past its header.
pub const PREAMBLE_BYTES: usize = 65_535 + 64;

/// The number of bytes in a nonce.
pub const NONCE_BYTES: usize = 16;

/// The number of bytes in a hello or an acknowledgement.
pub const GREETING_BYTES: usize = MAGIC_BYTES + 2 + NONCE_BYTES;

/// The host gives up when this many stale bytes came without an acknowledgement among them.
pub const MAX_STALE_BYTES: usize = 64 * 1024 * 1024;

const MAGIC_BYTES: usize = 14;
const HELLO_MAGIC: [u8; MAGIC_BYTES] = *b"\x01MATCHLOCK>>>\x02";
const ACK_MAGIC: [u8; MAGIC_BYTES] = *b"\x03MATCHLOCK<<<\x04";

/// A fresh random value per connection.
pub type Nonce = [u8; NONCE_BYTES];

/// What a hello or an acknowledgement carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The sender's protocol version.
    pub version: u16,
    /// The connection's nonce.
    pub nonce: Nonce,
}

/// The whole of what the host sends first: preamble and hello.
#[must_use]
pub fn hello(nonce: &Nonce) -> Vec<u8> {
    let mut bytes = vec![0xFF; PREAMBLE_BYTES];
    push_greeting(&mut bytes, &HELLO_MAGIC, nonce);
    bytes
}

/// What the guest answers to a hello with this nonce.
#[must_use]
pub fn acknowledgement(nonce: &Nonce) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(GREETING_BYTES);
    push_greeting(&mut bytes, &ACK_MAGIC, nonce);
    bytes
}

fn push_greeting(bytes: &mut Vec<u8>, magic: &[u8; MAGIC_BYTES], nonce: &Nonce) {
    bytes.extend_from_slice(magic);
    bytes.extend_from_slice(&PROTOCOL_VERSION.to_be_bytes());
    bytes.extend_from_slice(nonce);
}

/// Finds greetings in a stream of other bytes.
#[derive(Debug)]
pub struct Hunter {
    magic: &'static [u8; MAGIC_BYTES],
    /// The bytes of the candidate so far: a prefix of the magic, then the rest of the greeting.
    candidate: Vec<u8>,
    /// How many bytes were thrown away.
    stale: usize,
}

impl Hunter {
    /// A hunter for the host's hello; the guest's side.
    #[must_use]
    pub fn for_hello() -> Self {
        Self::new(&HELLO_MAGIC)
    }

    /// A hunter for the guest's acknowledgement; the host's side.
    #[must_use]
    pub fn for_acknowledgement() -> Self {
        Self::new(&ACK_MAGIC)
    }

    fn new(magic: &'static [u8; MAGIC_BYTES]) -> Self {
        Self { magic, candidate: Vec::with_capacity(GREETING_BYTES), stale: 0 }
    }

    /// How many bytes were thrown away so far.
    #[must_use]
    pub fn stale_bytes(&self) -> usize {
        self.stale
    }

    /// Takes bytes until a greeting is complete. Returns how many of `bytes` were taken, and the
    /// greeting if its last byte was among them; the bytes after it belong to the session.
    pub fn feed(&mut self, bytes: &[u8]) -> (usize, Option<Greeting>) {
        let mut taken = 0;
        while taken < bytes.len() {
            taken += self.skip_to_candidate(&bytes[taken..]);
            let Some(byte) = bytes.get(taken) else { break };
            self.push(*byte);
            taken += 1;
            if self.candidate.len() == GREETING_BYTES {
                return (taken, Some(self.take_greeting()));
            }
        }
        (bytes.len(), None)
    }

    /// Throws away what cannot begin a greeting: nearly all of a preamble or of a stale session.
    fn skip_to_candidate(&mut self, bytes: &[u8]) -> usize {
        if !self.candidate.is_empty() {
            return 0;
        }
        let first = self.magic[0];
        let skipped = bytes.iter().position(|byte| *byte == first);
        let skipped = skipped.unwrap_or(bytes.len());
        self.stale += skipped;
        skipped
    }

    fn push(&mut self, byte: u8) {
        self.candidate.push(byte);
        // The first byte of each magic occurs nowhere else in it, so after a mismatch the only
        // new candidate is the byte just read.
        let matched = self.candidate.len().min(MAGIC_BYTES);
        if self.candidate[..matched] != self.magic[..matched] {
            self.stale += self.candidate.len();
            self.candidate.clear();
            if byte == self.magic[0] {
                self.stale -= 1;
                self.candidate.push(byte);
            }
        }
    }

    fn take_greeting(&mut self) -> Greeting {
        let mut version = [0; 2];
        version.copy_from_slice(&self.candidate[MAGIC_BYTES..MAGIC_BYTES + 2]);
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&self.candidate[MAGIC_BYTES + 2..]);
        self.candidate.clear();
        Greeting { version: u16::from_be_bytes(version), nonce }
    }
}
