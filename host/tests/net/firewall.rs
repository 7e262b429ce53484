//! The firewall: one suite for the real one and the fake, and what only a real one can do.
//! What the rules do to packets is in `data_path`.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use matchlock_host::fault::Fault;
use matchlock_host::firewall::{
    FakeFirewall, Firewall, FirewallError, FirewallOp, FirewallSpec, LinuxFirewall,
    ObservedFirewall, ObservedTable, Obstacle,
};
use matchlock_host::tap::tap_name;
use matchlock_model::id::{InstallId, Mark};

use crate::namespace::{Namespace, mark};

pub(crate) fn spec(mark: &Mark) -> FirewallSpec {
    FirewallSpec {
        mark: mark.clone(),
        tap: tap_name(mark.vm),
        guest: Ipv4Addr::new(192, 168, 100, 2),
        dns_servers: vec![Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(10, 0, 0, 53)],
        allow_private: false,
        allow_host_access: false,
    }
}

fn table(name: &str, mark: &Mark, owned: bool) -> ObservedTable {
    let comment = Some(mark.to_string());
    ObservedTable { name: name.to_owned(), comment, mark: Some(mark.clone()), owned }
}

fn both(mark: &Mark, owned: bool) -> ObservedFirewall {
    let suffix = mark.vm.suffix();
    ObservedFirewall {
        filter: Some(table(&format!("inet matchlock_fc-{suffix}"), mark, owned)),
        nat: Some(table(&format!("ip matchlock_nat_fc-{suffix}"), mark, owned)),
    }
}

