//! TAPs: a VM's link to the host, and what the host's own links and routes occupy.
//!
//! ```text
//!   guest eth0 ── hypervisor ──(descriptor)── fc-0badcafe ── 192.168.100.1/24, the gateway
//!                                             alias = matchlock:<install-id>:<vm-id>
//! ```
//!
//! It owns links named `fc-<8 hex>` whose alias is a mark of this installation, and nothing else
//! of the host's links, addresses and routes, which it only reads. Everything happens in the
//! network namespace of the calling thread, which is the process's own.
//!
//! # Invariants
//! 1. **The kernel's dead-man's switch.** A TAP is not persistent: it is there as long as a
//!    descriptor of it is open, in this process or in the hypervisor it was handed to. The kernel
//!    removes the link with the last one, however its holders end; it has done so when `close`
//!    returns, which therefore takes tens of milliseconds. (A child that is being spawned at that
//!    moment holds a copy of the descriptor until its exec.)
//! 2. A name is taken exclusively: a link that is there already is never attached to, changed or
//!    replaced, whoever made it.
//! 3. A TAP is up only when it has its mark, its MTU, its address, IPv6 off, ARP off, and the
//!    guest as its one neighbour. Both ends have hardware addresses made of the VM's id, so nobody
//!    needs to ask: whatever ARP a guest sends is dropped unread. It can neither ask which addresses
//!    the host has, nor claim one, nor fill the host's table of neighbours, which all links share.
//! 4. Only a link whose alias is exactly the expected mark is removed. "Already gone" is success;
//!    "could not look" is not; after a removal the host was looked at again.
//! 5. A list is complete: one that the kernel says has changed meanwhile is read again.
//!
//! # When things go wrong
//! * **Error, or a dropped future**: what was half made goes with its descriptor.
//! * **Stop**: [`Taps::remove`], even while the hypervisor still holds a descriptor.
//! * **Crash, SIGKILL**: the kernel closes the descriptors, so nothing is left.
//! * **Restart of the owner's actor**: the handle lives outside it; [`Taps::observe`] says what is.

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use async_trait::async_trait;
use matchlock_model::id::{InstallId, Mark, VmId};

mod fake;
mod linux;
mod route;

pub use fake::{FakeTaps, TapOp};
pub use linux::{LinuxTaps, POINTS};
pub(crate) use linux::{probe, probe_device};

/// What the name of each of our TAPs begins with.
pub const TAP_PREFIX: &str = "fc-";

/// The name of a VM's TAP: `fc-` and the 8 hex digits of its id.
#[must_use]
pub fn tap_name(vm: VmId) -> String {
    format!("{TAP_PREFIX}{}", vm.suffix())
}

/// Whether a link looks like one of Matchlock's.
fn is_alike(tap: &ObservedTap) -> bool {
    let is_suffix = |suffix: &str| format!("vm-{suffix}").parse::<VmId>().is_ok();
    tap.mark.is_some() || tap.name.strip_prefix(TAP_PREFIX).is_some_and(is_suffix)
}

/// A TAP to be made. Its name comes from the mark's VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapSpec {
    /// Whose it is.
    pub mark: Mark,
    /// The host's address on it.
    pub gateway: Ipv4Addr,
    /// The guest's, the only neighbour there is.
    pub guest: Ipv4Addr,
    /// The length of the subnet's prefix, in bits.
    pub prefix: u8,
    /// The largest packet, in bytes without the Ethernet header.
    pub mtu: u32,
}

impl TapSpec {
    /// The link's name.
    #[must_use]
    pub fn name(&self) -> String {
        tap_name(self.mark.vm)
    }
}

/// A TAP that we made, and the descriptor that keeps it there.
///
/// Dropping it closes the descriptor; if it was the last one the link goes, and the drop takes
/// tens of milliseconds. After [`Taps::remove`] it is quick.
#[derive(Debug)]
pub struct TapHandle {
    name: String,
    index: u32,
    fd: OwnedFd,
}

impl TapHandle {
    /// The link's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The link's index in its network namespace.
    #[must_use]
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// The descriptor, to be inherited by a hypervisor. It is closed on exec, takes one Ethernet
    /// frame per read or write, each behind a virtio-net header.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Gives the descriptor away; the TAP then lives as long as it and its copies.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

/// A link as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedTap {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its alias, whatever it says.
    pub alias: Option<String>,
    /// The alias, if it is a mark (of any installation).
    pub mark: Option<Mark>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its IPv4 addresses with the length of their prefix.
    pub addresses: Vec<(Ipv4Addr, u8)>,
    /// Whether it was set up.
    pub up: bool,
    /// Whether it takes part in ARP; ours do not.
    pub arp: bool,
}

/// Why a subnet counts as taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SubnetUse {
    /// An address of the host lies in it.
    Address,
    /// A route leads to it.
    Route,
}

/// A part of the IPv4 space that this host uses already.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostSubnet {
    /// Its first address.
    pub network: Ipv4Addr,
    /// The length of its prefix in bits, 2 to 32.
    pub prefix: u8,
    /// What uses it.
    pub used_by: SubnetUse,
    /// The link's name, where there is one.
    pub link: Option<String>,
}

