//! Subnets for VMs: which ranges they are cut from, and which one is the next to be given.
//!
//! ```text
//! pool: 192.168.100.0/24 … 192.168.254.0/24     octet 100 … 254, as the reference has it
//!       10.64.0.0/12 cut into /30               octet 256 + the ordinal, once the first are in use
//!                                               (or any other range, when one is configured)
//! subnet a.b.c.0/n:  .1 the gateway, on the host's end of the TAP · .2 the guest
//! ```
//!
//! # Invariants
//! * An octet is a number that no two VMs share, and no more: addresses are compared with what is
//!   held, and a subnet whose octet another pool's has is given under a number above all pools'.
//! * The lowest free subnet is given, so that a host with few VMs uses few of them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 range in its plain form: no bit of the address beyond the prefix is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ipv4Cidr {
    network: Ipv4Addr,
    prefix: u8,
}

/// A text or a pair that is not a range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an IPv4 range: expected its first address and a prefix, for example 10.64.0.0/12"
)]
pub struct InvalidCidr {
    /// What was given.
    pub text: String,
}

const fn mask(prefix: u8) -> u32 {
    match prefix {
        0 => 0,
        1..=32 => u32::MAX << (32 - prefix),
        _ => u32::MAX,
    }
}

impl Ipv4Cidr {
    /// The range with this first address and this many leading bits.
    ///
    /// # Errors
    /// When there are more than 32 bits, or the address has bits beyond them.
    pub fn new(network: Ipv4Addr, prefix: u8) -> Result<Self, InvalidCidr> {
        if prefix > 32 || network.to_bits() & !mask(prefix) != 0 {
            return Err(InvalidCidr { text: format!("{network}/{prefix}") });
        }
        Ok(Self { network, prefix })
    }

    /// The range of this many leading bits in which the address lies; more than 32 count as 32.
    #[must_use]
    pub const fn containing(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = if prefix > 32 { 32 } else { prefix };
        Self { network: Ipv4Addr::from_bits(address.to_bits() & mask(prefix)), prefix }
    }

    /// The first address.
    #[must_use]
    pub const fn network(self) -> Ipv4Addr {
        self.network
    }

    /// The number of leading bits.
    #[must_use]
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// Whether an address lies in both.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        let shorter = if self.prefix < other.prefix { self.prefix } else { other.prefix };
        (self.network.to_bits() ^ other.network.to_bits()) & mask(shorter) == 0
    }

    /// The address so many after the first.
    const fn address(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits().saturating_add(offset))
    }
}

impl fmt::Display for Ipv4Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Ipv4Cidr {
    type Err = InvalidCidr;

    fn from_str(text: &str) -> Result<Self, InvalidCidr> {
        let invalid = || InvalidCidr { text: text.to_owned() };
        let (network, prefix) = text.split_once('/').ok_or_else(invalid)?;
        let network = network.parse().map_err(|_| invalid())?;
        let plain = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
        let prefix = prefix.parse().ok().filter(|_| plain).ok_or_else(invalid)?;
        Self::new(network, prefix).map_err(|_| invalid())
    }
}

/// A VM's subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    /// Its number, unique on this host: the column `subnet_allocations.octet`.
    pub octet: u32,
    /// Its addresses; the prefix is at most 30.
    pub cidr: Ipv4Cidr,
}

impl Subnet {
    /// A subnet with room for a gateway and a guest; `None` for a range that has none.
    #[must_use]
    pub fn new(octet: u32, cidr: Ipv4Cidr) -> Option<Self> {
        (cidr.prefix <= LONGEST_PREFIX).then_some(Self { octet, cidr })
    }

    /// The host's address, the first after the network's.
    #[must_use]
    pub const fn gateway(self) -> Ipv4Addr {
        self.cidr.address(1)
    }

    /// The guest's address, the one after the gateway's.
    #[must_use]
    pub const fn guest(self) -> Ipv4Addr {
        self.cidr.address(2)
    }
}

/// Loopback, link-local, multicast and the like.
const UNUSABLE: [Ipv4Cidr; 4] = [
    Ipv4Cidr { network: Ipv4Addr::new(0, 0, 0, 0), prefix: 8 },
    Ipv4Cidr { network: Ipv4Addr::new(127, 0, 0, 0), prefix: 8 },
    Ipv4Cidr { network: Ipv4Addr::new(169, 254, 0, 0), prefix: 16 },
    Ipv4Cidr { network: Ipv4Addr::new(224, 0, 0, 0), prefix: 3 },
];
/// The longest prefix that has room for a gateway and a guest.
const LONGEST_PREFIX: u8 = 30;
/// The first octet of subnets whose own is taken by another pool's: above those of all pools.
const FIRST_SPARE: u32 = FIRST_ORDINAL + (1 << 24);
/// The first octet of ranges other than the reference's; below are its own.
const FIRST_ORDINAL: u32 = 256;

