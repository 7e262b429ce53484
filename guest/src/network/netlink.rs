//! Requests to the kernel's network configuration, rtnetlink, one at a time.
//!
//! A request is a fixed header, a fixed body of its kind and attributes, each padded to 4 bytes.
//! The kernel carries a request out while it is being sent, and its answer is there at once.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};
use nix::sys::socket::{recv, send, socket};

/// The length of a message's header: length, kind, flags, number, port.
const HEADER_BYTES: usize = 16;

/// Flags of a request: this one, and with an answer.
pub(super) const REQUEST: i32 = libc::NLM_F_REQUEST | libc::NLM_F_ACK;

/// Flags of a request that makes something, or changes what is there.
pub(super) const PUT: i32 = REQUEST | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

/// A request that is being written.
#[derive(Debug)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// A request of this kind.
    pub(super) fn new(kind: u16, flags: i32, body: &[u8]) -> Self {
        // No flag of a request is beyond the 16 bits that a message has for them.
        let flags = u16::try_from(flags).unwrap_or(0);
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(body);
        Self(bytes)
    }

    /// The same with one more attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// A socket to the network configuration of this thread's network namespace.
#[derive(Debug)]
pub(super) struct Netlink(OwnedFd);

impl Netlink {
    /// Opens it.
    pub(super) fn open() -> io::Result<Self> {
        let (kind, protocol) = (SockType::Raw, SockProtocol::NetlinkRoute);
        Ok(Self(socket(AddressFamily::Netlink, kind, SockFlag::SOCK_CLOEXEC, protocol)?))
    }

    /// Has a request carried out.
    pub(super) fn request(&self, message: Message) -> io::Result<()> {
        let message = message.finish();
        if send(self.0.as_raw_fd(), &message, MsgFlags::empty())? != message.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        // Large enough for the answer to any request here: it holds the request.
        let mut answer = [0; 1024];
        let length = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
        read_answer(&answer[..length])
    }
}

/// The answer to a request: 0, or the number of an error.
fn read_answer(answer: &[u8]) -> io::Result<()> {
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is no answer");
    let kind = answer.get(4..6).ok_or_else(bad)?;
    let code = answer.get(HEADER_BYTES..).and_then(<[u8]>::first_chunk).ok_or_else(bad)?;
    if i32::from(u16::from_ne_bytes([kind[0], kind[1]])) != libc::NLMSG_ERROR {
        return Err(bad());
    }
    match i32::from_ne_bytes(*code) {
        0 => Ok(()),
        code => Err(Errno::from_raw(code.wrapping_neg()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_padded_and_knows_its_length() {
        let message = Message::new(16, REQUEST, &[9; 4]).with(3, b"eth0\0").with(4, &[7; 4]);
        let bytes = message.finish();
        assert_eq!(bytes.len(), 16 + 4 + 12 + 8);
        assert_eq!(bytes[..4], 40_u32.to_ne_bytes());
        // The attribute's own length is without the padding after it.
        assert_eq!(bytes[20..22], 9_u16.to_ne_bytes());
        assert_eq!(&bytes[24..32], b"eth0\0\0\0\0");
    }

    #[test]
    fn an_answer_is_success_an_error_or_refused() {
        let answer = |kind: u16, code: i32| {
            let head = [&[0; 4][..], &kind.to_ne_bytes(), &[0; 10]].concat();
            read_answer(&[&head[..], &code.to_ne_bytes()].concat())
        };
        assert!(answer(2, 0).is_ok());
        let refused = answer(2, -libc::EEXIST).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(answer(3, 0).unwrap_err().kind(), io::ErrorKind::InvalidData);
        for length in 0..20 {
            assert!(read_answer(&vec![0; length]).is_err());
        }
    }
}
