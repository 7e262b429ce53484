//! Length-prefixed frames: `u32` big-endian length, then one postcard-encoded message.
//!
//! # Invariants
//! 1. A length above [`MAX_FRAME_BYTES`] is an error before a byte of the body is buffered.
//! 2. A body must decode completely: bytes left over are an error.
//!
//! # Failure
//! After any error the stream is unusable and must be dropped; nothing is resynchronised here.

use std::marker::PhantomData;

use bytes::{Buf, BufMut, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::codec::{Decoder, Encoder};

/// The largest body of a frame, in bytes. Room for a command line and environment of 1 MiB.
pub const MAX_FRAME_BYTES: usize = 1024 * 1024 + 64 * 1024;

/// The largest piece of stdin or output that one frame carries, in bytes.
pub const MAX_CHUNK_BYTES: usize = 32 * 1024;

const LENGTH_BYTES: usize = 4;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer announced, or the caller built, a body over the limit.
    #[error("frame of {len} bytes is over the limit of {MAX_FRAME_BYTES} bytes")]
    TooLong {
        /// The announced length in bytes.
        len: usize,
    },
    /// The body is not a message of this protocol.
    #[error("frame of {len} bytes is not a known message")]
    Malformed {
        /// The body's length in bytes.
        len: usize,
        /// What the decoder found.
        source: postcard::Error,
    },
    /// The body holds more bytes than its message.
    #[error("frame has {extra} bytes after its message")]
    TrailingBytes {
        /// How many bytes were left over.
        extra: usize,
    },
    /// The message could not be encoded.
    #[error("message could not be encoded")]
    Encode(#[source] postcard::Error),
    /// The transport failed.
    #[error("link transport failed")]
    Io(#[from] std::io::Error),
}

/// A codec that reads frames of `In` and writes frames of `Out`.
#[derive(Debug)]
pub struct Codec<In, Out> {
    _types: PhantomData<fn(Out) -> In>,
}

impl<In, Out> Default for Codec<In, Out> {
    fn default() -> Self {
        Self { _types: PhantomData }
    }
}

impl<In: DeserializeOwned, Out> Decoder for Codec<In, Out> {
    type Item = In;
    type Error = FrameError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<In>, FrameError> {
        let Some(prefix) = src.first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if len > MAX_FRAME_BYTES {
            return Err(FrameError::TooLong { len });
        }
        if src.len() < LENGTH_BYTES + len {
            src.reserve(LENGTH_BYTES + len - src.len());
            return Ok(None);
        }
        src.advance(LENGTH_BYTES);
        let body = src.split_to(len);
        let (message, rest) = postcard::take_from_bytes(&body)
            .map_err(|source| FrameError::Malformed { len, source })?;
        if !rest.is_empty() {
            return Err(FrameError::TrailingBytes { extra: rest.len() });
        }
        Ok(Some(message))
    }
}

impl<In, Out: Serialize> Encoder<Out> for Codec<In, Out> {
    type Error = FrameError;

    fn encode(&mut self, item: Out, dst: &mut BytesMut) -> Result<(), FrameError> {
        let body = postcard::to_allocvec(&item).map_err(FrameError::Encode)?;
        if body.len() > MAX_FRAME_BYTES {
            return Err(FrameError::TooLong { len: body.len() });
        }
        let prefix =
            u32::try_from(body.len()).map_err(|_| FrameError::TooLong { len: body.len() })?;
        dst.reserve(LENGTH_BYTES + body.len());
        dst.put_u32(prefix);
        dst.extend_from_slice(&body);
        Ok(())
    }
}
