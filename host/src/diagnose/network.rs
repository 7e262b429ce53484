//! What VM networking needs. TUN and nftables are tried, not asked about: modules are loaded, flags
//! known and rights held only when it works.

use std::collections::BTreeMap;
use std::io;

use matchlock_model::id::InstallId;

use super::throwaway::in_own_network;
use super::{Check, Root, told};
use crate::firewall::{Firewall, FirewallError, LinuxFirewall};
use crate::process::Processes;
use crate::tap::{self, TapError, Taps};

const CAP_NET_ADMIN: u32 = 12;
const WITHOUT: &str = "`matchlock run --no-network` needs none of it";

/// Whether TAPs can be made.
#[must_use]
pub fn tun_device() -> Check {
    from_tun(in_own_network(tap::probe), tap::probe_device)
}

/// `own` is what a try in a namespace of its own said; `device` what opening the device alone says.
fn from_tun(
    own: io::Result<Result<(), TapError>>,
    device: impl FnOnce() -> Result<(), TapError>,
) -> Check {
    let name = "tun-device";
    let (tried, how) = match own {
        Ok(tried) => (tried, "a TAP can be made"),
        // Not ours to make namespaces: what is left to try without leaving anything.
        Err(_) => (device(), "/dev/net/tun opens"),
    };
    match tried {
        Ok(()) => Check::pass(name, how),
        Err(error @ TapError::NoTun(_)) => Check::fail(
            name,
            told(&error),
            format!(
                "modprobe tun; mkdir -p /dev/net && mknod /dev/net/tun c 10 200; in a container, \
                 pass --device /dev/net/tun; {WITHOUT}"
            ),
        ),
        Err(error) => Check::fail(name, told(&error), format!("run as root; {WITHOUT}")),
    }
}

/// Whether firewall tables can be made, and whether they go with their owner.
#[must_use]
pub fn nf_tables() -> Check {
    from_tables(in_own_network(|| LinuxFirewall::new().probe()), LinuxFirewall::list_probe)
}

fn from_tables(
    own: io::Result<Result<bool, FirewallError>>,
    list: impl FnOnce() -> Result<(), FirewallError>,
) -> Check {
    let name = "nf_tables";
    let failed = |error: &FirewallError| {
        let fix = match error {
            FirewallError::NotPermitted { .. } => format!("run as root; {WITHOUT}"),
            _ => format!("modprobe nf_tables nft_nat nft_reject nft_ct nft_masq; {WITHOUT}"),
        };
        Check::fail(name, told(error), fix)
    };
    match own {
        Ok(Ok(true)) => {
            Check::pass(name, "tables can be made, and go with the process that owns them")
        }
        Ok(Ok(false)) => Check::warn(
            name,
            "tables can be made, but have no owner: those of a killed process stay until `matchlock gc`",
            "boot Linux 5.12 or later",
        ),
        Ok(Err(error)) => failed(&error),
        Err(error) => match list() {
            Ok(()) => Check::warn(
                name,
                format!("tables can be listed; making some was not tried ({error})"),
                "run `matchlock diagnose` as root to try it",
            ),
            Err(error) => failed(&error),
        },
    }
}

