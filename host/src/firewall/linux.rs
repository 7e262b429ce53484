//! The tables of the process's network namespace.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use matchlock_failpoints::{Area, Injected, mutated};
use matchlock_model::id::{InstallId, Mark, VmId};
use matchlock_model::identity::ProcessIdentity;
use tokio::time::Instant;

use super::netlink::{
    DELETE_TABLE, GET_CHAIN, GET_TABLE, Message, Refused, Socket, find_attribute, number, text,
};
use super::{
    Firewall, FirewallError, FirewallHandle, FirewallSpec, Held, ObservedFirewall, ObservedTable,
    Obstacle, TABLE_PREFIX, filter_table, holder, is_alike, nat_table, policy,
};
use crate::fenced::fenced;
use crate::tap::tap_name;

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// Of the calling thread's namespace; missing while no table of the old iptables is loaded.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";

/// Families, as the kernel numbers them.
const INET: u8 = 1;
const IP: u8 = 2;

/// Attributes of tables.
const TABLE_NAME: u16 = 1;
const TABLE_HANDLE: u16 = 4;
const TABLE_USERDATA: u16 = 6;
const TABLE_OWNER: u16 = 7;

/// Attributes of chains.
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const HOOK_NUMBER: u16 = 1;
const POLICY_DROP: u32 = 0;

/// How long an owner that has just closed its socket may still seem to live: a child that it was
/// spawning meanwhile holds a copy of the socket until its exec.
const CLOSING: Duration = Duration::from_millis(400);

/// How often a batch is tried again because the tables changed between looking and sending.
const MAX_TRIES: usize = 5;

/// What a crash may come between.
pub const POINTS: Area = Area::new("firewall", &["apply", "release", "remove", "take"]);

impl From<Injected> for FirewallError {
    fn from(injected: Injected) -> Self {
        Self::of("work on the firewall tables", injected.into())
    }
}

/// The firewall of the process's network namespace. Clones share what is known of the kernel.
#[derive(Debug, Clone)]
pub struct LinuxFirewall {
    /// Whether the kernel may know the owner flag.
    owner_flag: Arc<AtomicBool>,
}

impl Default for LinuxFirewall {
    fn default() -> Self {
        Self::new()
    }
}

impl LinuxFirewall {
    /// Tables go with their handle, where the kernel can do that.
    #[must_use]
    pub fn new() -> Self {
        Self { owner_flag: Arc::new(AtomicBool::new(true)) }
    }

    /// Tables stay until they are removed, as on kernels without the owner flag.
    #[must_use]
    pub fn with_plain_tables() -> Self {
        Self { owner_flag: Arc::new(AtomicBool::new(false)) }
    }
}

impl LinuxFirewall {
    /// Makes a VM's tables and lets them go; whether they had an owner. Only for a network namespace
    /// made for that.
    pub(crate) fn probe(&self) -> Result<bool, FirewallError> {
        let vm = VmId::new(0);
        let spec = FirewallSpec {
            mark: Mark { install: InstallId::from_bytes([0; 8]), vm },
            tap: tap_name(vm),
            guest: Ipv4Addr::new(192, 0, 2, 2),
            dns_servers: vec![Ipv4Addr::new(192, 0, 2, 53)],
            allow_private: false,
            allow_host_access: false,
        };
        self.apply_now(&spec).map(|made| made.is_dead_mans_switch())
    }

    /// Whether tables can be listed; makes nothing.
    pub(crate) fn list_probe() -> Result<(), FirewallError> {
        list_now(|_| false).map(drop)
    }
}

/// A table of the kernel, and how to delete exactly it.
struct Found {
    shown: ObservedTable,
    /// The number of the socket that owns it.
    port: Option<u32>,
    family: u8,
    handle: Vec<u8>,
}

