//! A guest on hold: booted up to where it becomes a machine of its own, and waiting.
//!
//! ```text
//!   modules ─► take devices ─► port ─► HELD ─► wait
//!                                               ┊  saved, and restored as often as wanted
//!                                             RESUME ─► clock, seed ─► give devices back ─► RESUMED
//!                                                                          ─► /init anew, resumed
//! ```
//!
//! # Invariants
//! 1. Nothing of an image has been seen and no random number has been given to anybody: what two guests
//!    of one snapshot have in common is the kernel and its modules.
//! 2. The seed is in the kernel's pool before anything asks for a random number. Then this process is
//!    executed anew, so that what the kernel gave it at its start is its own, too.
//! 3. The port stays open from the first word to the agent's last: a byte that the host sends early
//!    waits in it.
//!
//! # Failure
//! As that of the boot: one `fatal` line, and the end of PID 1. The host boots another guest then.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use matchlock_wire::hold::{BadRecord, HOLD_WORD, Note, RESUME_BYTES, Resume, SEED_BYTES};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use rustix::event::{Timespec, epoll};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

use super::devices;
use super::uevent::Uevents;
use crate::port::{self, PortError};

/// The first argument of an init that goes on; the second is the number of the port's descriptor.
const RESUMED: &str = "--resumed";

