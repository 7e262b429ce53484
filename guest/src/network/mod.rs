//! Sets the guest's one NIC up: name, MTU, address, default route; IPv4 only.
//!
//! ```text
//!  interface with the MAC ─► named eth0 ─► IPv6 off ─► MTU ─► address ─► up
//!      ─► the gateway's hardware address ─► default route
//! ```
//!
//! # Invariants
//! 1. The NIC is known by its hardware address, not by the name that the kernel gave it.
//! 2. IPv6 is off before the NIC is up: no packet of it ever leaves.
//! 3. The same network again changes nothing, and no connection notices.
//! 4. The kernel's requests are done in order, and the first that fails ends it.
//!
//! # Failure
//! One error that names the step. What was done before it stays; the host decides whether the
//! guest is of use.

use std::fmt;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

use matchlock_wire::message::Network;
use nix::ifaddrs::getifaddrs;

use crate::boot::uevent::Uevents;

mod netlink;

use netlink::{Message, Netlink, PUT, REQUEST};

/// The NIC's name.
const NAME: &str = "eth0";

/// How long the NIC may take to come up. Its driver is loaded before the agent starts, so it is
/// there at once; and the host gives a configuration up after 10 seconds.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Why the network was not set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Interfaces could not be looked for.
    #[error("cannot look for network interfaces")]
    Look(#[source] io::Error),
    /// The NIC is missing.
    #[error(
        "there is no network interface {mac} after {waited:?}: the machine has no such NIC, or the kernel no driver (virtio_net)"
    )]
    NoInterface {
        /// Its hardware address.
        mac: Mac,
        /// How long it was awaited.
        waited: Duration,
    },
    /// The kernel refused a step.
    #[error("cannot {step}")]
    Step {
        /// The step.
        step: String,
        /// Why.
        source: io::Error,
    },
}

/// A hardware address as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Sets the network up. An interface that is not there yet is awaited for as long as `patience`,
/// and nothing else happens in this thread meanwhile.
///
/// # Errors
/// When there is no such interface, or the kernel refuses a step.
pub fn set_up(network: &Network, patience: Duration) -> Result<(), NetworkError> {
    // Subscribed before the first look, so that no announcement is missed.
    let uevents = Uevents::default();
    let interface = uevents
        .wait_for(patience, || Interface::find(network.mac))
        .map_err(NetworkError::Look)?
        .ok_or(NetworkError::NoInterface { mac: Mac(network.mac), waited: patience })?;
    let netlink = Netlink::open().map_err(|error| failed("open a netlink socket")(error))?;
    if interface.name != NAME {
        let from = &interface.name;
        interface.rename(&netlink).map_err(failed(format!("rename {from} to {NAME}")))?;
    }
    disable_ipv6().map_err(failed(format!("turn IPv6 off on {NAME}")))?;
    let Network { address, prefix, gateway, gateway_mac, mtu, .. } = *network;
    interface
        .set_mtu(&netlink, mtu)
        .map_err(failed(format!("set the MTU of {NAME} to {mtu} bytes")))?;
    interface
        .add_address(&netlink, address, prefix)
        .map_err(failed(format!("give {NAME} the address {address}/{prefix}")))?;
    interface.set_up(&netlink, true).map_err(failed(format!("bring {NAME} up")))?;
    interface
        .set_neighbour(&netlink, gateway, gateway_mac)
        .map_err(failed(format!("tell {NAME} where {gateway} is")))?;
    interface
        .set_default_route(&netlink, gateway)
        .map_err(failed(format!("send everything through {gateway}")))
}

/// An error of this step.
fn failed(step: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let step = step.into();
    move |source| NetworkError::Step { step, source }
}

/// A network interface.
struct Interface {
    name: String,
    index: u32,
}