impl Found {
    fn of(message: &Message) -> Option<Self> {
        let family = message.family();
        let name = text(message.attribute(TABLE_NAME)?);
        let comment = message.attribute(TABLE_USERDATA).and_then(policy::read_comment);
        let shown = ObservedTable {
            name: format!("{} {name}", family_name(family)),
            mark: comment.as_deref().and_then(Mark::parse),
            comment,
            owned: message.attribute(TABLE_OWNER).is_some(),
        };
        let port = message.attribute(TABLE_OWNER).and_then(number);
        Some(Self { shown, port, family, handle: message.attribute(TABLE_HANDLE)?.to_vec() })
    }

    /// By handle: the name might mean another table by then.
    fn deletion(&self) -> Message {
        Message::new(DELETE_TABLE, self.family).with(TABLE_HANDLE, &self.handle)
    }

    fn require_mark(&self, mark: &Mark) -> Result<(), FirewallError> {
        if self.shown.mark.as_ref() == Some(mark) {
            return Ok(());
        }
        let (table, comment) = (self.shown.name.clone(), self.shown.comment.clone());
        Err(FirewallError::NotOurs { table, comment, expected: mark.clone() })
    }
}

fn family_name(family: u8) -> String {
    match family {
        INET => "inet".to_owned(),
        IP => "ip".to_owned(),
        3 => "arp".to_owned(),
        5 => "netdev".to_owned(),
        7 => "bridge".to_owned(),
        10 => "ip6".to_owned(),
        other => format!("family {other}"),
    }
}

fn open() -> Result<Socket, FirewallError> {
    Socket::open().map_err(|source| FirewallError::of("open a netfilter socket", source))
}

/// A TAP's tables, filter first.
fn find(socket: &mut Socket, tap: &str) -> Result<[Option<Found>; 2], FirewallError> {
    let mut look = |family, name: String| {
        let question =
            Message::new(GET_TABLE, family).with(TABLE_NAME, &[name.as_bytes(), b"\0"].concat());
        let failed = |source| FirewallError::of(format!("look at the table {name}"), source);
        let answer = socket.get(question).map_err(failed)?;
        Ok::<_, FirewallError>(answer.as_ref().and_then(Found::of))
    };
    Ok([look(INET, filter_table(tap))?, look(IP, nat_table(tap))?])
}

/// The error of a batch that the kernel refused.
fn refused(doing: String, refused: Refused) -> FirewallError {
    let Refused { message, messages, source } = refused;
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => FirewallError::NotPermitted { doing, source },
        Some(libc::E2BIG) => FirewallError::Full { doing, source },
        _ => FirewallError::Refused { doing, message, messages, source },
    }
}

/// Whether the tables changed between looking and sending: look again.
fn is_stale(refused: &Refused) -> bool {
    matches!(refused.source.raw_os_error(), Some(libc::ENOENT | libc::EEXIST))
}

