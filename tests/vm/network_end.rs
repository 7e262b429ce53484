//! What is left of a VM's network when somebody is killed, and that its guest never sends without its
//! rules.

use std::fs;
use std::path::Path;
use std::time::Duration;

use matchlock_test_support::netns::{FORBIDDEN, PUBLIC, TestNet};
use matchlock_test_support::{Installation, Running, wait_until};
use rustix::process::{Pid, Signal, kill_process};

use super::lifecycle::hypervisor;
use super::network::{assert_nothing_left, output, start};
use super::{PATIENCE, stderr, stdout};

/// How soon everything is gone that a killed process had. The kernel takes tenths of a second.
const SOON: Duration = Duration::from_secs(10);

/// The kernel takes link and tables along; nothing of ours runs any more.
#[test]
fn a_killed_owner_leaves_neither_link_nor_table_and_gc_gives_the_subnet_back() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let owner = start(&net, &installation, &["--rm=false"], "sleep 1000");
    let vm = installation.wait_for_status("running").unwrap();
    let suffix = vm.strip_prefix("vm-").unwrap();
    let there = net.links_and_tables().unwrap();
    let expected = [
        format!("fc-{suffix}"),
        format!("table inet matchlock_fc-{suffix}"),
        format!("table ip matchlock_nat_fc-{suffix}"),
    ];
    assert_eq!(there, expected);
    // The hypervisor alone keeps the TAP there: our own descriptor is closed.
    let owners = std::fs::read_dir(format!("/proc/{}/fd", owner.pid().unwrap())).unwrap();
    let mut open = owners.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    assert!(!open.any(|file| file == Path::new("/dev/net/tun")));
    owner.signal(Signal::KILL).unwrap();
    drop(owner.wait(PATIENCE).unwrap());
    wait_until(SOON, "the kernel to take everything along", || {
        Ok(net.links_and_tables()?.is_empty() && installation.remains()?.processes.is_empty())
    })
    .unwrap();
    // From another network namespace nothing can be seen, so nothing is given back.
    let elsewhere = installation.output(&["gc", &vm]).unwrap();
    assert_eq!(elsewhere.status.code(), Some(1), "{}", stdout(&elsewhere));
    assert!(stderr(&elsewhere).contains("another network namespace"), "{}", stderr(&elsewhere));
    let held = "select subnet from subnet_allocations";
    assert_eq!(installation.sql(held).unwrap(), "192.168.100.0/24\n");
    let collected = output(&net, &installation, &["gc", &vm]);
    assert_eq!(collected.status.code(), Some(0), "{}", stderr(&collected));
    assert!(stdout(&collected).contains("subnet_release"), "{}", stdout(&collected));
    assert_eq!(installation.sql(held).unwrap(), "");
    assert_eq!(output(&net, &installation, &["rm", &vm]).status.code(), Some(0));
    assert_nothing_left(&net, &installation);
}

/// The kernel's number for netlink sockets of netfilter.
const NETFILTER: &str = "12";

/// Whether a process holds a socket that keeps tables there.
fn keeps_tables(pid: Pid) -> bool {
    let process = format!("/proc/{}", pid.as_raw_nonzero());
    let sockets = fs::read_to_string(format!("{process}/net/netlink")).unwrap();
    let of_netfilter: Vec<String> = sockets
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields.get(1) == Some(&NETFILTER))
        .filter_map(|fields| Some(format!("socket:[{}]", fields.last()?)))
        .collect();
    let open = fs::read_dir(format!("{process}/fd")).unwrap();
    open.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
        .any(|file| of_netfilter.iter().any(|socket| file.as_os_str() == socket.as_str()))
}

/// A VM whose guest sends without end, to where it may and to where it may not, and is seen to.
fn flooding(net: &TestNet, installation: &Installation) -> Running {
    net.count_arrivals(&[PUBLIC, FORBIDDEN[0]]).unwrap();
    let script = format!(
        "for address in {PUBLIC} {0} {0} {0}; do ping -q -i 0.003 $address >/dev/null & done; wait",
        FORBIDDEN[0]
    );
    let owner = start(net, installation, &[], &script);
    installation.wait_for_status("running").unwrap();
    wait_until(PATIENCE, "the guest to send", || Ok(net.arrivals()?[0] > 100)).unwrap();
    owner
}

fn assert_nothing_escaped(net: &TestNet) {
    let arrived = net.arrivals().unwrap();
    println!("{arrived:?} packets came to {PUBLIC} and {}", FORBIDDEN[0]);
    assert_eq!(arrived[1], 0, "the guest was without its rules");
}

/// The rules go with the hypervisor, not with the owner, which dies first.
#[test]
fn a_guest_whose_owner_is_killed_never_sends_without_its_rules() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let owner = flooding(&net, &installation);
    assert!(keeps_tables(hypervisor(&installation)));
    owner.signal(Signal::KILL).unwrap();
    drop(owner.wait(PATIENCE).unwrap());
    wait_until(SOON, "the kernel to take everything along", || {
        Ok(net.links_and_tables()?.is_empty() && installation.remains()?.processes.is_empty())
    })
    .unwrap();
    assert_nothing_escaped(&net);
    assert_eq!(output(&net, &installation, &["gc"]).status.code(), Some(0));
    assert_nothing_left(&net, &installation);
}

/// The link goes with the hypervisor; the owner lives, keeps the tables until then, and removes them.
#[test]
fn a_killed_hypervisor_takes_its_link_along_and_its_owner_removes_the_rest() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let owner = flooding(&net, &installation);
    kill_process(hypervisor(&installation), Signal::KILL).unwrap();
    let said = owner.wait(PATIENCE).unwrap();
    assert_eq!(said.status.code(), Some(125), "{}", stderr(&said));
    assert!(stderr(&said).contains("the hypervisor died"), "{}", stderr(&said));
    assert_nothing_escaped(&net);
    assert_nothing_left(&net, &installation);
}