/// A range cut into subnets of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: Ipv4Addr,
    size: u8,
    first_octet: u32,
    count: u32,
}

impl Range {
    /// The reference's own: 192.168.100.0/24 to 192.168.254.0/24.
    const REFERENCE: Self =
        Self { first: Ipv4Addr::new(192, 168, 100, 0), size: 24, first_octet: 100, count: 155 };

    /// 10.64.0.0/12 into /30.
    const OVERFLOW: Self = Self {
        first: Ipv4Addr::new(10, 64, 0, 0),
        size: LONGEST_PREFIX,
        first_octet: FIRST_ORDINAL,
        count: 1 << 18,
    };

    fn subnet(self, index: u32) -> Subnet {
        let network = self.first.to_bits() + (index << (32 - self.size));
        let cidr = Ipv4Cidr { network: Ipv4Addr::from_bits(network), prefix: self.size };
        Subnet { octet: self.first_octet + index, cidr }
    }

    fn subnets(self) -> impl Iterator<Item = Subnet> {
        (0..self.count).map(move |index| self.subnet(index))
    }

    fn by_octet(self, octet: u32) -> Option<Subnet> {
        let index = octet.checked_sub(self.first_octet)?;
        (index < self.count).then(|| self.subnet(index))
    }
}

/// The ranges that subnets are taken from, in the order in which they are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetPool {
    ranges: Vec<Range>,
    name: String,
}

/// What is wrong with a pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPool {
    /// The text has another form.
    #[error(
        "{text:?} is not a subnet pool: expected base=RANGE,size=PREFIX, for example base=10.64.0.0/12,size=30"
    )]
    Form {
        /// What was given.
        text: String,
    },
    /// The base is not a range.
    #[error(transparent)]
    Base(#[from] InvalidCidr),
    /// The subnets do not fit into the base, or have no room for a gateway and a guest.
    #[error("{base} cannot be cut into /{size}: use a size from {} to {LONGEST_PREFIX}", base.prefix())]
    Size {
        /// The range.
        base: Ipv4Cidr,
        /// The prefix of each subnet.
        size: u8,
    },
    /// Some of it has a meaning of its own on every host.
    #[error(
        "{base} holds addresses that no link can have (0/8, 127/8, 169.254/16, 224/3): use another range"
    )]
    Unusable {
        /// The range.
        base: Ipv4Cidr,
    },
    /// There would be more subnets than anybody can number.
    #[error(
        "{base} cut into /{size} makes more than 2^24 subnets: use a smaller range or a shorter prefix"
    )]
    TooMany {
        /// The range.
        base: Ipv4Cidr,
        /// The prefix of each subnet.
        size: u8,
    },
}

impl Default for SubnetPool {
    fn default() -> Self {
        Self {
            ranges: vec![Range::REFERENCE, Range::OVERFLOW],
            name: "192.168.100-254.0/24 and 10.64.0.0/12 cut into /30".to_owned(),
        }
    }
}

impl SubnetPool {
    /// This range, cut into subnets of this prefix.
    ///
    /// # Errors
    /// When it cannot be cut so.
    pub fn cut(base: Ipv4Cidr, size: u8) -> Result<Self, InvalidPool> {
        if UNUSABLE.iter().any(|range| range.overlaps(base)) {
            return Err(InvalidPool::Unusable { base });
        }
        if size < base.prefix || size > LONGEST_PREFIX {
            return Err(InvalidPool::Size { base, size });
        }
        let bits = size - base.prefix;
        if bits > 24 {
            return Err(InvalidPool::TooMany { base, size });
        }
        let range =
            Range { first: base.network, size, first_octet: FIRST_ORDINAL, count: 1 << bits };
        Ok(Self { ranges: vec![range], name: format!("{base} cut into /{size}") })
    }

