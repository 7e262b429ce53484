//! What a VM's network is asked to be.

use std::net::Ipv4Addr;

use super::SpecError;

/// The smallest MTU: below it IPv4 does not work everywhere.
const MIN_MTU: u64 = 576;
/// The largest MTU that a TAP takes.
const MAX_MTU: u64 = 65_521;
/// The MTU when nothing is said.
const DEFAULT_MTU: u64 = 1500;
/// The name servers when nothing is said.
const DEFAULT_DNS_SERVERS: [Ipv4Addr; 2] = [Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(8, 8, 4, 4)];
/// As many name servers as `/etc/resolv.conf` may name.
const MAX_DNS_SERVERS: usize = 3;

/// A VM's network as given; what is `None` was not given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkInput {
    /// `--no-network`.
    pub no_network: bool,
    /// `--mtu`.
    pub mtu: Option<u64>,
    /// `--dns-servers`.
    pub dns_servers: Vec<String>,
    /// `--allow-private`.
    pub allow_private: bool,
    /// `--allow-host-access`.
    pub allow_host_access: bool,
}

/// A VM's network, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSpec {
    /// The largest packet, in bytes.
    pub mtu: u16,
    /// The name servers of the guest.
    pub dns_servers: Vec<Ipv4Addr>,
    /// Whether private ranges may be reached.
    pub allow_private: bool,
    /// Whether the host may be reached.
    pub allow_host_access: bool,
}

impl NetworkSpec {
    /// Checks an input; `None` for a VM without a network.
    ///
    /// # Errors
    /// What is wrong with which flag.
    pub(super) fn check(input: &NetworkInput) -> Result<Option<Self>, SpecError> {
        if input.no_network {
            return input.needs_network().map_or(Ok(None), |flag| {
                Err(SpecError::Combination { flag, with: "--no-network" })
            });
        }
        let mtu = input.mtu.unwrap_or(DEFAULT_MTU);
        super::check_range("--mtu", mtu, MIN_MTU, MAX_MTU, "bytes")?;
        Ok(Some(Self {
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
            dns_servers: dns_servers(&input.dns_servers)?,
            allow_private: input.allow_private,
            allow_host_access: input.allow_host_access,
        }))
    }
}

impl NetworkInput {
    /// The first flag given that means nothing without a network.
    fn needs_network(&self) -> Option<&'static str> {
        [
            ("--mtu", self.mtu.is_some()),
            ("--dns-servers", !self.dns_servers.is_empty()),
            ("--allow-private", self.allow_private),
            ("--allow-host-access", self.allow_host_access),
        ]
        .into_iter()
        .find_map(|(flag, given)| given.then_some(flag))
    }
}

fn dns_servers(given: &[String]) -> Result<Vec<Ipv4Addr>, SpecError> {
    if given.is_empty() {
        return Ok(DEFAULT_DNS_SERVERS.to_vec());
    }
    if given.len() > MAX_DNS_SERVERS {
        return Err(SpecError::Range {
            flag: "--dns-servers",
            given: format!("{} addresses", given.len()),
            expected: format!("at most {MAX_DNS_SERVERS}, as /etc/resolv.conf takes no more"),
        });
    }
    given
        .iter()
        .map(|text| {
            let refused =
                |expected| SpecError::Form { what: "--dns-servers", given: text.clone(), expected };
            let server: Ipv4Addr = text.parse().map_err(|_| {
                refused("use IPv4 addresses, separated by commas: a guest has no IPv6")
            })?;
            let octets = server.octets();
            if matches!(octets[0], 0 | 127 | 224..) || octets[..2] == [169, 254] {
                return Err(refused("no guest can reach that address; use a server's own"));
            }
            Ok(server)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut NetworkInput)) -> Result<Option<NetworkSpec>, String> {
        let mut input = NetworkInput::default();
        change(&mut input);
        NetworkSpec::check(&input).map_err(|e| e.to_string())
    }

    #[test]
    fn a_plain_network_is_closed_and_has_the_references_defaults() {
        let plain = check(|_| {}).unwrap().unwrap();
        let expected = NetworkSpec {
            mtu: 1500,
            dns_servers: vec!["8.8.8.8".parse().unwrap(), "8.8.4.4".parse().unwrap()],
            allow_private: false,
            allow_host_access: false,
        };
        assert_eq!(plain, expected);
        assert_eq!(check(|input| input.no_network = true), Ok(None));
    }

    #[test]
    fn what_means_nothing_without_a_network_is_refused_by_name() {
        type Spoil = fn(&mut NetworkInput);
        let cases: [(&str, Spoil); 4] = [
            ("--mtu", |i| i.mtu = Some(1500)),
            ("--dns-servers", |i| i.dns_servers = vec!["9.9.9.9".into()]),
            ("--allow-private", |i| i.allow_private = true),
            ("--allow-host-access", |i| i.allow_host_access = true),
        ];
        for (flag, spoil) in cases {
            assert!(check(spoil).is_ok());
            let refused = check(|input| {
                input.no_network = true;
                spoil(input);
            });
            let text = refused.unwrap_err();
            assert!(text.contains(flag) && text.contains("--no-network"), "{text}");
        }
    }

    #[test]
    fn wrong_values_are_named() {
        for mtu in [0, 575, 65_522] {
            assert!(check(|i| i.mtu = Some(mtu)).unwrap_err().contains("--mtu"));
        }
        for server in ["::1", "dns.example", "1.2.3", "127.0.0.53", "0.0.0.0", "255.255.255.255"] {
            let refused = check(|i| i.dns_servers = vec![server.into()]).unwrap_err();
            assert!(refused.contains(server), "{refused}");
        }
        let many = vec!["9.9.9.9".to_owned(); 4];
        assert!(check(|i| i.dns_servers = many).unwrap_err().contains("at most 3"));
    }
}
