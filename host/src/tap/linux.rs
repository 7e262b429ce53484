//! TAPs through `/dev/net/tun` and rtnetlink.

use std::ffi::{c_char, c_int, c_short};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use async_trait::async_trait;
use matchlock_failpoints::{Area, Injected, mutated};
use matchlock_model::id::{InstallId, Mark};
use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::fs::{Mode, OFlags};

use super::route::Route;
use super::{
    HostSubnet, ObservedTap, SubnetUse, TAP_PREFIX, TapError, TapHandle, TapSpec, Taps, is_alike,
};

nix::ioctl_write_ptr_bad!(
    /// Makes a TAP of this descriptor, or attaches it to one.
    tunsetiff,
    nix::request_code_write!(b'T', 202, size_of::<c_int>()),
    libc::ifreq
);

/// The TAPs of the process's network namespace.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinuxTaps;

impl LinuxTaps {
    /// The TAPs of the process's network namespace.
    #[must_use]
    pub const fn new() -> Self {
        Self
    }
}

/// What a crash may come between.
pub const POINTS: Area = Area::new(
    "tap",
    &["create", "mark", "mtu", "settings", "address", "neighbour", "up", "remove"],
);

impl From<Injected> for TapError {
    fn from(injected: Injected) -> Self {
        Self::of("work on a TAP", injected.into())
    }
}

/// The device that makes TAPs.
fn open_tun() -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(|errno| match errno {
        rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => {
            TapError::NotPermitted { doing: "open /dev/net/tun".to_owned(), source: errno.into() }
        }
        _ => TapError::NoTun(errno.into()),
    })
}

/// Makes a TAP that is there as long as the returned descriptor is open. EBUSY: a TAP of that name
/// exists; EINVAL: another kind of link does.
fn make_tap(name: &str) -> Result<OwnedFd, TapError> {
    let doing = || format!("create the TAP {name}");
    let fd = open_tun()?;
    // SAFETY: ifreq holds integers, a pointer that may be null and arrays of them: zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(TapError::of(doing(), io::ErrorKind::InvalidInput.into()));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    #[expect(clippy::cast_possible_truncation, reason = "the field holds 16 bits, of either sign")]
    let short = flags as c_short;
    request.ifr_ifru.ifru_flags = short;
    // SAFETY: the descriptor is open, and the request an ifreq that lives through the call.
    unsafe { tunsetiff(fd.as_raw_fd(), &raw const request) }
        .map_err(|errno| TapError::of(doing(), errno.into()))?;
    Ok(fd)
}

/// The smallest MTU with which a link has IPv6.
const LEAST_IPV6_MTU: u32 = 1280;

/// Turns IPv6 off on a link. A kernel without it has it off already, and so may a container, in which
/// nobody can write the setting.
fn disable_ipv6(name: &str) -> Result<(), TapError> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    let failed = |source| TapError::of(format!("write 1 to {path}"), source);
    match fs::write(&path, "1") {
        Err(source) if source.raw_os_error() == Some(libc::EROFS) => {
            if fs::read_to_string(&path).map_err(failed)?.trim() == "1" {
                Ok(())
            } else {
                Err(TapError::CannotDisableIpv6 { name: name.to_owned(), source })
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if Path::new("/proc/sys/net/ipv6").try_exists().map_err(failed)? {
                Err(failed(error))
            } else {
                Ok(())
            }
        }
        result => result.map_err(failed),
    }
}

/// Makes a TAP and lets it go. Only for a network namespace made for that.
pub(crate) fn probe() -> Result<(), TapError> {
    make_tap(&format!("{TAP_PREFIX}00000000")).map(drop)
}

/// Whether the device opens; makes nothing.
pub(crate) fn probe_device() -> Result<(), TapError> {
    open_tun().map(drop)
}

fn link_of(message: RouteNetlinkMessage) -> Option<LinkMessage> {
    match message {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    }
}

