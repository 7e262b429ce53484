//! Brings the loopback device up. The NIC is set up by the host's order, see
//! [`crate::network`].

use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

mod request {
    nix::ioctl_readwrite_bad!(get_flags, libc::SIOCGIFFLAGS, libc::ifreq);
    nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, libc::ifreq);
}

/// Brings `lo` up; the kernel gives it its addresses.
///
/// # Errors
/// When the kernel has no network or refuses.
pub fn loopback_up() -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: an interface request is plain data; all zeroes is one with an empty name.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in interface.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *slot = libc::c_char::from_ne_bytes([*byte]);
    }
    // SAFETY: the descriptor is a socket and the request is a valid interface request.
    unsafe { request::get_flags(socket.as_raw_fd(), &mut interface) }?;
    // SAFETY: the call before has filled the flags in, so that member is the one in use.
    let flags = unsafe { interface.ifr_ifru.ifru_flags };
    let up = libc::c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    interface.ifr_ifru.ifru_flags = flags | up;
    // SAFETY: as above; the kernel only reads the request.
    unsafe { request::set_flags(socket.as_raw_fd(), &interface) }?;
    Ok(())
}
