//! The rules of a VM's tables, as a batch that rustables writes.
//!
//! # Traps of rustables 0.9 that shape this
//! * Its helpers for addresses put `meta nfproto` in front; in a table of family `ip` that makes
//!   every `nft list ruleset` on the host abort. They are used in the `inet` table only.
//! * Its `established()` lacks RELATED, in which ICMP errors and our own resets travel.
//! * A cmp with less than a whole interface name is nft's `fc-*`.

use std::net::{IpAddr, Ipv4Addr};

use rustables::error::BuilderError;
use rustables::expr::{
    Bitwise, Cmp, CmpOp, ConnTrackState, Conntrack, ConntrackKey, HighLevelPayload,
    IPv4HeaderField, IcmpCode, Immediate, Meta, MetaType, NetworkHeaderField, Register, Reject,
    RejectType, VerdictKind,
};
use rustables::{
    Batch, Chain, ChainPolicy, ChainType, Hook, HookClass, Protocol, ProtocolFamily, Rule, Table,
};

use super::{FirewallSpec, filter_table, nat_table};
use crate::tap::TAP_PREFIX;

/// What no flag opens, each with the length of its prefix: "this network", loopback, link-local
/// with the clouds' metadata services, multicast, and what is reserved, broadcast included.
pub const ALWAYS_REFUSED: [(Ipv4Addr, u8); 5] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// What `--allow-private` opens: the ranges that lead to somebody's own network. RFC 1918, shared
/// address space (carriers, clusters, overlays such as Tailscale), IETF assignments, benchmarking
/// (laboratories, and proxies that hand out such addresses). The documentation ranges lead
/// nowhere and are not listed.
pub const PRIVATE_RANGES: [(Ipv4Addr, u8); 6] = [
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
];

/// Before connection tracking, so that a spoofed packet leaves no trace.
const PRIORITY_RAW: i32 = -300;
/// After connection tracking (a reset would not find its way back otherwise), before every DNAT.
const PRIORITY_MANGLE: i32 = -150;
const PRIORITY_FILTER: i32 = 0;
const PRIORITY_SRCNAT: i32 = 100;

/// `NFT_TABLE_F_OWNER`; rustables has it only where the build machine's kernel headers do.
const OWNED: u32 = 2;

const DNS_PORT: u16 = 53;

/// The chains of the filter table that no hook leads to.
const REFUSE: &str = "refuse";
const DNS: &str = "dns";
const SPECIAL: &str = "special";
const FROM_GUEST: &str = "from_guest";
const TO_HOST: &str = "to_host";
const TO_GUEST: &str = "to_guest";

/// A table's comment as nft keeps it: type 0, length, the text and a zero.
fn comment(text: &str) -> Vec<u8> {
    let mut bytes = vec![0, u8::try_from(text.len() + 1).unwrap_or(u8::MAX)];
    bytes.extend(text.as_bytes());
    bytes.push(0);
    bytes
}

/// The comment in a table's user data.
pub(super) fn read_comment(mut userdata: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = userdata {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            return Some(super::netlink::text(value));
        }
        userdata = rest.get(usize::from(*length)..)?;
    }
    None
}

/// Writes both tables, with or without the owner flag.
pub(super) fn write(spec: &FirewallSpec, owned: bool) -> Result<Vec<u8>, BuilderError> {
    let mut batch = Batch::new();
    let table = |family, name| {
        Table::new(family)
            .with_name(name)
            .with_flags(if owned { OWNED } else { 0 })
            .with_userdata(comment(&spec.mark.to_string()))
    };
    let filter = table(ProtocolFamily::Inet, filter_table(&spec.tap)).add_to_batch(&mut batch);
    let nat = table(ProtocolFamily::Ipv4, nat_table(&spec.tap)).add_to_batch(&mut batch);
    Filter { batch: &mut batch, table: &filter, spec }.write()?;
    write_nat(&mut batch, &nat, spec)?;
    Ok(batch.finalize())
}

/// The filter table being written.
struct Filter<'a> {
    batch: &'a mut Batch,
    table: &'a Table,
    spec: &'a FirewallSpec,
}

