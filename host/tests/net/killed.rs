//! The kernel's dead-man's switch: SIGKILL of the owner leaves no link, no table, no lock.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use matchlock_host::firewall::{Firewall as _, LinuxFirewall};
use matchlock_host::netlock::{LinuxNetworkLocks, NetworkLocks as _};
use matchlock_host::tap::{LinuxTaps, TapSpec, Taps as _};

use crate::firewall::spec;
use crate::namespace::{Namespace, mark};

/// Says that this process is the owner and not a test run by hand.
const ROLE: &str = "MATCHLOCK_TEST_OWNER";
const READY: &str = "the owner has everything";

/// The owner: takes everything and waits for its end.
#[test]
#[ignore = "a helper process"]
fn owner() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mark = mark(1, 1);
        let gateway = "192.168.100.1".parse().unwrap();
        let tap = TapSpec { mark: mark.clone(), gateway, guest: spec(&mark).guest, prefix: 24, mtu: 1500 };
        let _tap = LinuxTaps::new().create(&tap).await.unwrap();
        let _tables = LinuxFirewall::new().apply(&spec(&mark)).await.unwrap();
        let _lock = LinuxNetworkLocks::new().acquire(Duration::ZERO).await.unwrap();
        println!("{READY}");
        std::future::pending::<()>().await;
    });
}

#[test]
fn a_killed_owner_leaves_nothing() {
    let namespace = Namespace::new();
    let mut owner = namespace.run(|| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::owner", "--ignored", "--nocapture", "--test-threads=1"])
            .env(ROLE, "")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let mut said = BufReader::new(owner.stdout.take().unwrap()).lines();
    // The test harness may have begun the line.
    assert!(said.any(|line| line.unwrap().ends_with(READY)), "the owner ended early");
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