/// An edge of the port that got lost would otherwise leave the guest on hold for ever.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Why a guest on hold cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The kernel's command line is unreadable.
    #[error("cannot read the kernel's command line")]
    CommandLine(#[source] io::Error),
    /// A device could not be taken from its driver or given back.
    #[error("cannot {what} a device")]
    Device {
        /// `take` or `give back`.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// There is no port.
    #[error("there is no link to the host")]
    Port(#[from] PortError),
    /// The port failed.
    #[error("the link to the host failed")]
    Link(#[source] io::Error),
    /// The host said something else.
    #[error("the host's word to go on is unusable")]
    Record(#[from] BadRecord),
    /// The clock could not be set.
    #[error("cannot set the clock")]
    Clock(#[source] io::Error),
    /// The seed was not taken.
    #[error("cannot seed the random numbers")]
    Seed(#[source] io::Error),
    /// This program could not be executed anew.
    #[error("cannot execute /init anew")]
    Again(#[source] io::Error),
}

/// The port of an init that goes on after a hold; `None` for one that the kernel has started.
#[must_use]
pub fn resumed_port(mut arguments: impl Iterator<Item = impl AsRef<OsStr>>) -> Option<OwnedFd> {
    if arguments.next()?.as_ref() != RESUMED {
        return None;
    }
    let number: RawFd = arguments.next()?.as_ref().to_str()?.parse().ok()?;
    // SAFETY: only asked about; one that is not open is an error.
    let asked = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number.max(0)) });
    if number <= 2 || asked.is_err() {
        return None;
    }
    // SAFETY: it is open, and was left open for us by the program that executed us; nothing else in
    // this process knows of it.
    let port = unsafe { OwnedFd::from_raw_fd(number) };
    Some(port)
}

/// Whether this guest is to be put on hold.
///
/// # Errors
/// When the kernel's command line cannot be read.
pub fn is_wanted() -> Result<bool, HoldError> {
    let line = fs::read_to_string("/proc/cmdline").map_err(HoldError::CommandLine)?;
    Ok(line.split_ascii_whitespace().any(|word| word == HOLD_WORD))
}

/// Puts the guest on hold; what comes after it is another start of this program.
///
/// # Errors
/// When it cannot be held, or cannot go on.
pub fn hold(uevents: &Uevents, patience: Duration) -> Result<Infallible, HoldError> {
    let taken = devices::take_all(Path::new("/sys"))
        .map_err(|source| HoldError::Device { what: "take", source })?;
    let port = HeldPort::new(port::open_file(uevents, patience)?).map_err(HoldError::Link)?;
    port.write(&Note::Held.encode()).map_err(HoldError::Link)?;
    let resume = Resume::decode(&port.read_record().map_err(HoldError::Link)?)?;
    set_clock(resume.clock_unix_ns).map_err(HoldError::Clock)?;
    seed(&resume.seed).map_err(HoldError::Seed)?;
    devices::give_back(&taken).map_err(|source| HoldError::Device { what: "give back", source })?;
    port.write(&Note::Resumed.encode()).map_err(HoldError::Link)?;
    again(port.file)
}

fn set_clock(unix_ns: u64) -> io::Result<()> {
    let now = TimeSpec::from(Duration::from_nanos(unix_ns));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, now)?)
}

/// What `RNDADDENTROPY` takes: `struct rand_pool_info` with its bytes.
#[repr(C)]
#[derive(Debug)]
pub struct Entropy {
    bits: libc::c_int,
    bytes: libc::c_int,
    seed: [u8; SEED_BYTES],
}

nix::ioctl_write_ptr_bad!(
    /// `RNDADDENTROPY`, whose number counts two integers and no bytes.
    add_entropy,
    nix::request_code_write!(b'R', 0x03, 8),
    Entropy
);
nix::ioctl_none!(
    /// `RNDRESEEDCRNG`.
    reseed,
    b'R',
    0x07
);

/// Feeds the kernel's pool and makes it draw all that it gives from now on from it.
fn seed(seed: &[u8; SEED_BYTES]) -> io::Result<()> {
    let random = rustix::fs::open("/dev/urandom", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let bytes = libc::c_int::try_from(seed.len()).map_err(io::Error::other)?;
    let entropy = Entropy { bits: 8 * bytes, bytes, seed: *seed };
    // SAFETY: the descriptor is open, and `entropy` is what the call expects and lives until it ends.
    unsafe { add_entropy(random.as_raw_fd(), &raw const entropy) }?;
    // SAFETY: the descriptor is open, and the call takes no argument.
    unsafe { reseed(random.as_raw_fd()) }?;
    Ok(())
}

/// Executes this program anew, with the port.
fn again(port: OwnedFd) -> Result<Infallible, HoldError> {
    fcntl_setfd(&port, FdFlags::empty()).map_err(|errno| HoldError::Again(errno.into()))?;
    let number = port.as_raw_fd().to_string();
    Err(HoldError::Again(Command::new("/init").args([RESUMED, &number]).exec()))
}

/// The port, waited for without a reactor: there is nothing else to do.
struct HeldPort {
    file: OwnedFd,
    edges: OwnedFd,
}

impl HeldPort {
    fn new(file: OwnedFd) -> io::Result<Self> {
        let edges = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Its HUP is a state that lasts as long as there is no host: only changes are awaited.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&edges, &file, epoll::EventData::new_u64(0), flags)?;
        Ok(Self { file, edges })
    }

    fn wait(&self) -> io::Result<()> {
        let mut edge = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }];
        match epoll::wait(&self.edges, &mut edge, Some(&LOOK_AGAIN)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut left = bytes;
        while !left.is_empty() {
            match rustix::io::write(&self.file, left) {
                Ok(count) => left = left.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                // No host yet, or one that does not read.
                Err(Errno::AGAIN) => self.wait()?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Reads exactly one record: what follows it is not ours.
    fn read_record(&self) -> io::Result<[u8; RESUME_BYTES]> {
        let mut record = [0; RESUME_BYTES];
        let mut filled = 0;
        while let Some(rest) = record.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match rustix::io::read(&self.file, rest) {
                // The host is gone, and with it what it had begun to say.
                Ok(0) => {
                    filled = 0;
                    self.wait()?;
                }
                Ok(count) => filled += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait()?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_our_own_argument_makes_an_init_that_goes_on() {
        assert!(resumed_port(["auto", "9"].iter()).is_none());
        assert!(resumed_port([RESUMED].iter()).is_none());
        assert!(resumed_port([RESUMED, "x"].iter()).is_none());
        assert!(resumed_port([RESUMED, "1"].iter()).is_none());
        assert!(resumed_port([RESUMED, "987654"].iter()).is_none());
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the two halves are to come one after the other")]
    fn exactly_one_record_is_read() {
        let (ours, mut host) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let port = HeldPort::new(ours.into()).unwrap();
        let resume = Resume { clock_unix_ns: 5, seed: [9; SEED_BYTES] };
        let bytes = resume.encode();
        let writer = std::thread::spawn(move || {
            host.write_all(&bytes[..20]).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            host.write_all(&bytes[20..]).unwrap();
            host.write_all(b"hello").unwrap();
            host
        });
        assert_eq!(Resume::decode(&port.read_record().unwrap()), Ok(resume));
        let host = writer.join().unwrap();
        let mut rest = [0; 16];
        assert_eq!(rustix::io::read(&port.file, &mut rest).unwrap(), 5);
        assert_eq!(&rest[..5], b"hello");
        drop(host);
    }
}