impl Filter<'_> {
    fn write(mut self) -> Result<(), BuilderError> {
        self.write_targets()?;
        self.write_destinations()?;
        self.write_hooks()
    }

    /// A chain that others jump to.
    fn chain(&mut self, name: &str) -> Chain {
        Chain::new(self.table).with_name(name).add_to_batch(self.batch)
    }

    /// A chain that the kernel calls for every packet of the host.
    fn base_chain(&mut self, name: &str, hook: HookClass, priority: i32) -> Chain {
        base_chain(self.batch, self.table, name, ChainType::Filter, Hook::new(hook, priority))
    }

    fn add(&mut self, rule: Rule) {
        // What it returns is the rule again.
        let _added = rule.add_to_batch(self.batch);
    }

    /// What happens to packets in the end.
    fn write_targets(&mut self) -> Result<(), BuilderError> {
        let refuse = self.chain(REFUSE);
        let reset = Reject::default().with_type(RejectType::TcpRst);
        self.add(Rule::new(&refuse)?.protocol(Protocol::TCP).with_expr(reset));
        self.add(
            Rule::new(&refuse)?.with_expr(
                Reject::default()
                    .with_type(RejectType::IcmpxUnreach)
                    .with_icmp_code(IcmpCode::AdminProhibited),
            ),
        );

        let dns = self.chain(DNS);
        for server in self.spec.dns_servers.clone() {
            for protocol in [Protocol::UDP, Protocol::TCP] {
                let rule = Rule::new(&dns)?.daddr(IpAddr::V4(server));
                self.add(rule.dport(DNS_PORT, protocol).accept());
            }
        }

        let to_guest = self.chain(TO_GUEST);
        let answer = established_or_related(Rule::new(&to_guest)?)?
            .with_expr(Conntrack::new(ConntrackKey::Mark))
            .with_expr(Cmp::new(CmpOp::Eq, connection_mark(self.spec)));
        self.add(answer.accept());
        self.add(Rule::new(&to_guest)?.with_expr(goto(REFUSE)));
        Ok(())
    }

    /// Where the guest's packets may go.
    fn write_destinations(&mut self) -> Result<(), BuilderError> {
        let special = self.chain(SPECIAL);
        self.add(Rule::new(&special)?.with_expr(jump(DNS)));
        for range in ALWAYS_REFUSED {
            self.add(to_range(Rule::new(&special)?, range)?.with_expr(goto(REFUSE)));
        }

        let from_guest = self.chain(FROM_GUEST);
        let another_guest = Rule::new(&from_guest)?
            .with_expr(Meta::new(MetaType::OifName))
            .with_expr(Cmp::new(CmpOp::Eq, TAP_PREFIX.as_bytes()));
        self.add(another_guest.with_expr(goto(REFUSE)));
        self.add(Rule::new(&from_guest)?.with_expr(jump(DNS)));
        if !self.spec.allow_private {
            for range in PRIVATE_RANGES {
                self.add(to_range(Rule::new(&from_guest)?, range)?.with_expr(goto(REFUSE)));
            }
        }
        self.add(Rule::new(&from_guest)?.accept());

        let to_host = self.chain(TO_HOST);
        self.add(Rule::new(&to_host)?.with_expr(jump(DNS)));
        let verdict = Rule::new(&to_host)?;
        let open = self.spec.allow_host_access;
        self.add(if open { verdict.accept() } else { verdict.with_expr(goto(REFUSE)) });
        Ok(())
    }

    /// Which of the host's packets this is about: those of this TAP.
    fn write_hooks(&mut self) -> Result<(), BuilderError> {
        let tap = self.spec.tap.as_str();
        let source = self.base_chain("source", HookClass::PreRouting, PRIORITY_RAW);
        let own = Rule::new(&source)?.iiface(tap)?.saddr(IpAddr::V4(self.spec.guest));
        self.add(own.accept());
        self.add(Rule::new(&source)?.iiface(tap)?.drop());

        let destination = self.base_chain("destination", HookClass::PreRouting, PRIORITY_MANGLE);
        let marked = Rule::new(&destination)?
            .iiface(tap)?
            .with_expr(Immediate::new_data(connection_mark(self.spec).to_vec(), Register::Reg1))
            .with_expr(Conntrack::default().with_mark_value(Register::Reg1));
        self.add(marked);
        self.add(Rule::new(&destination)?.iiface(tap)?.with_expr(goto(SPECIAL)));

        let forward = self.base_chain("forward", HookClass::Forward, PRIORITY_FILTER);
        self.add(Rule::new(&forward)?.iiface(tap)?.with_expr(goto(FROM_GUEST)));
        self.add(Rule::new(&forward)?.oiface(tap)?.with_expr(goto(TO_GUEST)));

        let input = self.base_chain("input", HookClass::In, PRIORITY_FILTER);
        self.add(Rule::new(&input)?.iiface(tap)?.with_expr(goto(TO_HOST)));

        let output = self.base_chain("output", HookClass::Out, PRIORITY_FILTER);
        self.add(Rule::new(&output)?.oiface(tap)?.with_expr(goto(TO_GUEST)));
        Ok(())
    }
}