    /// How many subnets it has.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.ranges.iter().map(|range| u64::from(range.count)).sum()
    }

    /// The lowest subnet that overlaps nothing held and nothing in `avoid`.
    ///
    /// `held` are the subnets that are given, by octet; those of another pool count too. `None` is
    /// one whose addresses nobody can read.
    #[must_use]
    pub fn lowest_free(
        &self,
        held: &BTreeMap<u32, Option<Ipv4Cidr>>,
        avoid: &[Ipv4Cidr],
    ) -> Option<Subnet> {
        // Subnets of this pool do not overlap each other: under its own octet one is found at once,
        // and only the others need to be compared.
        let own = |octet: u32| self.by_octet(octet).map(|subnet| subnet.cidr);
        let foreign: Vec<Ipv4Cidr> = held
            .iter()
            .filter_map(|(octet, cidr)| cidr.filter(|cidr| own(*octet) != Some(*cidr)))
            .chain(avoid.iter().copied())
            .collect();
        let free = self.ranges.iter().flat_map(|range| range.subnets()).find(|subnet| {
            // Where its octet's addresses cannot be read, they may be these.
            !matches!(held.get(&subnet.octet), Some(cidr) if cidr.is_none_or(|c| c == subnet.cidr))
                && !foreign.iter().any(|other| other.overlaps(subnet.cidr))
        })?;
        if !held.contains_key(&free.octet) {
            return Some(free);
        }
        let spare = (FIRST_SPARE..).find(|octet| !held.contains_key(octet))?;
        Some(Subnet { octet: spare, ..free })
    }

    fn by_octet(&self, octet: u32) -> Option<Subnet> {
        self.ranges.iter().find_map(|range| range.by_octet(octet))
    }
}

impl fmt::Display for SubnetPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl FromStr for SubnetPool {
    type Err = InvalidPool;