fn address_of(message: RouteNetlinkMessage) -> Option<AddressMessage> {
    match message {
        RouteNetlinkMessage::NewAddress(address) => Some(address),
        _ => None,
    }
}

fn route_of(message: RouteNetlinkMessage) -> Option<RouteMessage> {
    match message {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    }
}

/// A question about links that leaves out their counters, which are most of the answer.
fn link_question() -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    message
}

/// What a link shows, without its addresses.
fn observed(link: LinkMessage) -> ObservedTap {
    let mut tap = ObservedTap {
        name: String::new(),
        index: link.header.index,
        alias: None,
        mark: None,
        mtu: 0,
        addresses: Vec::new(),
        up: link.header.flags.contains(LinkFlags::Up),
        arp: !link.header.flags.contains(LinkFlags::Noarp),
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => tap.name = name,
            LinkAttribute::IfAlias(alias) => tap.alias = Some(alias),
            LinkAttribute::Mtu(mtu) => tap.mtu = mtu,
            _ => {}
        }
    }
    tap.mark = tap.alias.as_deref().and_then(Mark::parse);
    tap
}

/// The link of this name; `None` when there is none.
async fn find(route: &Route, name: &str) -> Result<Option<ObservedTap>, TapError> {
    let mut question = link_question();
    question.attributes.push(LinkAttribute::IfName(name.to_owned()));
    match route.ask(RouteNetlinkMessage::GetLink(question)).await {
        // The kernel also finds links by their alternative names; those are not this link.
        Ok(answer) => {
            Ok(answer.into_iter().find_map(link_of).map(observed).filter(|l| l.name == name))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(source) => Err(TapError::of(format!("look at the link {name}"), source)),
    }
}

/// Every IPv4 address of this network namespace.
async fn addresses(route: &Route) -> Result<Vec<AddressMessage>, TapError> {
    let mut question = AddressMessage::default();
    question.header.family = AddressFamily::Inet;
    let answer = route.dump(&RouteNetlinkMessage::GetAddress(question)).await;
    let answer = answer.map_err(|source| TapError::of("list the host's addresses", source))?;
    Ok(answer.into_iter().filter_map(address_of).collect())
}

/// The local address in a message; without one, the only address there is.
fn local_address(message: &AddressMessage) -> Option<Ipv4Addr> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(IpAddr::V4(local)) => return Some(*local),
            AddressAttribute::Address(IpAddr::V4(other)) => found = Some(*other),
            _ => {}
        }
    }
    found
}

fn with_addresses(mut tap: ObservedTap, addresses: &[AddressMessage]) -> ObservedTap {
    tap.addresses = addresses
        .iter()
        .filter(|message| message.header.index == tap.index)
        .filter_map(|message| Some((local_address(message)?, message.header.prefix_len)))
        .collect();
    tap
}

/// The routes of every IPv4 table.
async fn routes(route: &Route) -> Result<Vec<RouteMessage>, TapError> {
    let mut question = RouteMessage::default();
    question.header.address_family = AddressFamily::Inet;
    let answer = route.dump(&RouteNetlinkMessage::GetRoute(question)).await;
    let answer = answer.map_err(|source| TapError::of("list the host's routes", source))?;
    Ok(answer.into_iter().filter_map(route_of).collect())
}

/// The names of links by index. A link that went meanwhile has none.
struct LinkNames(rustix::fd::OwnedFd);

impl LinkNames {
    fn open() -> Result<Self, TapError> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
        socket.map(Self).map_err(|errno| TapError::of("open a socket", errno.into()))
    }

    fn name(&self, index: u32) -> Option<String> {
        rustix::net::netdevice::index_to_name(&self.0, index).ok()
    }
}