/// Whether the kernel may have refused the owner flag.
fn is_unknown_flag(refused: &Refused) -> bool {
    matches!(refused.source.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

/// Makes or replaces the tables through this socket.
fn write_tables(
    socket: &mut Socket,
    spec: &FirewallSpec,
    owned: bool,
) -> Result<Result<(), Refused>, FirewallError> {
    let doing = || format!("write the firewall tables of {}", spec.tap);
    let written = policy::write(spec, owned).map_err(|error| {
        let source = io::Error::new(io::ErrorKind::InvalidInput, error.to_string());
        FirewallError::Kernel { doing: doing(), source }
    })?;
    let mut tries = 0;
    loop {
        tries += 1;
        let existing = find(socket, &spec.tap)?;
        let mut deletions = Vec::new();
        for table in existing.iter().flatten() {
            table.require_mark(&spec.mark)?;
            if table.shown.owned {
                return Err(FirewallError::OwnerLives { table: table.shown.name.clone() });
            }
            deletions.push(table.deletion());
        }
        match socket.batch(&deletions, &written) {
            Err(refused) if is_stale(&refused) && tries < MAX_TRIES => {}
            result => return Ok(result),
        }
    }
}

impl LinuxFirewall {
    fn apply_now(&self, spec: &FirewallSpec) -> Result<FirewallHandle, FirewallError> {
        let doing = format!("write the firewall tables of {}", spec.tap);
        let mut socket = open()?;
        POINTS.before("apply")?;
        let owned = self.owner_flag.load(Ordering::Relaxed);
        let mut result = write_tables(&mut socket, spec, owned)?;
        let mut held_by_socket = owned;
        if owned && result.as_ref().is_err_and(is_unknown_flag) {
            // If the tables can be had without the flag, the flag was the reason.
            let plain = write_tables(&mut socket, spec, false)?;
            if plain.is_ok() {
                self.owner_flag.store(false, Ordering::Relaxed);
                held_by_socket = false;
                result = plain;
                tracing::warn!(
                    "this kernel's nftables has no owner flag (Linux 5.12): tables of a killed \
                     process stay until `matchlock gc`"
                );
            }
        }
        result.map_err(|error| refused(doing, error))?;
        POINTS.after("apply")?;
        let held =
            if held_by_socket { Held::Socket(Arc::new(Mutex::new(socket))) } else { Held::Nothing };
        Ok(FirewallHandle { tap: spec.tap.clone(), mark: spec.mark.clone(), held })
    }
}

/// Deletes a handle's tables through the socket that owns them, and closes it. To close it is not
/// enough: see [`CLOSING`].
fn release_now(handle: FirewallHandle) -> Result<(), FirewallError> {
    let FirewallHandle { tap, mark, held } = handle;
    let Held::Socket(socket) = &held else { return Ok(()) };
    let mut socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
    POINTS.before("release")?;
    remove_through(&mut socket, None, &tap, &mark)?;
    Ok(POINTS.after("release")?)
}

/// Removes a TAP's tables and looks again.
fn remove_now(tap: &str, mark: &Mark) -> Result<(), FirewallError> {
    POINTS.before("remove")?;
    if mutated("firewall_remove_lies") {
        return Ok(());
    }
    remove_through(&mut open()?, None, tap, mark)?;
    Ok(POINTS.after("remove")?)
}

/// Looks through one socket, and deletes through this one or the other.
fn remove_through(
    socket: &mut Socket,
    mut other: Option<&mut Socket>,
    tap: &str,
    mark: &Mark,
) -> Result<(), FirewallError> {
    let doing = || format!("remove the firewall tables of {tap}");
    let mut tries = 0;
    loop {
        tries += 1;
        let existing = find(socket, tap)?;
        let existing: Vec<_> = existing.iter().flatten().collect();
        for table in &existing {
            table.require_mark(mark)?;
        }
        let Some(first) = existing.first() else { return Ok(()) };
        if tries > MAX_TRIES {
            return Err(FirewallError::StillThere { table: first.shown.name.clone() });
        }
        let owned = existing.iter().find(|table| table.shown.owned);
        let deletions: Vec<_> = existing.iter().map(|table| table.deletion()).collect();
        let through = other.as_deref_mut().unwrap_or(socket);
        match (through.delete(&deletions), owned) {
            (Ok(()), _) => {}
            (Err(refused), _) if is_stale(&refused) => {}
            // Whoever else reads from a socket that we have a copy of may have got its answer.
            (Err(refused), _) if refused.source.kind() == io::ErrorKind::UnexpectedEof => {}
            (Err(refused), Some(owned)) if refused.source.raw_os_error() == Some(libc::EPERM) => {
                return Err(FirewallError::OwnerLives { table: owned.shown.name.clone() });
            }
            (Err(error), _) => return Err(refused(doing(), error)),
        }
    }
}

/// Removes a TAP's tables through a copy of the socket that owns them, which this process holds.
fn remove_from_now(tap: &str, mark: &Mark, holder: &ProcessIdentity) -> Result<(), FirewallError> {
    POINTS.before("take")?;
    let mut looking = open()?;
    let found = find(&mut looking, tap)?;
    let owned = found.iter().flatten().find_map(|table| Some((table.port?, &table.shown.name)));
    let Some((port, table)) = owned else { return Ok(()) };
    match holder::take(port, holder) {
        Ok(Some(mut socket)) => remove_through(&mut looking, Some(&mut socket), tap, mark)?,
        Ok(None) => return Err(FirewallError::OwnerLives { table: table.clone() }),
        Err(source) => {
            let (table, pid) = (table.clone(), holder.pid);
            return Err(FirewallError::HeldBy { table, pid, source });
        }
    }
    Ok(POINTS.after("take")?)
}

fn list_now(wanted: impl Fn(&ObservedTable) -> bool) -> Result<Vec<ObservedTable>, FirewallError> {
    let tables = open()?.dump(&Message::new(GET_TABLE, 0));
    let tables = tables.map_err(|source| FirewallError::of("list the firewall tables", source))?;
    Ok(tables.iter().filter_map(Found::of).map(|found| found.shown).filter(wanted).collect())
}

/// What a chain of somebody else does to every packet that no rule of it lets through.
fn obstacle_of_chain(chain: &Message) -> Option<Obstacle> {
    let table = text(chain.attribute(CHAIN_TABLE)?);
    let hook = find_attribute(chain.attribute(CHAIN_HOOK)?, HOOK_NUMBER).and_then(number)?;
    let policy = chain.attribute(CHAIN_POLICY).and_then(number)?;
    let family = chain.family();
    if policy != POLICY_DROP || !matches!(family, INET | IP) || table.starts_with(TABLE_PREFIX) {
        return None;
    }
    let lost = match hook {
        1 => "access to the host, where it was allowed (--allow-host-access, DNS)",
        3 => "answers of the host",
        _ => "traffic between guests and the internet",
    };
    let name = text(chain.attribute(CHAIN_NAME)?);
    let hint = if family == IP && table == "filter" && name == "FORWARD" {
        "; docker and ufw do this: `iptables -I FORWARD -i fc-+ -j ACCEPT` and the same with \
         `-o fc-+` let guests through (with docker, in the chain DOCKER-USER)"
    } else {
        "; let fc-* through there"
    };
    let table = format!("{} {table}", family_name(family));
    Some(Obstacle {
        what: format!("chain {name} of table {table}"),
        why: format!("its policy is drop, so {lost} may be lost{hint}"),
    })
}

fn obstacle_of_table(table: &ObservedTable) -> Option<Obstacle> {
    let (_, name) = table.name.split_once(' ')?;
    (name == "firewalld").then(|| Obstacle {
        what: format!("table {}", table.name),
        why: "firewalld rejects forwarded traffic of interfaces in no zone; \
              `firewall-cmd --zone=trusted --add-interface=fc-+` lets guests through"
            .to_owned(),
    })
}

/// The tables of the old iptables, which netlink does not show.
fn legacy_obstacle() -> Result<Option<Obstacle>, FirewallError> {
    let tables = match fs::read_to_string(LEGACY_TABLES) {
        Ok(tables) => tables,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(FirewallError::of(format!("read {LEGACY_TABLES}"), source)),
    };
    Ok(tables.lines().any(|name| name == "filter").then(|| Obstacle {
        what: "table filter of iptables-legacy".to_owned(),
        why: "Matchlock cannot look into it; if its FORWARD chain drops, guests reach nothing"
            .to_owned(),
    }))
}

fn obstacles_now() -> Result<Vec<Obstacle>, FirewallError> {
    let mut socket = open()?;
    let failed = |source| FirewallError::of("list the host's firewall chains", source);
    let chains = socket.dump(&Message::new(GET_CHAIN, 0)).map_err(failed)?;
    let tables = socket.dump(&Message::new(GET_TABLE, 0)).map_err(failed)?;
    let tables: Vec<_> = tables.iter().filter_map(Found::of).map(|found| found.shown).collect();
    let mut obstacles: Vec<_> = chains.iter().filter_map(obstacle_of_chain).collect();
    obstacles.extend(tables.iter().filter_map(obstacle_of_table));
    obstacles.extend(legacy_obstacle()?);
    Ok(obstacles)
}

/// Runs an operation on another thread.
async fn elsewhere<T: Send + 'static>(
    doing: &str,
    work: impl FnOnce() -> Result<T, FirewallError> + Send + 'static,
) -> Result<T, FirewallError> {
    fenced(work).await.map_err(|source| FirewallError::of(doing, source))?
}

#[async_trait]
impl Firewall for LinuxFirewall {
    async fn apply(&self, spec: &FirewallSpec) -> Result<FirewallHandle, FirewallError> {
        let (this, spec) = (self.clone(), spec.clone());
        elsewhere("write the firewall tables", move || this.apply_now(&spec)).await
    }

    async fn release(&self, handle: FirewallHandle) -> Result<(), FirewallError> {
        let (tap, mark) = (handle.tap.clone(), handle.mark.clone());
        elsewhere("remove the firewall tables", move || release_now(handle)).await?;
        self.remove(&tap, &mark).await
    }

    async fn observe(&self, tap: &str) -> Result<ObservedFirewall, FirewallError> {
        let tap = tap.to_owned();
        elsewhere("look at the firewall tables", move || {
            let [filter, nat] = find(&mut open()?, &tap)?;
            let shown = |found: Option<Found>| found.map(|found| found.shown);
            Ok(ObservedFirewall { filter: shown(filter), nat: shown(nat) })
        })
        .await
    }

    async fn list_marked(&self, install: &InstallId) -> Result<Vec<ObservedTable>, FirewallError> {
        let install = install.clone();
        let ours =
            move |table: &ObservedTable| table.mark.as_ref().is_some_and(|m| m.install == install);
        elsewhere("list the firewall tables", move || list_now(ours)).await
    }

    async fn list_alike(&self) -> Result<Vec<ObservedTable>, FirewallError> {
        elsewhere("list the firewall tables", || list_now(is_alike)).await
    }

    async fn remove(&self, tap: &str, mark: &Mark) -> Result<(), FirewallError> {
        let begun = Instant::now();
        loop {
            let (tap, mark) = (tap.to_owned(), mark.clone());
            let removed =
                elsewhere("remove the firewall tables", move || remove_now(&tap, &mark)).await;
            match removed {
                Err(FirewallError::OwnerLives { .. }) if begun.elapsed() < CLOSING => {
                    tokio::time::sleep(CLOSING / 20).await;
                }
                result => return result,
            }
        }
    }

    async fn remove_from(
        &self,
        tap: &str,
        mark: &Mark,
        holder: &ProcessIdentity,
    ) -> Result<(), FirewallError> {
        match self.remove(tap, mark).await {
            Err(FirewallError::OwnerLives { .. }) if mutated("leave_tables_of_others") => {
                return Ok(());
            }
            Err(FirewallError::OwnerLives { .. }) => {}
            result => return result,
        }
        let (name, expected, holder) = (tap.to_owned(), mark.clone(), holder.clone());
        let work = move || remove_from_now(&name, &expected, &holder);
        elsewhere("remove the firewall tables", work).await?;
        // What was done through the socket of another is looked at through our own.
        self.remove(tap, mark).await
    }

    async fn obstacles(&self) -> Result<Vec<Obstacle>, FirewallError> {
        elsewhere("list the host's firewall chains", obstacles_now).await
    }

    fn ip_forward(&self) -> Result<bool, FirewallError> {
        let read = fs::read_to_string(IP_FORWARD);
        let read =
            read.map_err(|source| FirewallError::of(format!("read {IP_FORWARD}"), source))?;
        Ok(read.trim() != "0")
    }

    fn enable_ip_forward(&self) -> Result<bool, FirewallError> {
        if self.ip_forward()? {
            return Ok(false);
        }
        match fs::write(IP_FORWARD, "1") {
            Ok(()) => Ok(true),
            Err(source) if source.raw_os_error() == Some(libc::EROFS) => {
                Err(FirewallError::CannotForward(source))
            }
            Err(source) => Err(FirewallError::of(format!("write 1 to {IP_FORWARD}"), source)),
        }
    }
}
