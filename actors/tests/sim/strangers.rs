//! What others have on this host, which nobody of us may touch.

use std::net::Ipv4Addr;

use matchlock_host::firewall::filter_table;
use matchlock_host::process::Processes as _;
use matchlock_host::tap::tap_name;
use matchlock_model::id::{InstallId, Mark, VmId};

use super::world::Sim;

/// A VM of another installation, with everything of it on this host.
fn stranger() -> Mark {
    Mark { install: InstallId::from_bytes([9; 8]), vm: VmId::new(7) }
}

/// Of another installation, with the name of a TAP that may be ours.
pub(crate) fn squatter() -> Mark {
    Mark { install: InstallId::from_bytes([9; 8]), vm: VmId::new(3) }
}

impl Sim {
    /// Others live on this host too.
    pub(crate) fn settle_strangers(&self) {
        let (mark, squatter) = (stranger(), squatter());
        self.processes.add(Some(mark.clone()), None);
        self.taps.add_link("fc-99999999", Some(&mark.to_string()), &[gateway(100)]);
        self.taps.add_link(&tap_name(squatter.vm), Some(&squatter.to_string()), &[]);
        self.firewall.add_table("inet strangers", Some(&mark.to_string()));
        let table = format!("inet {}", filter_table(&tap_name(squatter.vm)));
        self.firewall.add_table(&table, Some(&squatter.to_string()));
    }

    /// Nobody has touched them.
    pub(crate) fn check_strangers(&self) {
        let there = self.processes.find_marked().unwrap();
        let process = there.iter().any(|process| process.mark == stranger());
        let (taps, tables) = (self.taps.existing(), self.firewall.existing());
        let squatted = tap_name(squatter().vm);
        let taps = ["fc-99999999".to_owned(), squatted.clone()].iter().all(|t| taps.contains(t));
        let table = format!("inet {}", filter_table(&squatted));
        let tables = ["inet strangers".to_owned(), table].iter().all(|t| tables.contains(t));
        if !(process && taps && tables) {
            self.trace.broken("law 8: something of another installation was touched");
        }
    }
}

fn gateway(octet: u8) -> (Ipv4Addr, u8) {
    (Ipv4Addr::new(192, 168, octet, 1), 24)
}
