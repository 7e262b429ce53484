//! What a guest is told before its first command, and what its agent says of itself.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

/// What a guest is told before its first command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// The hostname.
    pub hostname: String,
    /// Extra lines of `/etc/hosts`.
    pub add_hosts: Vec<HostEntry>,
    /// The servers of `/etc/resolv.conf`.
    pub dns_servers: Vec<IpAddr>,
    /// The CPU share of all commands together, in thousandths of one CPU; 0 means no limit.
    pub cpu_millis: u32,
    /// The network; `None` when the VM has no NIC.
    pub network: Option<GuestNetwork>,
}

/// How the guest's one NIC, `eth0`, is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// The NIC's hardware address, see [`VmId::mac`](crate::id::VmId::mac).
    pub mac: [u8; 6],
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The length of the subnet's prefix.
    pub prefix: u8,
    /// The host's end of the TAP.
    pub gateway: Ipv4Addr,
    /// Its hardware address: the host answers no ARP, see
    /// [`VmId::gateway_mac`](crate::id::VmId::gateway_mac).
    pub gateway_mac: [u8; 6],
    /// The largest packet, in bytes; the same on the host's end.
    pub mtu: u16,
}

/// A line of `/etc/hosts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEntry {
    /// The name.
    pub host: String,
    /// Its address.
    pub ip: IpAddr,
}

/// What the agent said of itself when it was ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// The agent's version.
    pub agent_version: String,
    /// The guest kernel's release.
    pub kernel_release: String,
    /// When `/init` was started, in microseconds since the guest's boot.
    pub init_started_us: u64,
    /// When the agent was ready, in microseconds since the guest's boot.
    pub agent_ready_us: u64,
}
