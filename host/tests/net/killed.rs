//! The kernel's dead-man's switch: SIGKILL of the owner leaves no link, no table, no lock.

use std::io::{BufRead as _, BufReader};
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use matchlock_host::firewall::{Firewall as _, FirewallHandle, LinuxFirewall};
use matchlock_host::netlock::{LinuxNetworkLocks, NetworkLocks as _};
use matchlock_host::tap::{LinuxTaps, TapHandle, TapSpec, Taps as _};

use crate::firewall::spec;
use crate::namespace::{Namespace, mark};

/// Says that this process is the owner and not a test run by hand, and of what.
const ROLE: &str = "MATCHLOCK_TEST_OWNER";
pub(crate) const ALONE: &str = "alone";
const WITH_HYPERVISOR: &str = "with a hypervisor";
const READY: &str = "the owner has everything";

/// The owner: takes everything and waits for its end.
#[test]
#[ignore = "a helper process"]
fn owner() {
    let Some(role) = std::env::var_os(ROLE) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mark = mark(1, 1);
        let gateway = "192.168.100.1".parse().unwrap();
        let tap = TapSpec {
            mark: mark.clone(),
            gateway,
            guest: spec(&mark).guest,
            prefix: 24,
            mtu: 1500,
        };
        let tap = LinuxTaps::new().create(&tap).await.unwrap();
        let tables = LinuxFirewall::new().apply(&spec(&mark)).await.unwrap();
        let _lock = LinuxNetworkLocks::new().acquire(Duration::ZERO).await.unwrap();
        let hypervisor = (role == WITH_HYPERVISOR).then(|| hypervisor(&tap, &tables));
        println!("{} {READY}", hypervisor.unwrap_or_default());
        std::future::pending::<()>().await;
    });
}

/// A process that holds what a hypervisor does, and does not die with its owner; its pid.
fn hypervisor(tap: &TapHandle, tables: &FirewallHandle) -> u32 {
    let keeper = tables.keeper().unwrap().unwrap();
    for inherited in [tap.fd(), keeper.as_fd()] {
        rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::empty()).unwrap();
    }
    // It ends by itself should this test fail half-way.
    Command::new("/bin/sleep").arg("100").spawn().unwrap().id()
}

/// Starts an owner and waits until it has everything; what it said before.
pub(crate) fn start(namespace: &Namespace, role: &'static str) -> (Child, String) {
    let mut owner = namespace.run(move || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::owner", "--ignored", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let mut said = BufReader::new(owner.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = said.find(|line| line.ends_with(READY)).expect("the owner ended early");
    (owner, line)
}

/// The link and the rules as programs show them.
pub(crate) fn shown(namespace: &Namespace) -> (bool, bool) {
    let rules = namespace.program("nft", "list ruleset");
    (namespace.ip("link").contains("fc-00000001"), !rules.is_empty())
}

/// However the owner ends: a guest must not outlive its rules.
#[test]
fn what_a_hypervisor_holds_outlives_the_owner_and_goes_with_the_hypervisor() {
    let namespace = Namespace::new();
    let (mut owner, said) = start(&namespace, WITH_HYPERVISOR);
    let pid: i32 =
        said.split_whitespace().rev().nth(READY.split(' ').count()).unwrap().parse().unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert_eq!(shown(&namespace), (true, true));
    let hypervisor = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(hypervisor, rustix::process::Signal::KILL).unwrap();
    // It is no child of ours to be waited for.
    let begun = Instant::now();
    while shown(&namespace) != (false, false) {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", shown(&namespace));
    }
}

#[test]
fn a_killed_owner_leaves_nothing() {
    let namespace = Namespace::new();
    let (mut owner, _) = start(&namespace, ALONE);
    assert!(namespace.ip("link").contains("fc-00000001"));
    namespace.block_on(|| async {
        assert!(!LinuxFirewall::new().observe("fc-00000001").await.unwrap().is_gone());
        LinuxNetworkLocks::new().acquire(Duration::ZERO).await.map(drop).unwrap_err();
    });

    let begun = Instant::now();
    owner.kill().unwrap();
    owner.wait().unwrap();
    // The kernel closes what a process had before its parent learns of its end.
    let (link, rules) = (namespace.ip("link"), namespace.program("nft", "list ruleset"));
    println!("gone within {:?}", begun.elapsed());
    assert!(!link.contains("fc-"), "{link}");
    assert_eq!(rules, "");
    namespace.block_on(|| async {
        drop(LinuxNetworkLocks::new().acquire(Duration::ZERO).await.unwrap());
    });
}
