//! A VM's two nftables tables: what its guest may reach, and its masquerade.
//!
//! ```text
//!              prerouting           ┌─ forward: from_guest ─► the internet, masqueraded
//!   guest ─tap─► source (spoofed?) ─┤              └ refuse: other guests, private ranges
//!                special ranges?    └─ input: to_host ─► refuse, but configured DNS
//!
//!   table inet matchlock_<tap>     filter          comment = matchlock:<install-id>:<vm-id>
//!   table ip   matchlock_nat_<tap> masquerade      the same comment
//! ```
//!
//! It owns these two tables per VM and nothing else of the host's rules; the rest it only reads,
//! to say what it cannot override. `policy` writes the rules (with rustables), `netlink` sends
//! them, and what is refused is refused at once: a TCP reset, or ICMP "administratively
//! prohibited" (which the kernel limits to about one per second and guest, after a burst of six).
//!
//! # Invariants
//! 1. Both tables come and go in one atomic batch, through one netlink socket that the
//!    [`FirewallHandle`] holds, and after the launch the hypervisor alone: an owner that hangs keeps
//!    no table of a VM that has ended. (From one that stands still in between, whoever takes its VM over
//!    takes a copy of the socket: `holder`.) They have the owner flag: **the kernel removes them when that
//!    socket closes**, however its process ends, and lets nobody else change them. (A child that
//!    is being spawned at that moment holds a copy of the socket until its exec.) Where the kernel
//!    has no such flag (before 5.12) they are plain tables, and `gc` finds them by mark.
//! 2. A table that carries another mark, or none, is never changed or removed.
//! 3. No base chain has policy drop: a hook is the whole host's.
//! 4. What the guest may send is decided by each packet alone, not by connection state. What it may
//!    get are answers to connections that carry its own mark (`ct mark`, the VM's id): nothing that
//!    an earlier VM with the same address had open is open to the next.
//! 5. "Already gone" is success; "could not look" is not; after a removal the host was looked at
//!    again.
//!
//! # When things go wrong
//! * **Error**: nothing of the batch was carried out.
//! * **A dropped future**: the batch was never sent, or it was and its tables are gone again
//!   (plain tables: are seen by whoever looks next).
//! * **Stop**: [`Firewall::release`] with the handle, [`Firewall::remove`] without.
//! * **Crash, SIGKILL**: the kernel closes the socket, so nothing is left.
//! * **Restart of the owner's actor**: the hypervisor keeps the tables there; nothing is done.

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use matchlock_model::id::{InstallId, Mark};
use matchlock_model::identity::ProcessIdentity;

mod fake;
mod holder;
mod linux;
mod netlink;
mod policy;

pub use fake::{FakeFirewall, FirewallOp};
pub use linux::{LinuxFirewall, POINTS};
pub use policy::{ALWAYS_REFUSED, PRIVATE_RANGES};

/// What the name of each of our tables begins with.
const TABLE_PREFIX: &str = "matchlock_";

/// The name of a TAP's filter table, family `inet`.
#[must_use]
pub fn filter_table(tap: &str) -> String {
    format!("{TABLE_PREFIX}{tap}")
}

/// The name of a TAP's NAT table, family `ip`.
#[must_use]
pub fn nat_table(tap: &str) -> String {
    format!("{TABLE_PREFIX}nat_{tap}")
}

/// Whether a table looks like one of Matchlock's.
fn is_alike(table: &ObservedTable) -> bool {
    let named = |(_, name): (&str, &str)| name.starts_with(TABLE_PREFIX);
    table.mark.is_some() || table.name.split_once(' ').is_some_and(named)
}

/// What a VM's guest may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallSpec {
    /// Whose it is.
    pub mark: Mark,
    /// The name of its TAP; at most 15 bytes. It need not exist yet.
    pub tap: String,
    /// The guest's address: the only source that may leave the TAP.
    pub guest: Ipv4Addr,
    /// Name servers that the guest may ask (UDP and TCP, port 53) wherever they are.
    pub dns_servers: Vec<Ipv4Addr>,
    /// Opens [`PRIVATE_RANGES`]; not the host's own addresses, not other guests.
    pub allow_private: bool,
    /// Opens every address of the host, the gateway included; nothing behind it.
    pub allow_host_access: bool,
}