impl HostSubnet {
    /// The subnet in which an address lies. Bits behind the prefix are cut off.
    pub(crate) fn of(
        address: Ipv4Addr,
        prefix: u8,
        used_by: SubnetUse,
        link: Option<String>,
    ) -> Self {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
        Self { network: (address.to_bits() & mask).into(), prefix, used_by, link }
    }
}

impl fmt::Display for HostSubnet {
    /// For messages: `the route to 10.0.0.0/8 of eth0`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.used_by {
            SubnetUse::Address => "the address in",
            SubnetUse::Route => "the route to",
        };
        write!(f, "{what} {}/{}", self.network, self.prefix)?;
        self.link.as_ref().map_or(Ok(()), |link| write!(f, " of {link}"))
    }
}

/// Why a TAP could not be made, looked at or removed.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel wants CAP_NET_ADMIN for this.
    #[error(
        "not permitted to {doing}: VM networking needs root or CAP_NET_ADMIN; \
         --no-network runs a VM without"
    )]
    NotPermitted {
        /// What was being done, e.g. `create the TAP fc-0badcafe`.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no TUN driver here.
    #[error(
        "could not open /dev/net/tun: the kernel module tun is missing, or the device is not visible \
         here; --no-network runs a VM without"
    )]
    NoTun(#[source] io::Error),
    /// A link of this name is there already.
    #[error(
        "a link named {name} is there already ({}); it was left alone",
        describe(alias.as_deref())
    )]
    AlreadyExists {
        /// The name.
        name: String,
        /// What its alias says.
        alias: Option<String>,
    },
    /// The link carries another mark than the one expected, or none.
    #[error("the link {name} is not {expected} ({}); it was left alone", describe(alias.as_deref()))]
    NotOurs {
        /// The name.
        name: String,
        /// What its alias says.
        alias: Option<String>,
        /// The mark it should carry.
        expected: Mark,
    },
    /// IPv6 is on for new links, and the setting cannot be changed here.
    #[error(
        "could not turn IPv6 off on the TAP {name}: /proc/sys is read-only here (a container?): turn \
         net.ipv6.conf.default.disable_ipv6 on where it was set up (docker run --sysctl \
         net.ipv6.conf.default.disable_ipv6=1); --no-network runs a VM without"
    )]
    CannotDisableIpv6 {
        /// The link's name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The removed link is still there.
    #[error("the link {name} is still there after its removal")]
    StillThere {
        /// The name.
        name: String,
    },
    /// Anything else that the kernel said.
    #[error("could not {doing}")]
    Kernel {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
}

fn describe(alias: Option<&str>) -> String {
    alias.map_or_else(|| "it has no alias".to_owned(), |alias| format!("its alias is {alias:?}"))
}

impl TapError {
    /// The error of an operation; a refusal for want of privilege is told apart.
    pub(crate) fn of(doing: impl Into<String>, source: io::Error) -> Self {
        let doing = doing.into();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted { doing, source },
            _ => Self::Kernel { doing, source },
        }
    }
}

/// Making, looking at and removing TAPs.
#[async_trait]
pub trait Taps: Send + Sync {
    /// Makes a TAP, marks it and sets it up. When the future is dropped or fails, nothing is left.
    ///
    /// # Errors
    /// [`TapError::AlreadyExists`] when there is any link of that name; otherwise when the kernel
    /// refuses.
    async fn create(&self, spec: &TapSpec) -> Result<TapHandle, TapError>;

    /// The link of this name; `None` when there is none.
    ///
    /// # Errors
    /// When it could not be looked at.
    async fn observe(&self, name: &str) -> Result<Option<ObservedTap>, TapError>;

    /// Every link whose alias is a mark of this installation, whatever its name.
    ///
    /// # Errors
    /// When the links could not be listed.
    async fn list_marked(&self, install: &InstallId) -> Result<Vec<ObservedTap>, TapError>;

    /// Every link that looks like one of Matchlock's, whosever it is: its alias is a mark of any
    /// installation, or its name is one that we would give. Without their addresses.
    ///
    /// # Errors
    /// When the links could not be listed.
    async fn list_alike(&self) -> Result<Vec<ObservedTap>, TapError>;

    /// Removes the link of this name if its alias is exactly this mark, and looks again. A link
    /// that is gone already is success.
    ///
    /// # Errors
    /// [`TapError::NotOurs`] when it carries anything else; otherwise when it could not be looked
    /// at or is still there.
    async fn remove(&self, name: &str, mark: &Mark) -> Result<(), TapError>;

    /// Every IPv4 address of this host and every destination of its IPv4 routes in any table, our
    /// own TAPs' included. Default routes are left out, also those cut in halves (`0.0.0.0/1` and
    /// `128.0.0.0/1`), as VPN clients write them: they claim nothing in particular.
    ///
    /// # Errors
    /// When they could not be read.
    async fn host_subnets(&self) -> Result<Vec<HostSubnet>, TapError>;
}
