//! The netlink socket of a table, out of the process that holds it.
//!
//! Nobody but its socket may change a table with the owner flag, and a process that stands still does
//! not close it. A copy of the socket is the same socket to the kernel: what is sent through it is sent
//! by the owner.
//!
//! ```text
//!  table ─ owner's port ─► /proc/net/netlink: inode ─► /proc/<pid>/fd: number ─► pidfd_getfd
//!                                                       port, protocol, inode seen again ─► ours
//! ```
//!
//! The process is known by pid, start time and boot id, and held by a pidfd meanwhile. A number in its
//! table of descriptors may have come to mean something else when the copy is made: so the copy itself
//! is looked at, and closed unless it is the socket.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use matchlock_model::identity::ProcessIdentity;
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::netlink::Socket;
use crate::process::LinuxProcesses;

/// Of the calling thread's network namespace.
const SOCKETS: &str = "/proc/thread-self/net/netlink";

/// Netfilter, as the kernel numbers the protocols of netlink.
const NETFILTER: &str = "12";

/// A copy of the socket with this port, which this process holds; `None` when there is no such socket
/// any more, or the process does not hold it, or has ended.
pub(super) fn take(port: u32, holder: &ProcessIdentity) -> io::Result<Option<Socket>> {
    let Some(inode) = inode_of(&fs::read_to_string(SOCKETS)?, port)? else { return Ok(None) };
    let processes = LinuxProcesses::new().map_err(io::Error::other)?;
    let Some(pidfd) = processes.open_exactly(holder).map_err(io::Error::other)? else {
        return Ok(None);
    };
    for number in numbers(holder.pid, inode)? {
        let copy = match pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) {
            // Closed since, or the process has ended.
            Err(Errno::BADF | Errno::SRCH) => continue,
            copy => copy?,
        };
        if fstat(&copy)?.st_ino == inode {
            return verified(copy, port);
        }
    }
    Ok(None)
}

fn verified(copy: OwnedFd, port: u32) -> io::Result<Option<Socket>> {
    let socket = Socket::adopt(copy)?;
    Ok((socket.port()? == port).then_some(socket))
}

/// The inode of the netfilter socket with this port, in the kernel's list of netlink sockets.
fn inode_of(list: &str, port: u32) -> io::Result<Option<u64>> {
    let mut lines = list.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let header = lines.next().unwrap_or_default();
    let column = |name: &str| header.iter().position(|title| *title == name);
    let (Some(protocol), Some(number), Some(inode)) =
        (column("Eth"), column("Pid"), column("Inode"))
    else {
        let why = format!("{SOCKETS} has other columns than expected: {}", header.join(" "));
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    };
    let port = port.to_string();
    let line = lines
        .find(|line| line.get(protocol) == Some(&NETFILTER) && line.get(number) == Some(&&*port));
    let damaged = |text: &str| {
        let why = format!("{SOCKETS}: {text:?} is no inode");
        io::Error::new(io::ErrorKind::InvalidData, why)
    };
    line.and_then(|line| line.get(inode).copied())
        .map(|text| text.parse().map_err(|_| damaged(text)))
        .transpose()
}

/// The numbers under which a process has a socket.
fn numbers(pid: i32, inode: u64) -> io::Result<Vec<i32>> {
    let wanted = format!("socket:[{inode}]");
    let mut found = Vec::new();
    let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        match fs::read_link(entry.path()) {
            Ok(target) if target.as_os_str() == wanted.as_str() => {
                found.extend(entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
            }
            Ok(_) => {}
            // Closed since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode
0000000000000000 0   4711       00000000 0        0        0     2        0        10
0000000000000000 12  4711       00000000 0        0        0     2        0        20
0000000000000000 12  3221225471 00000000 0        0        0     2        0        30
";

    #[test]
    fn a_socket_is_known_by_protocol_and_port() {
        assert_eq!(inode_of(LIST, 4711).unwrap(), Some(20));
        assert_eq!(inode_of(LIST, 3_221_225_471).unwrap(), Some(30));
        assert_eq!(inode_of(LIST, 10).unwrap(), None);
        inode_of("something else\n", 4711).unwrap_err();
        inode_of("", 4711).unwrap_err();
        inode_of(&LIST.replace(" 20", " x"), 4711).unwrap_err();
    }

    /// The real list: this very process's sockets.
    #[test]
    fn our_own_socket_is_found_and_copied() {
        use crate::process::Processes as _;
        let socket = match Socket::open() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            socket => socket.unwrap(),
        };
        let port = socket.port().unwrap();
        let processes = LinuxProcesses::new().unwrap();
        let ours = processes.own_identity().unwrap();
        let copy = take(port, &ours).unwrap().unwrap();
        assert_eq!(copy.port().unwrap(), port);
        // Not out of a process that has the pid and is another.
        let other = ProcessIdentity { start_ticks: ours.start_ticks + 1, ..ours };
        assert!(take(port, &other).unwrap().is_none());
    }
}
