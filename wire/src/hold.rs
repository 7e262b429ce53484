//! A guest on hold, and the word that lets it go on.
//!
//! ```text
//!  guest                                        host
//!   │ HELD ‖ version                              │   nothing is left to do but what no two share
//!   │ ───────────────────────────────────────────►│   (its memory is saved; a copy of it is restored)
//!   │         RESUME ‖ version ‖ clock ‖ seed     │
//!   │ ◄───────────────────────────────────────────│
//!   │ RESUMED ‖ version                           │   its devices are there; the boot goes on
//!   │ ───────────────────────────────────────────►│   and then the handshake of [`crate::resync`]
//! ```
//!
//! # Invariants
//! 1. Each record has a length that is known before it is read.
//! 2. A record of another version is refused by its reader, before anything of it is used.

use crate::PROTOCOL_VERSION;

/// The word on the kernel's command line that puts a guest on hold.
pub const HOLD_WORD: &str = "matchlock.hold";

/// How many random bytes a guest is given.
pub const SEED_BYTES: usize = 32;

const MAGIC_BYTES: usize = 14;
const HELD_MAGIC: [u8; MAGIC_BYTES] = *b"\x05MATCHLOCK...\x06";
const RESUME_MAGIC: [u8; MAGIC_BYTES] = *b"\x07MATCHLOCK!!!\x08";
const RESUMED_MAGIC: [u8; MAGIC_BYTES] = *b"\x0eMATCHLOCK+++\x0f";

/// The length of what a guest says: that it is held, that it goes on.
pub const NOTE_BYTES: usize = MAGIC_BYTES + 2;

/// The length of what the host says.
pub const RESUME_BYTES: usize = NOTE_BYTES + 8 + SEED_BYTES;

/// What a guest on hold says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// It waits.
    Held,
    /// It goes on.
    Resumed,
}

/// What of a restored guest is its own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// The host's clock, in nanoseconds since 1970-01-01T00:00:00Z.
    pub clock_unix_ns: u64,
    /// For its random numbers, which would otherwise be those of every guest of the snapshot.
    pub seed: [u8; SEED_BYTES],
}

impl std::fmt::Debug for Resume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resume").field("clock_unix_ns", &self.clock_unix_ns).finish_non_exhaustive()
    }
}

/// Why a record was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadRecord {
    /// It is none, or another one.
    Unknown,
    /// It is of this version, and we are of another.
    Version(u16),
}

impl std::fmt::Display for BadRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unknown => f.write_str("bytes that were not expected"),
            Self::Version(found) => write!(f, "version {found} instead of {PROTOCOL_VERSION}"),
        }
    }
}

impl std::error::Error for BadRecord {}

impl Note {
    const fn magic(self) -> &'static [u8; MAGIC_BYTES] {
        match self {
            Self::Held => &HELD_MAGIC,
            Self::Resumed => &RESUMED_MAGIC,
        }
    }

    /// As it is sent.
    #[must_use]
    pub fn encode(self) -> [u8; NOTE_BYTES] {
        let mut bytes = [0; NOTE_BYTES];
        bytes[..MAGIC_BYTES].copy_from_slice(self.magic());
        bytes[MAGIC_BYTES..].copy_from_slice(&PROTOCOL_VERSION.to_be_bytes());
        bytes
    }

    /// Whether these bytes are this note.
    ///
    /// # Errors
    /// When they are not, or of another version.
    pub fn expect(self, bytes: &[u8; NOTE_BYTES]) -> Result<(), BadRecord> {
        check(self.magic(), bytes)
    }
}

impl Resume {
    /// As it is sent.
    #[must_use]
    pub fn encode(&self) -> [u8; RESUME_BYTES] {
        let mut bytes = [0; RESUME_BYTES];
        bytes[..MAGIC_BYTES].copy_from_slice(&RESUME_MAGIC);
        bytes[MAGIC_BYTES..NOTE_BYTES].copy_from_slice(&PROTOCOL_VERSION.to_be_bytes());
        bytes[NOTE_BYTES..NOTE_BYTES + 8].copy_from_slice(&self.clock_unix_ns.to_be_bytes());
        bytes[NOTE_BYTES + 8..].copy_from_slice(&self.seed);
        bytes
    }

    /// Reads it.
    ///
    /// # Errors
    /// When the bytes are something else, or of another version.
    pub fn decode(bytes: &[u8; RESUME_BYTES]) -> Result<Self, BadRecord> {
        check(&RESUME_MAGIC, &bytes[..NOTE_BYTES])?;
        let mut clock = [0; 8];
        clock.copy_from_slice(&bytes[NOTE_BYTES..NOTE_BYTES + 8]);
        let mut seed = [0; SEED_BYTES];
        seed.copy_from_slice(&bytes[NOTE_BYTES + 8..]);
        Ok(Self { clock_unix_ns: u64::from_be_bytes(clock), seed })
    }
}

fn check(magic: &[u8; MAGIC_BYTES], bytes: &[u8]) -> Result<(), BadRecord> {
    let (found, version) = bytes.split_at_checked(MAGIC_BYTES).ok_or(BadRecord::Unknown)?;
    let version: [u8; 2] = version.try_into().map_err(|_| BadRecord::Unknown)?;
    if found != magic {
        return Err(BadRecord::Unknown);
    }
    match u16::from_be_bytes(version) {
        PROTOCOL_VERSION => Ok(()),
        other => Err(BadRecord::Version(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_else_is() {
        let resume = Resume { clock_unix_ns: 1_795_000_000_123_456_789, seed: [7; SEED_BYTES] };
        assert_eq!(Resume::decode(&resume.encode()), Ok(resume));
        assert!(!format!("{resume:?}").contains("seed"));
        for note in [Note::Held, Note::Resumed] {
            assert_eq!(note.expect(&note.encode()), Ok(()));
        }
        assert_eq!(Note::Held.expect(&Note::Resumed.encode()), Err(BadRecord::Unknown));
        let mut other = resume.encode();
        other[MAGIC_BYTES + 1] ^= 1;
        assert_eq!(Resume::decode(&other), Err(BadRecord::Version(PROTOCOL_VERSION ^ 1)));
        other[0] = 0;
        assert_eq!(Resume::decode(&other), Err(BadRecord::Unknown));
    }
}