/// Waits until a TAP's tables are gone. A program that another test starts just now holds copies
/// of our sockets until its exec.
async fn soon_gone(firewall: &dyn Firewall, tap: &str) {
    let begun = Instant::now();
    while !firewall.observe(tap).await.unwrap().is_gone() {
        assert!(begun.elapsed() < Duration::from_secs(20), "the tables of {tap} stay");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What every implementation must do; `owned`: tables go with their handle.
async fn firewalls_conform(firewall: &dyn Firewall, owned: bool) {
    let (ours, theirs) = (mark(1, 0x0bad_cafe), mark(2, 0x0bad_caff));
    let tap = tap_name(ours.vm);
    assert!(firewall.observe(&tap).await.unwrap().is_gone());
    assert_eq!(firewall.list_marked(&ours.install).await.unwrap(), []);
    firewall.remove(&tap, &ours).await.unwrap();

    let handle = firewall.apply(&spec(&ours)).await.unwrap();
    assert_eq!((handle.tap(), handle.is_dead_mans_switch()), (tap.as_str(), owned));
    assert_eq!(firewall.observe(&tap).await.unwrap(), both(&ours, owned));

    // Another installation neither sees them nor harms them.
    let their_handle = firewall.apply(&spec(&theirs)).await.unwrap();
    let mut listed = firewall.list_marked(&ours.install).await.unwrap();
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    let expected = both(&ours, owned);
    assert_eq!(listed, [expected.filter.unwrap(), expected.nat.unwrap()]);
    assert_eq!(firewall.list_marked(&InstallId::from_bytes([9; 8])).await.unwrap(), []);
    let alike = firewall.list_alike().await.unwrap();
    let marked = |mark: &Mark| alike.iter().filter(|t| t.mark.as_ref() == Some(mark)).count();
    assert_eq!((alike.len(), marked(&ours), marked(&theirs)), (4, 2, 2));
    let impostor = Mark { install: theirs.install.clone(), vm: ours.vm };
    let refused = firewall.remove(&tap, &impostor).await.unwrap_err();
    assert!(matches!(refused, FirewallError::NotOurs { .. }), "{refused}");
    let refused = firewall.apply(&spec(&impostor)).await.unwrap_err();
    assert!(matches!(refused, FirewallError::NotOurs { .. }), "{refused}");

    // Only through the handle, where there is an owner.
    if owned {
        let refused = firewall.remove(&tap, &ours).await.unwrap_err();
        assert!(matches!(refused, FirewallError::OwnerLives { .. }), "{refused}");
        let refused = firewall.apply(&spec(&ours)).await.unwrap_err();
        assert!(matches!(refused, FirewallError::OwnerLives { .. }), "{refused}");
    } else {
        drop(firewall.apply(&spec(&ours)).await.unwrap());
    }
    assert_eq!(firewall.observe(&tap).await.unwrap(), both(&ours, owned));

    firewall.release(handle).await.unwrap();
    assert!(firewall.observe(&tap).await.unwrap().is_gone());
    firewall.remove(&tap, &ours).await.unwrap();
    assert_eq!(firewall.observe(their_handle.tap()).await.unwrap(), both(&theirs, owned));

    // The dead-man's switch.
    drop(firewall.apply(&spec(&ours)).await.unwrap());
    if owned {
        soon_gone(firewall, &tap).await;
    }
    assert_eq!(firewall.observe(&tap).await.unwrap().is_gone(), owned);
    firewall.remove(&tap, &ours).await.unwrap();
    assert!(firewall.observe(&tap).await.unwrap().is_gone());
    firewall.release(their_handle).await.unwrap();
    assert_eq!(firewall.list_marked(&theirs.install).await.unwrap(), []);

    assert_eq!(firewall.obstacles().await.unwrap(), []);
    assert!(!firewall.ip_forward().unwrap());
    assert!(firewall.enable_ip_forward().unwrap());
    assert!(firewall.ip_forward().unwrap());
    assert!(!firewall.enable_ip_forward().unwrap());
}

#[test]
fn the_real_firewall_conforms() {
    let namespace = Namespace::new();
    namespace.block_on(|| async { firewalls_conform(&LinuxFirewall::new(), true).await });
    assert_eq!(namespace.program("nft", "list ruleset"), "");
}

#[test]
fn the_real_firewall_without_the_owner_flag_conforms() {
    let namespace = Namespace::new();
    let plain = LinuxFirewall::with_plain_tables;
    namespace.block_on(move || async move { firewalls_conform(&plain(), false).await });
    assert_eq!(namespace.program("nft", "list ruleset"), "");
}

#[tokio::test]
async fn the_fake_firewalls_conform() {
    for (fake, owned) in [(FakeFirewall::new(), true), (FakeFirewall::with_plain_tables(), false)] {
        firewalls_conform(&fake, owned).await;
        assert_eq!(fake.existing(), Vec::<String>::new());
    }
}

#[tokio::test(start_paused = true)]
async fn the_fake_does_what_a_test_asks_of_it() {
    let fake = FakeFirewall::new();
    let mark = mark(1, 7);
    for fault in [Fault::Fails, Fault::FailsAfterwards] {
        fake.set_fault(FirewallOp::Apply, Some(fault));
        fake.apply(&spec(&mark)).await.unwrap_err();
        assert_eq!(fake.existing(), Vec::<String>::new());
    }
    fake.set_fault(FirewallOp::Apply, Some(Fault::Late(Duration::from_secs(5))));
    let begun = tokio::time::Instant::now();
    let handle = fake.apply(&spec(&mark)).await.unwrap();
    assert_eq!(begun.elapsed(), Duration::from_secs(5));
    assert_eq!(fake.applied(handle.tap()), Some(spec(&mark)));
    fake.set_fault(FirewallOp::Observe, Some(Fault::Never));
    let never = tokio::time::timeout(Duration::from_secs(9), fake.observe(handle.tap()));
    never.await.unwrap_err();
    drop(handle);
    fake.add_table("inet matchlock_fc-00000007", None);
    let refused = fake.remove("fc-00000007", &mark).await.unwrap_err();
    assert!(matches!(refused, FirewallError::NotOurs { .. }), "{refused}");
    let obstacle = Obstacle { what: "chain x".to_owned(), why: "it drops".to_owned() };
    fake.add_obstacle(obstacle.clone());
    assert_eq!(fake.obstacles().await.unwrap(), [obstacle]);
    assert_eq!(fake.calls().len(), 6);
}

/// What nft shows of the tables. The program's name stands there when the socket's number is a
/// pid, as it mostly is.
fn ruleset(namespace: &Namespace) -> String {
    let shown = namespace.program("nft", "list ruleset");
    let lines = shown.lines().map(|line| line.split(" # progname").next().unwrap_or(line));
    lines.flat_map(|line| [line.trim_end(), "\n"]).collect()
}

#[test]
fn nft_shows_the_rules_as_they_were_meant() {
    let namespace = Namespace::new();
    let mark = mark(1, 0x0bad_cafe);
    for (name, allow_private, allow_host_access) in
        [("default", false, false), ("allow_private", true, false), ("allow_host", false, true)]
    {
        let spec = FirewallSpec { allow_private, allow_host_access, ..spec(&mark) };
        let handle =
            namespace.block_on(|| async move { LinuxFirewall::new().apply(&spec).await.unwrap() });
        insta::assert_snapshot!(name, ruleset(&namespace));
        namespace.block_on(|| async { LinuxFirewall::new().release(handle).await.unwrap() });
    }
}

#[test]
fn tables_of_others_are_told_apart_and_left_alone() {
    let namespace = Namespace::new();
    for rule in [
        "add table inet matchlock_fc-00000001",
        "add table ip matchlock_nat_fc-00000002 { comment \"matchlock:of-somebody\" ; }",
        "add table ip6 matchlock_fc-00000003",
        "add table inet other { comment \"a mark:matchlock\" ; }",
    ] {
        namespace.program("nft", rule);
    }
    let before = namespace.program("nft", "list ruleset");
    namespace.block_on(|| async {
        let firewall = LinuxFirewall::new();
        for vm in 1..=2 {
            let mark = mark(1, vm);
            let refused = firewall.apply(&spec(&mark)).await.unwrap_err();
            assert!(matches!(refused, FirewallError::NotOurs { .. }), "{refused}");
            let refused = firewall.remove(&tap_name(mark.vm), &mark).await.unwrap_err();
            assert!(matches!(refused, FirewallError::NotOurs { .. }), "{refused}");
        }
        // Of another family: another table.
        let handle = firewall.apply(&spec(&mark(1, 3))).await.unwrap();
        firewall.release(handle).await.unwrap();
        assert_eq!(firewall.list_marked(&mark(1, 1).install).await.unwrap(), []);
    });
    assert_eq!(namespace.program("nft", "list ruleset"), before);
}

#[test]
fn what_cannot_be_overridden_is_said() {
    let namespace = Namespace::new();
    for rule in [
        "add table ip filter",
        "add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }",
        "add chain ip filter OUTPUT { type filter hook output priority 0 ; policy accept ; }",
        "add table inet strict",
        "add chain inet strict in { type filter hook input priority 0 ; policy drop ; }",
        "add chain inet strict plain",
        "add table inet firewalld",
        "add table bridge b",
        "add chain bridge b f { type filter hook forward priority 0 ; policy drop ; }",
    ] {
        namespace.program("nft", rule);
    }
    let obstacles = namespace.block_on(|| async {
        let firewall = LinuxFirewall::new();
        let _held = firewall.apply(&spec(&mark(1, 1))).await.unwrap();
        firewall.obstacles().await.unwrap()
    });
    let what: Vec<_> = obstacles.iter().map(|obstacle| obstacle.what.as_str()).collect();
    let expected = [
        "chain FORWARD of table ip filter",
        "chain in of table inet strict",
        "table inet firewalld",
    ];
    assert_eq!(what, expected);
    assert!(obstacles.iter().all(|obstacle| !obstacle.to_string().contains('\n')));
}

#[test]
fn a_dropped_application_leaves_nothing() {
    Namespace::new().block_on(|| async {
        let firewall = LinuxFirewall::new();
        let spec = spec(&mark(1, 6));
        for microseconds in (0..3000).step_by(100) {
            let application = firewall.apply(&spec);
            let soon = Duration::from_micros(microseconds);
            drop(tokio::time::timeout(soon, application).await);
            soon_gone(&firewall, &spec.tap).await;
        }
    });
}

#[test]
fn without_privilege_nothing_is_taken_for_gone() {
    Namespace::new().run(|| {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective = rustix::thread::CapabilitySet::empty();
        rustix::thread::set_capabilities(None, sets).unwrap();
        // The runtime's threads inherit this one's capabilities.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (firewall, mark) = (LinuxFirewall::new(), mark(1, 8));
            for refused in [
                firewall.apply(&spec(&mark)).await.map(drop),
                firewall.observe("fc-00000008").await.map(drop),
                firewall.remove("fc-00000008", &mark).await,
                firewall.list_marked(&mark.install).await.map(drop),
                firewall.obstacles().await.map(drop),
            ] {
                let refused = refused.unwrap_err();
                assert!(matches!(refused, FirewallError::NotPermitted { .. }), "{refused}");
            }
        });
    });
}