    fn from_str(text: &str) -> Result<Self, InvalidPool> {
        let form = || InvalidPool::Form { text: text.to_owned() };
        let (base, size) = text
            .strip_prefix("base=")
            .and_then(|rest| rest.split_once(",size="))
            .ok_or_else(form)?;
        let size = size.parse().map_err(|_| form())?;
        Self::cut(base.parse()?, size)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cidr(text: &str) -> Ipv4Cidr {
        text.parse().unwrap()
    }

    fn held(subnets: impl IntoIterator<Item = Subnet>) -> BTreeMap<u32, Option<Ipv4Cidr>> {
        subnets.into_iter().map(|subnet| (subnet.octet, Some(subnet.cidr))).collect()
    }

    #[test]
    fn the_first_subnet_is_the_references() {
        let subnet = SubnetPool::default().lowest_free(&BTreeMap::new(), &[]).unwrap();
        assert_eq!((subnet.octet, subnet.cidr), (100, cidr("192.168.100.0/24")));
        assert_eq!(subnet.gateway().to_string(), "192.168.100.1");
        assert_eq!(subnet.guest().to_string(), "192.168.100.2");
    }

    #[test]
    fn once_the_references_are_in_use_the_next_range_follows() {
        let pool = SubnetPool::default();
        let all = held(Range::REFERENCE.subnets());
        assert_eq!(all.last_key_value(), Some((&254, &Some(cidr("192.168.254.0/24")))));
        let next = pool.lowest_free(&all, &[]).unwrap();
        assert_eq!((next.octet, next.cidr), (256, cidr("10.64.0.0/30")));
        assert_eq!(pool.count(), 155 + 262_144);
        assert_eq!(
            pool.by_octet(256 + 262_143).map(|last| last.cidr),
            Some(cidr("10.79.255.252/30"))
        );
    }

    #[test]
    fn what_overlaps_the_hosts_routes_or_another_pools_subnets_is_skipped() {
        let pool: SubnetPool = "base=10.0.0.0/24,size=28".parse().unwrap();
        let avoid = [cidr("10.0.0.0/29"), cidr("10.0.0.17/32")];
        let subnet = pool.lowest_free(&BTreeMap::new(), &avoid).unwrap();
        assert_eq!(subnet.cidr, cidr("10.0.0.32/28"));
        // The same octet for another range, and a range in the middle of ours.
        let others = [(256, cidr("172.16.0.0/30")), (900, cidr("10.0.0.24/30"))];
        let others = others.into_iter().map(|(octet, cidr)| (octet, Some(cidr))).collect();
        let subnet = pool.lowest_free(&others, &[]).unwrap();
        assert_eq!((subnet.octet, subnet.cidr), (FIRST_SPARE, cidr("10.0.0.0/28")));
        let subnet = pool.lowest_free(&others, &[cidr("10.0.0.0/28")]).unwrap();
        assert_eq!((subnet.octet, subnet.cidr), (258, cidr("10.0.0.32/28")));
        assert_eq!(pool.lowest_free(&BTreeMap::new(), &[cidr("0.0.0.0/0")]), None);
    }

    #[test]
    fn other_texts_are_not_pools() {
        for text in ["", "10.0.0.0/8", "base=10.0.0.0/8", "base=10.0.0.0/8,size=x", "size=3,base="]
        {
            assert!(
                matches!(text.parse::<SubnetPool>(), Err(InvalidPool::Form { .. })),
                "{text:?}"
            );
        }
        for base in ["10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0/8", "::/8"] {
            let pool = format!("base={base},size=30").parse::<SubnetPool>();
            assert!(matches!(pool, Err(InvalidPool::Base(_))), "{base}");
        }
        for (base, size) in [("10.0.0.0/24", 23), ("10.0.0.0/24", 31), ("10.0.0.0/24", 200)] {
            assert!(matches!(SubnetPool::cut(cidr(base), size), Err(InvalidPool::Size { .. })));
        }
        for base in ["0.0.0.0/0", "0.0.0.0/8", "127.0.0.0/16", "169.254.1.0/24", "240.0.0.0/4"] {
            let refused = SubnetPool::cut(cidr(base), 30);
            assert!(matches!(refused, Err(InvalidPool::Unusable { .. })), "{base}");
        }
        assert!(matches!(SubnetPool::cut(cidr("8.0.0.0/5"), 30), Err(InvalidPool::TooMany { .. })));
    }

    #[test]
    fn another_pools_octets_use_up_none_of_this_pools_subnets() {
        let old = SubnetPool::default();
        let mut given = held(Range::REFERENCE.subnets());
        for _ in 0..2 {
            let subnet = old.lowest_free(&given, &[]).unwrap();
            given.insert(subnet.octet, Some(subnet.cidr));
        }
        let pool: SubnetPool = "base=10.9.0.0/29,size=30".parse().unwrap();
        for (octet, wanted) in [(FIRST_SPARE, "10.9.0.0/30"), (FIRST_SPARE + 1, "10.9.0.4/30")] {
            let next = pool.lowest_free(&given, &[]).unwrap();
            assert_eq!((next.octet, next.cidr), (octet, cidr(wanted)));
            given.insert(octet, Some(next.cidr));
        }
        assert_eq!(pool.lowest_free(&given, &[]), None);
        // Given back, it is free again, under its own octet once that is free too.
        given.remove(&FIRST_SPARE);
        given.remove(&256);
        assert_eq!(pool.lowest_free(&given, &[]), pool.by_octet(256));
    }

    #[test]
    fn what_nobody_can_read_keeps_the_subnet_of_its_octet() {
        let given = BTreeMap::from([(100, None), (7, None)]);
        let next = SubnetPool::default().lowest_free(&given, &[]).unwrap();
        assert_eq!((next.octet, next.cidr), (101, cidr("192.168.101.0/24")));
    }

    #[test]
    fn the_last_address_of_all_has_no_room_and_does_not_overflow() {
        let last = cidr("255.255.255.255/32");
        assert_eq!(Subnet::new(1, last), None);
        let subnet = Subnet { octet: 1, cidr: last };
        assert_eq!(subnet.guest(), Ipv4Addr::BROADCAST);
        assert_eq!(subnet.gateway(), Ipv4Addr::BROADCAST);
    }

    proptest! {
        #[test]
        fn given_and_given_back_in_any_order_nobody_shares_and_the_lowest_is_next(
            size in 26_u8..=30,
            returned in proptest::collection::vec(any::<prop::sample::Index>(), 0..60),
        ) {
            let pool = SubnetPool::cut(cidr("10.9.8.0/24"), size).unwrap();
            let mut given: BTreeMap<u32, Option<Ipv4Cidr>> = BTreeMap::new();
            let mut returned = returned.into_iter();
            loop {
                let Some(next) = pool.lowest_free(&given, &[]) else {
                    prop_assert_eq!(given.len() as u64, pool.count());
                    let Some(which) = returned.next() else { break };
                    let octet = *which.get(&given.keys().copied().collect::<Vec<_>>());
                    given.remove(&octet);
                    prop_assert_eq!(pool.lowest_free(&given, &[]).map(|s| s.octet), Some(octet));
                    continue;
                };
                prop_assert!(given.values().flatten().all(|other| !other.overlaps(next.cidr)));
                prop_assert!(next.cidr.overlaps(Ipv4Cidr::containing(next.guest(), 32)));
                prop_assert!((FIRST_ORDINAL..next.octet).all(|lower| given.contains_key(&lower)));
                given.insert(next.octet, Some(next.cidr));
            }
        }
    }
}
