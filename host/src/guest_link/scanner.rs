//! Finds the headers in a stream of yamux frames, however it is cut into pieces.
//!
//! ```text
//!   version u8 │ kind u8 │ flags u16 │ stream u32 │ length u32 │ body (data frames only)
//! ```

/// The size of a header in bytes.
pub(super) const HEADER_BYTES: usize = 12;

/// The kind of a frame with a body.
pub(super) const DATA: u8 = 0;
/// The kind of a frame that gives credit.
pub(super) const WINDOW_UPDATE: u8 = 1;
/// The kind of a frame that ends the session.
pub(super) const GO_AWAY: u8 = 3;

/// The flag that opens a stream.
pub(super) const SYN: u16 = 1;
/// The flag that resets a stream.
pub(super) const RST: u16 = 8;

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u8,
    pub(super) kind: u8,
    pub(super) flags: u16,
    pub(super) stream: u32,
    /// The length of a data frame's body; credit, ping id or reason of the other kinds.
    pub(super) length: u32,
}

impl Header {
    fn parse(bytes: [u8; HEADER_BYTES]) -> Self {
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = bytes;
        Self {
            version,
            kind,
            flags: u16::from_be_bytes([f0, f1]),
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        }
    }

    /// Whether this flag is set.
    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// The number of bytes that follow the header.
    pub(super) fn body_bytes(&self) -> usize {
        if self.kind == DATA { usize::try_from(self.length).unwrap_or(usize::MAX) } else { 0 }
    }
}

/// Follows one direction of a session.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    header: [u8; HEADER_BYTES],
    filled: usize,
    body_left: usize,
}

impl Scanner {
    /// Takes the next bytes and shows each header that they complete. Stops at the first error.
    pub(super) fn feed<E>(
        &mut self,
        mut bytes: &[u8],
        mut on_header: impl FnMut(&Header) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            if self.body_left > 0 {
                let skipped = self.body_left.min(bytes.len());
                self.body_left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            let taken = (HEADER_BYTES - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
            self.filled += taken;
            bytes = &bytes[taken..];
            if self.filled == HEADER_BYTES {
                self.filled = 0;
                let header = Header::parse(self.header);
                self.body_left = header.body_bytes();
                on_header(&header)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn headers_are_found_at_every_cut() {
        let mut bytes = vec![0, DATA, 0, 1, 0, 0, 0, 7, 0, 0, 0, 3, 9, 9, 9];
        bytes.extend([0, WINDOW_UPDATE, 0, 2, 0, 0, 0, 7, 0, 4, 0, 0]);
        bytes.extend([0, DATA, 0, 8, 0, 0, 0, 9, 0, 0, 0, 0]);
        bytes.extend([0, GO_AWAY, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        for piece in 1..=bytes.len() {
            let mut scanner = Scanner::default();
            let mut headers = Vec::new();
            for chunk in bytes.chunks(piece) {
                let Ok(()) = scanner.feed(chunk, |header| {
                    headers.push(*header);
                    Ok::<_, Infallible>(())
                });
            }
            let seen: Vec<_> =
                headers.iter().map(|h| (h.kind, h.flags, h.stream, h.length)).collect();
            assert_eq!(
                seen,
                [
                    (DATA, 1, 7, 3),
                    (WINDOW_UPDATE, 2, 7, 0x4_0000),
                    (DATA, 8, 9, 0),
                    (GO_AWAY, 0, 0, 1)
                ],
                "cut into pieces of {piece}"
            );
        }
    }
}