#[test]
fn a_list_is_complete_while_others_come_and_go() {
    const HELD: u32 = 150;
    let namespace = Namespace::new();
    namespace.run(|| {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
        let done = std::sync::atomic::AtomicBool::new(false);
        // Threads of the namespace's thread are in the namespace too.
        std::thread::scope(|scope| {
            let churn = async {
                let mut vm = 1_000;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    vm += 1;
                    drop(LinuxFirewall::new().apply(&spec(&mark(2, vm))).await.unwrap());
                }
                assert!(vm > 1_003);
            };
            runtime().unwrap().block_on(async {
                let (firewall, ours) = (LinuxFirewall::new(), mark(1, 0));
                let mut held = Vec::new();
                for vm in 0..HELD {
                    held.push(firewall.apply(&spec(&mark(1, vm))).await.unwrap());
                }
                let churning = scope.spawn(|| runtime().unwrap().block_on(churn));
                for _ in 0..200 {
                    let listed = firewall.list_marked(&ours.install).await.unwrap();
                    assert_eq!(listed.len(), held.len() * 2);
                }
                done.store(true, std::sync::atomic::Ordering::Relaxed);
                churning.join().unwrap();
            });
        });
    });
}

/// `cargo test -p matchlock-host --test net -- --ignored --nocapture measure`
#[test]
#[ignore = "a measurement"]
fn measure_firewalls() {
    Namespace::new().block_on(|| async {
        let firewall = LinuxFirewall::new();
        let mut held = Vec::new();
        for existing in [0, 100, 500] {
            while held.len() < existing {
                let vm = u32::try_from(held.len()).unwrap();
                held.push(firewall.apply(&spec(&mark(2, vm))).await.unwrap());
            }
            let mut times: [Vec<Duration>; 3] = Default::default();
            for _ in 0..30 {
                let mark = mark(1, 0x0bad_cafe);
                let begun = Instant::now();
                let handle = firewall.apply(&spec(&mark)).await.unwrap();
                times[0].push(begun.elapsed());
                let begun = Instant::now();
                firewall.release(handle).await.unwrap();
                times[1].push(begun.elapsed());
                let begun = Instant::now();
                firewall.list_marked(&mark.install).await.unwrap();
                times[2].push(begun.elapsed());
            }
            for (what, times) in ["apply", "release", "list"].iter().zip(&mut times) {
                times.sort();
                println!("{existing} VMs: {what}: p50 {:?}, max {:?}", times[15], times[29]);
            }
        }
    });
}

/// The kernel has room for so many chains per hook, whoever makes them.
#[test]
fn a_namespace_without_room_for_more_chains_says_so() {
    let namespace = Namespace::new();
    let hook = "type filter hook prerouting priority 0";
    let chains: String =
        (0..1_020).map(|number| format!("add chain inet full c{number} {{ {hook}; }}\n")).collect();
    let rules = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(rules.path(), format!("add table inet full\n{chains}")).unwrap();
    let path: &'static str = format!("-f {}", rules.path().display()).leak();
    namespace.program("nft", path);
    namespace.block_on(|| async {
        let mut held = Vec::new();
        let full = loop {
            let ours = mark(1, u32::try_from(held.len()).unwrap() + 1);
            match LinuxFirewall::new().apply(&spec(&ours)).await {
                Ok(handle) => held.push(handle),
                Err(error) => break error,
            }
            assert!(held.len() < 10, "there is room without end");
        };
        assert!(matches!(full, FirewallError::Full { .. }), "{full:?}");
        assert!(full.to_string().contains("about 500 VMs"), "{full}");
    });
}