impl Interface {
    /// The interface with this hardware address. What is stacked on a NIC has the same one, so
    /// a NIC that was set up before comes first.
    fn find(mac: [u8; 6]) -> io::Result<Option<Self>> {
        let names: Vec<String> = getifaddrs()?
            .filter(|entry| {
                let link = entry.address.as_ref().and_then(|address| address.as_link_addr());
                link.and_then(|link| link.addr()) == Some(mac)
            })
            .map(|entry| entry.interface_name)
            .collect();
        let known = names.iter().find(|name| *name == NAME).or_else(|| names.first());
        let Some(name) = known.cloned() else { return Ok(None) };
        let index = nix::net::if_::if_nametoindex(name.as_str())?;
        Ok(Some(Self { name, index }))
    }

    /// Gives it its name; the kernel renames no interface that is up.
    fn rename(&self, netlink: &Netlink) -> io::Result<()> {
        self.set_up(netlink, false)?;
        let name = [NAME.as_bytes(), b"\0"].concat();
        netlink.request(self.link(0, 0).with(libc::IFLA_IFNAME, &name))
    }

    fn set_mtu(&self, netlink: &Netlink, mtu: u16) -> io::Result<()> {
        netlink.request(self.link(0, 0).with(libc::IFLA_MTU, &u32::from(mtu).to_ne_bytes()))
    }

    fn set_up(&self, netlink: &Netlink, up: bool) -> io::Result<()> {
        let flag = libc::IFF_UP.cast_unsigned();
        netlink.request(self.link(if up { flag } else { 0 }, flag))
    }

    /// A request to change the interface: those of its `flags` that are in `change`.
    fn link(&self, flags: u32, change: u32) -> Message {
        // struct ifinfomsg: family, padding, type, index, flags, change.
        let body = [[0; 4], self.index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes()];
        Message::new(libc::RTM_NEWLINK, REQUEST, body.as_flattened())
    }

    fn add_address(&self, netlink: &Netlink, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        // struct ifaddrmsg: family, prefix, flags, scope (0, everywhere), index.
        let body = [[INET, prefix, 0, libc::RT_SCOPE_UNIVERSE], self.index.to_ne_bytes()];
        let mut message = Message::new(libc::RTM_NEWADDR, PUT, body.as_flattened())
            .with(libc::IFA_LOCAL, &address.octets())
            .with(libc::IFA_ADDRESS, &address.octets());
        // A network of two addresses has none to spare for a broadcast.
        if prefix < 31 {
            let host = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            let broadcast = address.to_bits() | host;
            message = message.with(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
        }
        netlink.request(message)
    }

    /// Says for good which hardware address a neighbour has: nobody is asked by ARP.
    fn set_neighbour(&self, netlink: &Netlink, address: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
        // struct ndmsg: family, padding; index; state, flags, type.
        let [low, high] = NUD_PERMANENT.to_ne_bytes();
        let body = [[INET, 0, 0, 0], self.index.to_ne_bytes(), [low, high, 0, 0]];
        let message = Message::new(libc::RTM_NEWNEIGH, PUT, body.as_flattened())
            .with(NDA_DST, &address.octets())
            .with(NDA_LLADDR, &mac);
        netlink.request(message)
    }

    fn set_default_route(&self, netlink: &Netlink, gateway: Ipv4Addr) -> io::Result<()> {
        // struct rtmsg: family, lengths of the destination's and source's prefixes, type of
        // service; table, origin, scope, type; flags.
        let body = [
            [INET, 0, 0, 0],
            [libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST],
            [0; 4],
        ];
        let message = Message::new(libc::RTM_NEWROUTE, PUT, body.as_flattened())
            .with(libc::RTA_GATEWAY, &gateway.octets())
            .with(libc::RTA_OIF, &self.index.to_ne_bytes());
        netlink.request(message)
    }
}

/// Of neighbours, which the libc crate does not have.
const NUD_PERMANENT: u16 = 0x80;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// `AF_INET` in the byte that netlink has for it.
const INET: u8 = 2;

/// Turns IPv6 off; a kernel without it has it off already.
fn disable_ipv6() -> io::Result<()> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