/// The tables of a VM, and the netlink socket that keeps them there.
///
/// Dropping it closes the socket, and the tables go with it; that takes a grace period, tens of
/// milliseconds. [`Firewall::release`] does it on another thread and looks.
#[derive(Debug)]
pub struct FirewallHandle {
    tap: String,
    mark: Mark,
    held: Held,
}

#[derive(Debug)]
enum Held {
    /// The kernel removes the tables with this socket.
    Socket(Arc<Mutex<netlink::Socket>>),
    /// Nothing: the tables stay until they are removed.
    Nothing,
    Fake {
        _keeper: fake::Keeper,
    },
}

impl FirewallHandle {
    /// The TAP whose tables they are.
    #[must_use]
    pub fn tap(&self) -> &str {
        &self.tap
    }

    /// What keeps the tables there, for the hypervisor to hold as well: a guest must not outlive its
    /// rules by a moment when its owner is killed. `None` for tables that nothing keeps.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn keeper(&self) -> io::Result<Option<OwnedFd>> {
        match &self.held {
            Held::Socket(socket) => {
                let socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
                socket.descriptor().try_clone_to_owned().map(Some)
            }
            Held::Nothing | Held::Fake { .. } => Ok(None),
        }
    }

    /// Whether the tables go when this is dropped or its process ends.
    #[must_use]
    pub const fn is_dead_mans_switch(&self) -> bool {
        !matches!(self.held, Held::Nothing)
    }
}

/// A table as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedTable {
    /// Its family and name as nft writes them, e.g. `inet matchlock_fc-0badcafe`.
    pub name: String,
    /// Its comment, whatever it says.
    pub comment: Option<String>,
    /// The comment, if it is a mark (of any installation).
    pub mark: Option<Mark>,
    /// Whether a living netlink socket owns it (its process, or a child of it, lives).
    pub owned: bool,
}

/// Which of a TAP's tables exist.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ObservedFirewall {
    /// The filter table.
    pub filter: Option<ObservedTable>,
    /// The NAT table.
    pub nat: Option<ObservedTable>,
}

impl ObservedFirewall {
    /// Whether none of them exists.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        self.filter.is_none() && self.nat.is_none()
    }
}

/// Something on this host that may keep a guest's packets from where our tables let them go: an
/// accept in one table does not undo a drop in another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// What it is, e.g. `chain FORWARD of table ip filter`.
    pub what: String,
    /// What it does, and what helps; one line.
    pub why: String,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