/// Whether this process has the right to make links and tables.
#[must_use]
pub fn capabilities(root: &Root) -> Check {
    let name = "capabilities";
    let held = root.read("/proc/self/status").map(|status| effective(&status));
    match held {
        Ok(Some(set)) if set >> CAP_NET_ADMIN & 1 == 1 => {
            Check::pass(name, "CAP_NET_ADMIN is held")
        }
        Ok(Some(_)) => Check::fail(
            name,
            "CAP_NET_ADMIN is not held: VMs cannot have a network",
            format!("run as root; {WITHOUT}"),
        ),
        Ok(None) => Check::fail(name, "/proc/self/status has no CapEff", "mount /proc"),
        Err(error) => Check::fail(name, format!("/proc/self/status: {error}"), "mount /proc"),
    }
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Whether this host forwards, or can be made to.
#[must_use]
pub fn ip_forwarding(root: &Root) -> Check {
    let (name, file) = ("ip-forwarding", "/proc/sys/net/ipv4/ip_forward");
    let path = root.path(file);
    match root.read(file) {
        Ok(text) if text.trim() == "1" => Check::pass(name, "net.ipv4.ip_forward is 1"),
        Ok(text) if text.trim() == "0" => {
            // Whoever may write does not get past a file system that is read-only.
            forwards_not(rustix::fs::access(&path, rustix::fs::Access::WRITE_OK).is_ok())
        }
        Ok(text) => Check::fail(name, format!("{file} says {text:?}"), "see what mounts /proc"),
        Err(error) => Check::fail(name, format!("{file}: {error}"), "mount /proc"),
    }
}

fn forwards_not(can_be_changed: bool) -> Check {
    let name = "ip-forwarding";
    if can_be_changed {
        return Check::warn(
            name,
            "net.ipv4.ip_forward is 0; the first VM with a network turns it on, for good",
            "nothing, or `sysctl net.ipv4.ip_forward=1`",
        );
    }
    Check::fail(
        name,
        "net.ipv4.ip_forward is 0 and cannot be changed here",
        format!(
            "sysctl net.ipv4.ip_forward=1 as root; for a container, docker run --sysctl \
             net.ipv4.ip_forward=1; {WITHOUT}"
        ),
    )
}

/// Whether rules of others stand in guests' way.
pub async fn obstacles(firewall: &dyn Firewall) -> Check {
    let name = "firewall-obstacles";
    match firewall.obstacles().await {
        Ok(found) if found.is_empty() => {
            Check::pass(name, "no rule set of others was found to drop guests' packets")
        }
        Ok(found) => {
            let all: Vec<String> = found.iter().map(ToString::to_string).collect();
            Check::warn(name, all.join("; "), "see docs/OPERATIONS.md, The network of VMs")
        }
        Err(error) => Check::warn(
            name,
            format!("not looked at: {}", told(&error)),
            "run `matchlock diagnose` as root to look",
        ),
    }
}

/// Whether another installation has links, tables or hypervisors here. `ours` is `None` where nothing
/// was ever made.
pub async fn alike(
    ours: Option<&InstallId>,
    taps: &dyn Taps,
    firewall: &dyn Firewall,
    processes: &dyn Processes,
) -> Check {
    let name = "other-installations";
    let looked = async {
        let mut marks: Vec<(_, &str)> = Vec::new();
        let found = taps.list_alike().await.map_err(|e| told(&e))?;
        marks.extend(found.into_iter().filter_map(|tap| Some((tap.mark?, "link"))));
        match firewall.list_alike().await {
            Ok(found) => {
                marks.extend(found.into_iter().filter_map(|table| Some((table.mark?, "table"))));
            }
            // Whoever may not list them is told by another check.
            Err(FirewallError::NotPermitted { .. }) => {}
            Err(error) => return Err(told(&error)),
        }
        let found = processes.find_marked().map_err(|e| told(&e))?;
        marks.extend(found.into_iter().map(|process| (process.mark, "hypervisor")));
        Ok::<_, String>(marks)
    };
    let marks = match looked.await {
        Ok(marks) => marks,
        Err(why) => return Check::fail(name, why, "run `matchlock diagnose` as root"),
    };
    let mut others: BTreeMap<String, BTreeMap<&str, usize>> = BTreeMap::new();
    for (mark, what) in marks {
        if Some(&mark.install) != ours {
            *others.entry(mark.install.to_string()).or_default().entry(what).or_default() += 1;
        }
    }
    if others.is_empty() {
        return Check::pass(name, "nothing of another installation is here");
    }
    let told: Vec<String> = others
        .iter()
        .map(|(install, found)| {
            let found: Vec<String> = found.iter().map(|(what, n)| counted(*n, what)).collect();
            format!("{} of installation {install}", found.join(", "))
        })
        .collect();
    Check::warn(
        name,
        told.join("; "),
        "nothing, if you know it; otherwise find its directory (grep -rl ID /*/.matchlock/install-id \
         /home/*/.matchlock/install-id) and run `matchlock gc` with MATCHLOCK_HOME set to that",
    )
}

/// So many of something.
fn counted(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use matchlock_model::id::{Mark, VmId};

    use super::super::Status;
    use super::*;
    use crate::firewall::{FakeFirewall, Obstacle};
    use crate::process::FakeProcesses;
    use crate::tap::FakeTaps;

    fn host(path: &str, text: &str) -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        let root = Root::at(dir.path());
        (dir, root)
    }

    fn denied() -> io::Error {
        io::Error::from_raw_os_error(libc::EPERM)
    }

    #[test]
    fn taps_are_made_for_real_and_nothing_is_left() {
        let links = || fs::read_to_string("/proc/net/dev").unwrap().lines().count();
        let before = links();
        let check = tun_device();
        assert_eq!(check.status, Status::Pass, "{check:?}");
        assert_eq!(links(), before);
    }

    #[test]
    fn a_host_without_tun_says_how_to_get_it() {
        let none = from_tun(Ok(Err(TapError::NoTun(io::ErrorKind::NotFound.into()))), || Ok(()));
        assert_eq!(none.status, Status::Fail);
        assert!(none.fix.unwrap().contains("modprobe tun"));
        let refused = from_tun(Err(denied()), || Err(TapError::of("open /dev/net/tun", denied())));
        assert_eq!(refused.status, Status::Fail);
        assert_eq!(from_tun(Err(denied()), || Ok(())).status, Status::Pass);
    }

    #[test]
    fn tables_are_made_for_real() {
        let check = nf_tables();
        assert_eq!(check.status, Status::Pass, "{check:?}");
    }

    #[test]
    fn a_kernel_without_tables_is_told_apart_from_no_right() {
        let refused = FirewallError::Refused {
            doing: "write".into(),
            message: 1,
            messages: 2,
            source: io::Error::from_raw_os_error(libc::EOPNOTSUPP),
        };
        let none = from_tables(Ok(Err(refused)), || Ok(()));
        assert_eq!(none.status, Status::Fail);
        assert!(none.fix.unwrap().contains("modprobe"));
        assert_eq!(from_tables(Ok(Ok(false)), || Ok(())).status, Status::Warn);
        assert_eq!(from_tables(Err(denied()), || Ok(())).status, Status::Warn);
        let no_right = from_tables(Err(denied()), || Err(FirewallError::of("list", denied())));
        assert_eq!(no_right.status, Status::Fail);
        assert!(no_right.fix.unwrap().contains("root"));
    }

    #[test]
    fn rights() {
        let (_dir, root) = host("proc/self/status", "CapPrm:\t0\nCapEff:\t0000000000001000\n");
        assert_eq!(capabilities(&root).status, Status::Pass);
        let (_dir, root) = host("proc/self/status", "CapEff:\t0000000000000fff\n");
        assert_eq!(capabilities(&root).status, Status::Fail);
        let (_dir, root) = host("proc/self/status", "Name:\tx\n");
        assert_eq!(capabilities(&root).status, Status::Fail);
    }

    #[test]
    fn forwarding() {
        let file = "proc/sys/net/ipv4/ip_forward";
        for (text, status) in [("1\n", Status::Pass), ("0\n", Status::Warn), ("x", Status::Fail)] {
            let (_dir, root) = host(file, text);
            assert_eq!(ip_forwarding(&root).status, status, "{text:?}");
        }
        let (_dir, nothing) = host("x", "");
        assert_eq!(ip_forwarding(&nothing).status, Status::Fail);
        let fixed = forwards_not(false);
        assert_eq!(fixed.status, Status::Fail);
        assert!(fixed.fix.unwrap().contains("--sysctl"));
    }

    #[tokio::test]
    async fn rules_of_others_are_named() {
        let firewall = FakeFirewall::default();
        assert_eq!(obstacles(&firewall).await.status, Status::Pass);
        let what = "chain FORWARD of table ip filter".to_owned();
        firewall.add_obstacle(Obstacle { what: what.clone(), why: "drop".into() });
        let check = obstacles(&firewall).await;
        assert_eq!(check.status, Status::Warn);
        assert!(check.message.contains(&what), "{check:?}");
    }

    #[tokio::test]
    async fn another_installation_is_named() {
        let (taps, firewall) = (FakeTaps::default(), FakeFirewall::default());
        let processes = FakeProcesses::new();
        let mark = |byte| Mark { install: InstallId::from_bytes([byte; 8]), vm: VmId::new(1) };
        let ours = mark(1).install;
        processes.add(Some(mark(1)), None);
        assert_eq!(alike(Some(&ours), &taps, &firewall, &processes).await.status, Status::Pass);
        processes.add(Some(mark(2)), None);
        let check = alike(Some(&ours), &taps, &firewall, &processes).await;
        assert_eq!(check.status, Status::Warn);
        assert!(check.message.contains("1 hypervisor of installation 0202"), "{check:?}");
    }
}