fn write_nat(batch: &mut Batch, table: &Table, spec: &FirewallSpec) -> Result<(), BuilderError> {
    let hook = Hook::new(HookClass::PostRouting, PRIORITY_SRCNAT);
    let chain = base_chain(batch, table, "postrouting", ChainType::Nat, hook);
    let source = NetworkHeaderField::IPv4(IPv4HeaderField::Saddr);
    let mut tap = spec.tap.clone().into_bytes();
    tap.push(0);
    let rule = Rule::new(&chain)?
        .with_expr(HighLevelPayload::Network(source).build())
        .with_expr(Cmp::new(CmpOp::Eq, spec.guest.octets()))
        .with_expr(Meta::new(MetaType::OifName))
        .with_expr(Cmp::new(CmpOp::Neq, tap))
        .masquerade();
    let _added = rule.add_to_batch(batch);
    Ok(())
}

fn base_chain(batch: &mut Batch, table: &Table, name: &str, kind: ChainType, hook: Hook) -> Chain {
    Chain::new(table)
        .with_name(name)
        .with_type(kind)
        .with_hook(hook)
        .with_policy(ChainPolicy::Accept)
        .add_to_batch(batch)
}

fn jump(chain: &str) -> Immediate {
    Immediate::new_verdict(VerdictKind::Jump { chain: chain.to_owned() })
}

fn goto(chain: &str) -> Immediate {
    Immediate::new_verdict(VerdictKind::Goto { chain: chain.to_owned() })
}

/// Packets to a range of IPv4 addresses; for family `inet` only.
fn to_range(rule: Rule, (network, prefix): (Ipv4Addr, u8)) -> Result<Rule, BuilderError> {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    let destination = NetworkHeaderField::IPv4(IPv4HeaderField::Daddr);
    Ok(rule
        .with_expr(Meta::new(MetaType::NfProto))
        .with_expr(Cmp::new(CmpOp::Eq, [2])) // NFPROTO_IPV4
        .with_expr(HighLevelPayload::Network(destination).build())
        .with_expr(Bitwise::new(mask.to_be_bytes(), [0; 4])?)
        .with_expr(Cmp::new(CmpOp::Eq, network.octets())))
}

/// What the VM's connections are marked with: its id. The kernel remembers a connection longer than
/// the VM lives, and the next VM with its address must not get what is still sent to it.
fn connection_mark(spec: &FirewallSpec) -> [u8; 4] {
    spec.mark.vm.number().max(1).to_ne_bytes()
}

/// Packets of a connection that was let in, and errors about one.
fn established_or_related(rule: Rule) -> Result<Rule, BuilderError> {
    let states = (ConnTrackState::ESTABLISHED | ConnTrackState::RELATED).bits();
    Ok(rule
        .with_expr(Conntrack::new(ConntrackKey::State))
        .with_expr(Bitwise::new(states.to_ne_bytes(), [0; 4])?)
        .with_expr(Cmp::new(CmpOp::Neq, [0; 4])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_read_back_what_was_written() {
        let text = "matchlock:0123456789abcdef:vm-0badcafe";
        assert_eq!(read_comment(&comment(text)).as_deref(), Some(text));
        let behind_another = [&[1, 2, 9, 9], comment(text).as_slice()].concat();
        assert_eq!(read_comment(&behind_another).as_deref(), Some(text));
        for damaged in [&[][..], &[0], &[0, 9, 1], &[1, 0]] {
            assert_eq!(read_comment(damaged), None);
        }
    }
}