/// Why tables could not be made, looked at or removed.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// The kernel wants CAP_NET_ADMIN for this, for looking as well.
    #[error(
        "not permitted to {doing}: VM networking needs root or CAP_NET_ADMIN; \
         --no-network runs a VM without"
    )]
    NotPermitted {
        /// What was being done, e.g. `list the firewall tables`.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The tables belong to a netlink socket of a process that lives.
    #[error(
        "the owner of the table {table} lives, and only it can change the table: stop the VM first"
    )]
    OwnerLives {
        /// The table.
        table: String,
    },
    /// The tables belong to a netlink socket of this process, and it cannot be had.
    #[error(
        "the table {table} is held by process {pid}, whose socket cannot be had (that takes root, or CAP_SYS_PTRACE): end that process (kill -9 {pid}), then run `matchlock gc`"
    )]
    HeldBy {
        /// The table.
        table: String,
        /// The process.
        pid: i32,
        /// Why its socket cannot be had.
        source: io::Error,
    },
    /// The table carries another mark than the one expected, or none.
    #[error(
        "the table {table} is not {expected} ({}); it was left alone",
        comment.as_ref().map_or_else(|| "it has no comment".to_owned(), |c| format!("its comment is {c:?}"))
    )]
    NotOurs {
        /// The table.
        table: String,
        /// What its comment says.
        comment: Option<String>,
        /// The mark it should carry.
        expected: Mark,
    },
    /// The kernel refused a batch; nothing of it was carried out.
    #[error(
        "the kernel refused to {doing} (message {message} of {messages}): is nftables with NAT, reject and conntrack built in or loadable?"
    )]
    Refused {
        /// What was being done.
        doing: String,
        /// Which message it refused, from 1; 0 for the batch itself.
        message: u32,
        /// Of how many.
        messages: usize,
        /// What it said.
        source: io::Error,
    },
    /// A hook of this network namespace has no place for another chain: the kernel's limit is 1,024,
    /// and each VM needs two in prerouting.
    #[error(
        "could not {doing}: this network namespace has as many firewall chains as the kernel allows \
         (room for about 500 VMs); end some, or run further ones in another network namespace"
    )]
    Full {
        /// What was being done.
        doing: String,
        /// What it said.
        source: io::Error,
    },
    /// Forwarding is off, and the setting cannot be changed here.
    #[error(
        "this host does not forward packets, and /proc/sys is read-only here (a container?): turn \
         net.ipv4.ip_forward on where it was set up (docker run --sysctl net.ipv4.ip_forward=1); \
         --no-network runs a VM without"
    )]
    CannotForward(#[source] io::Error),
    /// The removed table is still there.
    #[error("the table {table} is still there after its removal")]
    StillThere {
        /// The table.
        table: String,
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

impl FirewallError {
    /// The error of an operation; a refusal for want of privilege is told apart.
    pub(crate) fn of(doing: impl Into<String>, source: io::Error) -> Self {
        let doing = doing.into();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted { doing, source },
            _ => Self::Kernel { doing, source },
        }
    }
}

/// Making, looking at and removing VMs' tables.
#[async_trait]
pub trait Firewall: Send + Sync {
    /// Makes both tables. Tables with the same mark that nobody owns are replaced.
    ///
    /// # Errors
    /// [`FirewallError::NotOurs`] when a table of that name carries anything else,
    /// [`FirewallError::OwnerLives`] when it is owned; otherwise when the kernel refuses. Nothing
    /// was changed then.
    async fn apply(&self, spec: &FirewallSpec) -> Result<FirewallHandle, FirewallError>;

    /// Gives the tables up and looks whether they are gone.
    ///
    /// # Errors
    /// As [`Firewall::remove`].
    async fn release(&self, handle: FirewallHandle) -> Result<(), FirewallError>;

    /// Which of a TAP's tables exist, whoever made them.
    ///
    /// # Errors
    /// When they could not be looked at.
    async fn observe(&self, tap: &str) -> Result<ObservedFirewall, FirewallError>;

    /// Every table, of whatever name and family, whose comment is a mark of this installation.
    ///
    /// # Errors
    /// When the tables could not be listed.
    async fn list_marked(&self, install: &InstallId) -> Result<Vec<ObservedTable>, FirewallError>;

    /// Every table that looks like one of Matchlock's, whosever it is: its comment is a mark of any
    /// installation, or its name is one that we would give.
    ///
    /// # Errors
    /// When the tables could not be listed.
    async fn list_alike(&self) -> Result<Vec<ObservedTable>, FirewallError>;

    /// Removes a TAP's tables if their comment is exactly this mark, and looks again. Gone already
    /// is success.
    ///
    /// # Errors
    /// [`FirewallError::OwnerLives`] when a living socket owns one, still so after some tenths of a
    /// second, [`FirewallError::NotOurs`]
    /// when one carries anything else; nothing was removed then. Otherwise when they could not be
    /// looked at or are still there.
    async fn remove(&self, tap: &str, mark: &Mark) -> Result<(), FirewallError>;

    /// As [`Firewall::remove`], of tables that this process may still hold: one that stands still, or
    /// hangs, and got no further than to make them. For whoever has seen to it that the process may do
    /// nothing more to the VM: they are removed through its own socket.
    ///
    /// # Errors
    /// As [`Firewall::remove`]; [`FirewallError::HeldBy`] when the process holds them and its socket
    /// cannot be had (that takes root, or CAP_SYS_PTRACE).
    async fn remove_from(
        &self,
        tap: &str,
        mark: &Mark,
        holder: &ProcessIdentity,
    ) -> Result<(), FirewallError>;

    /// What of this host's other rules may stand in a guest's way. Rules inside chains are not
    /// read: an empty answer is no promise.
    ///
    /// # Errors
    /// When the host's chains could not be listed.
    async fn obstacles(&self) -> Result<Vec<Obstacle>, FirewallError>;

    /// Whether the host forwards IPv4 packets at all.
    ///
    /// # Errors
    /// When the setting could not be read.
    fn ip_forward(&self) -> Result<bool, FirewallError>;

    /// Turns forwarding on if it is off, and says whether it was: the one lasting change to a
    /// host, to be logged by the caller.
    ///
    /// # Errors
    /// When the setting could not be read or written; [`FirewallError::CannotForward`] says what to
    /// do where nobody can write it.
    fn enable_ip_forward(&self) -> Result<bool, FirewallError>;
}
