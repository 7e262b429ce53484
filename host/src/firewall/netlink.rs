//! Netfilter's netlink: messages byte by byte, and a socket to send them on.
//!
//! rustables writes the rules; this sends them, because its own `send` opens a new socket each
//! time, and a table with the owner flag belongs to the socket that made it. It also reads what
//! rustables reads wrongly (a chain's policy) or not at all (a table's owner and handle).
//!
//! ```text
//!   length u32 │ type u16 │ flags u16 │ sequence u32 │ port u32   header, in the host's byte order
//!   family u8 │ version u8 │ resource u16, big-endian
//!   length u16 │ type u16 │ value, padded to 4 bytes              attribute, any number of them
//! ```
//!
//! The kernel works on a request within `sendmsg`, and every answer lies in the socket's buffer
//! when that returns. So reading never waits, and an answer that is not there is an error.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, getsockname, netlink, recv,
    sendto, socket_with,
};

/// Bytes of the two headers in front of the attributes.
const HEADERS: usize = 20;

/// The kernel sends dumps in parts of at most 32 KiB.
const BUFFER: usize = 64 * 1024;

/// The first number of a request through another's socket.
const ADOPTED: u32 = 0x4000_0000;

/// How often an interrupted dump is read again.
const MAX_DUMPS: usize = 50;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 16;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_DUMP: u16 = 0x300;
const NFT_SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

/// The low byte of a message's type. The kernel's numbers.
pub(super) const NEW_TABLE: u16 = 0;
pub(super) const GET_TABLE: u16 = 1;
pub(super) const DELETE_TABLE: u16 = 2;
pub(super) const GET_CHAIN: u16 = 4;

/// One message, from its header to its last attribute.
#[derive(Debug, Clone)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// A message of the nftables subsystem without attributes.
    pub(super) fn new(kind: u16, family: u8) -> Self {
        let mut bytes = vec![0; HEADERS];
        bytes[4..6].copy_from_slice(&((NFT_SUBSYSTEM << 8) | kind).to_ne_bytes());
        bytes[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
        bytes[16] = family;
        let mut message = Self(bytes);
        message.set_length();
        message
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, attribute: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(attribute.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.set_length();
        self
    }

    fn set_length(&mut self) {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_ne_bytes([self.0[at], self.0[at + 1]])
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_ne_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }

    fn whole_kind(&self) -> u16 {
        self.u16_at(4)
    }

    /// Whether it is a message of the nftables subsystem of this kind.
    pub(super) fn is(&self, kind: u16) -> bool {
        self.whole_kind() == (NFT_SUBSYSTEM << 8) | kind
    }

    fn flags(&self) -> u16 {
        self.u16_at(6)
    }

    fn set_flags(&mut self, add: u16, remove: u16) {
        self.set_u16(6, (self.flags() | add) & !remove);
    }

    fn sequence(&self) -> u32 {
        self.u32_at(8)
    }

    fn set_sequence(&mut self, sequence: u32) {
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }

    /// The family of a table or chain, e.g. 1 (`inet`).
    pub(super) fn family(&self) -> u8 {
        self.0[16]
    }

    /// The value of an attribute.
    pub(super) fn attribute(&self, wanted: u16) -> Option<&[u8]> {
        find_attribute(self.0.get(HEADERS..)?, wanted)
    }

    /// The answer's errno if it is an acknowledgement or an error: 0, or an errno. The message
    /// that ends a dump may be one too.
    fn error(&self) -> Option<i32> {
        let code = i32::from_ne_bytes(self.0.get(16..20)?.try_into().ok()?);
        let failed_dump = self.whole_kind() == NLMSG_DONE && code < 0;
        (self.whole_kind() == NLMSG_ERROR || failed_dump).then(|| code.saturating_neg())
    }
}

/// An attribute in a row of them; values may be such rows too.
pub(super) fn find_attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        // The two highest bits say "nested" and "big-endian".
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
        let value = rest.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// A big-endian number, as nftables' attributes hold them.
pub(super) fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// A text with or without its final zero.
pub(super) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// Cuts received or written bytes into messages.
pub(super) fn split(mut bytes: &[u8]) -> io::Result<Vec<Message>> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let header = bytes.get(0..4).and_then(|length| length.try_into().ok());
        let length = header.map_or(0, u32::from_ne_bytes);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let message = bytes.get(..length).filter(|message| message.len() >= HEADERS);
        let message = message.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        messages.push(Message(message.to_vec()));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(messages)
}