/// The subnets of an address: its own, and its peer's if it has one.
fn subnets_of_address(message: &AddressMessage, names: &LinkNames) -> Vec<HostSubnet> {
    let ipv4 = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Local(IpAddr::V4(address))
        | AddressAttribute::Address(IpAddr::V4(address)) => Some(*address),
        _ => None,
    };
    let prefix = message.header.prefix_len;
    let subnet = |address| {
        let link = names.name(message.header.index);
        HostSubnet::of(address, prefix, SubnetUse::Address, link)
    };
    message.attributes.iter().filter_map(ipv4).map(subnet).collect()
}

/// The subnet that a route leads to; `None` for a default route.
fn subnet_of_route(message: &RouteMessage, names: &LinkNames) -> Option<HostSubnet> {
    let prefix = message.header.destination_prefix_length;
    let mut destination = None;
    let mut link = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                destination = Some(*address)
            }
            RouteAttribute::Oif(index) => link = names.name(*index),
            _ => {}
        }
    }
    // The kernel leaves the destination out when it is 0.0.0.0.
    let destination = destination.unwrap_or(Ipv4Addr::UNSPECIFIED);
    (prefix > 1).then(|| HostSubnet::of(destination, prefix, SubnetUse::Route, link))
}

fn connect() -> Result<Route, TapError> {
    Route::open().map_err(|source| TapError::of("open a netlink socket", source))
}

/// Who is at the other end of a link, for good: nobody is asked, and nobody can say otherwise. It
/// goes with the link.
fn neighbour(index: u32, address: Ipv4Addr, mac: [u8; 6]) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    message
}

/// Marks a TAP that was just made, and sets it up.
async fn set_up(route: &Route, name: &str, index: u32, spec: &TapSpec) -> Result<(), TapError> {
    let failed = |doing: &str| {
        let doing = format!("{doing} the TAP {name}");
        move |source| TapError::of(doing, source)
    };
    let mark = LinkUnspec::new_with_index(index).alias(spec.mark.to_string()).build();
    POINTS.before("mark")?;
    route.order(RouteNetlinkMessage::SetLink(mark)).await.map_err(failed("mark"))?;
    POINTS.after("mark")?;
    let mtu = LinkUnspec::new_with_index(index).mtu(spec.mtu).build();
    let doing = format!("set the MTU {} of", spec.mtu);
    POINTS.before("mtu")?;
    route.order(RouteNetlinkMessage::SetLink(mtu)).await.map_err(failed(&doing))?;
    POINTS.after("mtu")?;
    POINTS.before("settings")?;
    // A link with an MTU below 1280 has no IPv6, and no settings of it.
    if spec.mtu >= LEAST_IPV6_MTU {
        disable_ipv6(name)?;
    }
    let mac = spec.mark.vm.gateway_mac().to_vec();
    let silent = LinkUnspec::new_with_index(index).address(mac).arp(false).build();
    let failed_arp = failed("give a hardware address and no ARP to");
    route.order(RouteNetlinkMessage::SetLink(silent)).await.map_err(failed_arp)?;
    POINTS.after("settings")?;
    let address = rtnetlink::AddressMessageBuilder::<Ipv4Addr>::new()
        .index(index)
        .address(spec.gateway, spec.prefix)
        .build();
    let doing = format!("give the address {}/{} to", spec.gateway, spec.prefix);
    POINTS.before("address")?;
    route.order(RouteNetlinkMessage::NewAddress(address)).await.map_err(failed(&doing))?;
    POINTS.after("address")?;
    POINTS.before("neighbour")?;
    let guest = neighbour(index, spec.guest, spec.mark.vm.mac());
    let doing = format!("make {} the neighbour of", spec.guest);
    route.put(RouteNetlinkMessage::NewNeighbour(guest)).await.map_err(failed(&doing))?;
    POINTS.after("neighbour")?;
    let up = LinkUnspec::new_with_index(index).up().build();
    POINTS.before("up")?;
    route.order(RouteNetlinkMessage::SetLink(up)).await.map_err(failed("set up"))?;
    Ok(POINTS.after("up")?)
}