/// Puts the deletion of tables in front of what rustables wrote, numbers the messages from
/// `first`, and asks for the last one's acknowledgement only, because the receive buffer holds not
/// many. New tables must not exist yet.
fn assemble(deletions: &[Message], written: &[u8], first: u32) -> io::Result<Vec<Message>> {
    let mut messages = split(written)?;
    messages.splice(1..1, deletions.iter().cloned());
    let last = messages.len().saturating_sub(2);
    for (at, (message, sequence)) in messages.iter_mut().zip(first..).enumerate() {
        message.set_sequence(sequence);
        message.set_flags(0, NLM_F_ACK);
        if at == last {
            message.set_flags(NLM_F_ACK, 0);
        }
        if message.is(NEW_TABLE) {
            message.set_flags(NLM_F_EXCL, 0);
        }
    }
    Ok(messages)
}

/// Why a batch was not carried out; nothing of it was.
#[derive(Debug)]
pub(super) struct Refused {
    /// The message that the kernel refused, from 1; 0 when it was the batch.
    pub(super) message: u32,
    /// Of how many.
    pub(super) messages: usize,
    /// Why.
    pub(super) source: io::Error,
}

/// A socket of our own. The tables with the owner flag that were made over it go when it closes;
/// that takes a grace period, tens of milliseconds.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// The socket itself.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Opens it in the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::NETFILTER),
        )?;
        bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { fd, sequence: 1 })
    }

    /// A copy of a socket that another process uses as well. It may have answers in it that nobody
    /// has read: they are dropped, and our own have numbers that nobody else comes to.
    pub(super) fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let socket = Self { fd, sequence: ADOPTED };
        while socket.receive()?.is_some() {}
        Ok(socket)
    }

    /// The number that the kernel knows this socket by, in its network namespace.
    pub(super) fn port(&self) -> io::Result<u32> {
        let address = SocketAddrNetlink::try_from(getsockname(&self.fd)?)?;
        Ok(address.pid())
    }

    /// Carries out a batch that rustables wrote, behind these deletions, wholly or not at all.
    pub(super) fn batch(&mut self, deletions: &[Message], written: &[u8]) -> Result<(), Refused> {
        let first = self.sequence;
        let failed = |message, messages| move |source| Refused { message, messages, source };
        let messages = assemble(deletions, written, first).map_err(failed(0, 0))?;
        let count = messages.len();
        let last = first + u32::try_from(count).unwrap_or(0).saturating_sub(2);
        self.sequence = last + 2;
        let bytes: Vec<u8> = messages.into_iter().flat_map(|message| message.0).collect();
        self.send(&bytes).map_err(failed(0, count))?;
        let mut acknowledged = false;
        while let Some(answers) = self.receive().map_err(failed(0, count))? {
            for answer in answers {
                let Some(at) = answer.sequence().checked_sub(first) else { continue };
                match answer.error() {
                    Some(0) => acknowledged |= answer.sequence() == last,
                    Some(errno) => {
                        // What is left unread belongs to this batch; the next one skips it.
                        return Err(failed(at, count)(io::Error::from_raw_os_error(errno)));
                    }
                    None => {}
                }
            }
        }
        if acknowledged { Ok(()) } else { Err(failed(0, count)(no_answer())) }
    }

    /// Deletes tables, all or none.
    pub(super) fn delete(&mut self, deletions: &[Message]) -> Result<(), Refused> {
        let frame = |kind: u16| {
            let mut message = Message::new(0, 0);
            message.set_u16(4, kind);
            message.0[18..20].copy_from_slice(&NFT_SUBSYSTEM.to_be_bytes());
            message.0
        };
        let empty = [frame(BATCH_BEGIN), frame(BATCH_END)].concat();
        self.batch(deletions, &empty)
    }

    /// Asks for one object; `None` when the kernel does not know it.
    pub(super) fn get(&mut self, mut question: Message) -> io::Result<Option<Message>> {
        let sequence = self.next(&mut question, 0);
        self.send(&question.0)?;
        while let Some(answers) = self.receive()? {
            let Some(answer) = answers.into_iter().find(|a| a.sequence() == sequence) else {
                continue;
            };
            return match answer.error() {
                Some(libc::ENOENT) => Ok(None),
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
                None => Ok(Some(answer)),
            };
        }
        Err(no_answer())
    }

    /// Asks for all objects of a kind. A list that changed meanwhile is read again.
    pub(super) fn dump(&mut self, question: &Message) -> io::Result<Vec<Message>> {
        for _ in 0..MAX_DUMPS {
            if let Some(found) = self.dump_once(question.clone())? {
                return Ok(found);
            }
        }
        let why = format!("the list changed during each of {MAX_DUMPS} readings");
        Err(io::Error::new(io::ErrorKind::Interrupted, why))
    }

    fn dump_once(&mut self, mut question: Message) -> io::Result<Option<Vec<Message>>> {
        let sequence = self.next(&mut question, NLM_F_DUMP);
        self.send(&question.0)?;
        let (mut found, mut interrupted) = (Vec::new(), false);
        while let Some(answers) = self.receive()? {
            for answer in answers.into_iter().filter(|a| a.sequence() == sequence) {
                interrupted |= answer.flags() & NLM_F_DUMP_INTR != 0;
                match answer.error() {
                    Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
                    None if answer.whole_kind() == NLMSG_DONE => {
                        return Ok((!interrupted).then_some(found));
                    }
                    None => found.push(answer),
                }
            }
        }
        Err(no_answer())
    }

    fn next(&mut self, question: &mut Message, flags: u16) -> u32 {
        let sequence = self.sequence;
        self.sequence += 1;
        question.set_sequence(sequence);
        question.set_flags(flags, 0);
        sequence
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let kernel = SocketAddrNetlink::new(0, 0);
        let sent = rustix::io::retry_on_intr(|| {
            sendto(self.fd.as_fd(), bytes, SendFlags::empty(), &kernel)
        })?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The next datagram's messages; `None` when nothing is left.
    fn receive(&self) -> io::Result<Option<Vec<Message>>> {
        let mut buffer = vec![0; BUFFER];
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        let received =
            rustix::io::retry_on_intr(|| recv(self.fd.as_fd(), buffer.as_mut_slice(), flags));
        match received {
            // With TRUNC, the second number is the datagram's whole length.
            Ok((read, whole)) if whole <= read => split(&buffer[..read]).map(Some),
            Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "a truncated answer")),
            Err(Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the kernel gave no answer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_back_what_was_written() {
        let message = Message::new(GET_TABLE, 2).with(1, b"abc\0").with(2, &7_u32.to_be_bytes());
        let bytes = [message.0.clone(), message.0.clone()].concat();
        let read = split(&bytes).unwrap();
        assert_eq!(read.len(), 2);
        for message in read {
            assert!(message.is(GET_TABLE) && !message.is(NEW_TABLE));
            assert_eq!(message.family(), 2);
            assert_eq!(message.attribute(1).map(text), Some("abc".to_owned()));
            assert_eq!(message.attribute(2).and_then(number), Some(7));
            assert_eq!(message.attribute(3), None);
        }
    }

    #[test]
    fn damaged_bytes_are_an_error_and_no_panic() {
        let message = Message::new(GET_TABLE, 2).with(1, b"abc\0").0;
        for cut in 1..message.len() {
            assert!(split(&message[..cut]).is_err(), "{cut}");
        }
        for (at, value) in (0..message.len()).flat_map(|at| (0..=255).map(move |v| (at, v))) {
            let mut damaged = message.clone();
            damaged[at] = value;
            for message in split(&damaged).unwrap_or_default() {
                message.attribute(9);
                message.error();
            }
        }
    }

    #[test]
    fn one_message_of_a_batch_is_acknowledged() {
        let written = [
            Message::new(0, 0).0,
            Message::new(NEW_TABLE, 1).0,
            Message::new(3, 1).0, // a new chain
            Message::new(0, 0).0,
        ]
        .concat();
        let deletion = Message::new(DELETE_TABLE, 1);
        let messages = assemble(&[deletion], &written, 40).unwrap();
        let sequences: Vec<_> = messages.iter().map(Message::sequence).collect();
        assert_eq!(sequences, [40, 41, 42, 43, 44]);
        let acks: Vec<_> = messages.iter().map(|m| m.flags() & NLM_F_ACK != 0).collect();
        assert_eq!(acks, [false, false, false, true, false]);
        assert!(messages[1].is(DELETE_TABLE));
        assert!(messages[2].flags() & NLM_F_EXCL != 0);
    }
}