#[async_trait]
impl Taps for LinuxTaps {
    async fn create(&self, spec: &TapSpec) -> Result<TapHandle, TapError> {
        let name = spec.name();
        let route = connect()?;
        POINTS.before("create")?;
        let fd = match make_tap(&name) {
            Ok(fd) => fd,
            Err(TapError::Kernel { doing, source }) => {
                return Err(match find(&route, &name).await? {
                    Some(there) => TapError::AlreadyExists { name, alias: there.alias },
                    None => TapError::Kernel { doing, source },
                });
            }
            Err(error) => return Err(error),
        };
        POINTS.after("create")?;
        let gone = || TapError::of(format!("find the TAP {name}"), io::ErrorKind::NotFound.into());
        let index = find(&route, &name).await?.ok_or_else(gone)?.index;
        set_up(&route, &name, index, spec).await?;
        Ok(TapHandle { name, index, fd })
    }

    async fn observe(&self, name: &str) -> Result<Option<ObservedTap>, TapError> {
        let route = connect()?;
        match find(&route, name).await? {
            None => Ok(None),
            Some(tap) => Ok(Some(with_addresses(tap, &addresses(&route).await?))),
        }
    }

    async fn list_marked(&self, install: &InstallId) -> Result<Vec<ObservedTap>, TapError> {
        let route = connect()?;
        let links = route.dump(&RouteNetlinkMessage::GetLink(link_question())).await;
        let links = links.map_err(|source| TapError::of("list the host's links", source))?;
        let ours = |tap: &ObservedTap| tap.mark.as_ref().is_some_and(|m| m.install == *install);
        let taps: Vec<_> =
            links.into_iter().filter_map(link_of).map(observed).filter(ours).collect();
        if taps.is_empty() {
            return Ok(taps);
        }
        let addresses = addresses(&route).await?;
        Ok(taps.into_iter().map(|tap| with_addresses(tap, &addresses)).collect())
    }

    async fn list_alike(&self) -> Result<Vec<ObservedTap>, TapError> {
        let links = connect()?.dump(&RouteNetlinkMessage::GetLink(link_question())).await;
        let links = links.map_err(|source| TapError::of("list the host's links", source))?;
        Ok(links.into_iter().filter_map(link_of).map(observed).filter(is_alike).collect())
    }

    async fn remove(&self, name: &str, mark: &Mark) -> Result<(), TapError> {
        let route = connect()?;
        let Some(tap) = find(&route, name).await? else { return Ok(()) };
        if tap.mark.as_ref() != Some(mark) {
            let (name, alias) = (tap.name, tap.alias);
            return Err(TapError::NotOurs { name, alias, expected: mark.clone() });
        }
        POINTS.before("remove")?;
        if mutated("tap_remove_lies") {
            return Ok(());
        }
        // By index: the name might mean another link by now.
        let link = LinkUnspec::new_with_index(tap.index).build();
        match route.order(RouteNetlinkMessage::DelLink(link)).await {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => {
                return Err(TapError::of(format!("remove the TAP {name}"), error));
            }
            _ => {}
        }
        POINTS.after("remove")?;
        match find(&route, name).await? {
            Some(still) if still.mark.as_ref() == Some(mark) => {
                Err(TapError::StillThere { name: name.to_owned() })
            }
            _ => Ok(()),
        }
    }

    async fn host_subnets(&self) -> Result<Vec<HostSubnet>, TapError> {
        let route = connect()?;
        let names = LinkNames::open()?;
        let addresses = addresses(&route).await?;
        let routes = routes(&route).await?;
        let mut subnets: Vec<_> = addresses
            .iter()
            .flat_map(|message| subnets_of_address(message, &names))
            .chain(routes.iter().filter_map(|message| subnet_of_route(message, &names)))
            .collect();
        subnets.sort();
        subnets.dedup();
        Ok(subnets)
    }
}
