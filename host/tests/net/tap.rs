//! TAPs: one suite for the real ones and the fake, and what only real ones can do.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use matchlock_host::fault::Fault;
use matchlock_host::tap::{
    FakeTaps, HostSubnet, LinuxTaps, ObservedTap, SubnetUse, TapError, TapHandle, TapOp, TapSpec,
    Taps, tap_name,
};
use matchlock_model::id::{InstallId, Mark};

use crate::namespace::{Namespace, mark};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 2);

fn spec(mark: &Mark) -> TapSpec {
    TapSpec { mark: mark.clone(), gateway: GATEWAY, guest: GUEST, prefix: 24, mtu: 1400 }
}

/// Waits until a link is gone. A program that another test starts just now holds copies of our
/// descriptors until its exec.
async fn soon_gone(taps: &dyn Taps, name: &str) {
    let begun = Instant::now();
    while taps.observe(name).await.unwrap().is_some() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{name} stays");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What every implementation must do.
async fn taps_conform(taps: &dyn Taps) {
    let (ours, theirs) = (mark(1, 0x0bad_cafe), mark(2, 0x0bad_caff));
    let name = tap_name(ours.vm);
    assert_eq!(name, "fc-0badcafe");
    assert_eq!(taps.observe(&name).await.unwrap(), None);
    assert_eq!(taps.list_marked(&ours.install).await.unwrap(), []);
    taps.remove(&name, &ours).await.unwrap();

    // Made as asked.
    let handle = taps.create(&spec(&ours)).await.unwrap();
    let index = handle.index();
    assert_eq!(handle.name(), name);
    let expected = ObservedTap {
        name: name.clone(),
        index,
        alias: Some(ours.to_string()),
        mark: Some(ours.clone()),
        mtu: 1400,
        addresses: vec![(GATEWAY, 24)],
        up: true,
        arp: false,
    };
    assert_eq!(taps.observe(&name).await.unwrap(), Some(expected.clone()));
    let occupied = taps.host_subnets().await.unwrap();
    for used_by in [SubnetUse::Address, SubnetUse::Route] {
        let network = Ipv4Addr::new(192, 168, 100, 0);
        let subnet = HostSubnet { network, prefix: 24, used_by, link: Some(name.clone()) };
        assert!(occupied.contains(&subnet), "{occupied:?}");
    }

    // Another installation neither sees it nor harms it.
    let (gateway, guest) = (Ipv4Addr::new(10, 9, 8, 1), Ipv4Addr::new(10, 9, 8, 2));
    let other = TapSpec { gateway, guest, prefix: 30, ..spec(&theirs) };
    let their_handle = taps.create(&other).await.unwrap();
    assert_eq!(taps.list_marked(&ours.install).await.unwrap(), std::slice::from_ref(&expected));
    assert_eq!(taps.list_marked(&theirs.install).await.unwrap().len(), 1);
    assert_eq!(taps.list_marked(&InstallId::from_bytes([9; 8])).await.unwrap(), []);
    let alike = taps.list_alike().await.unwrap();
    let mut marks: Vec<_> = alike.into_iter().filter_map(|tap| tap.mark).collect();
    marks.sort_by_key(|mark| mark.vm);
    assert_eq!(marks, [ours.clone(), theirs.clone()], "of all installations, and no other link");
    let impostor = Mark { install: theirs.install.clone(), vm: ours.vm };
    let refused = taps.remove(&name, &impostor).await.unwrap_err();
    assert!(matches!(refused, TapError::NotOurs { .. }), "{refused}");

    // A name is taken once, and what has it is not disturbed.
    for taken in [&ours, &impostor] {
        let refused = taps.create(&spec(taken)).await.unwrap_err();
        let expected = Some(ours.to_string());
        assert!(
            matches!(&refused, TapError::AlreadyExists { alias, .. } if *alias == expected),
            "{refused}"
        );
    }
    assert_eq!(taps.observe(&name).await.unwrap(), Some(expected));

    // Removed, descriptor or not; twice is as good as once.
    for _ in 0..2 {
        taps.remove(&name, &ours).await.unwrap();
        assert_eq!(taps.observe(&name).await.unwrap(), None);
    }
    drop(handle);

    // The dead-man's switch: the last descriptor takes it along.
    let handle = taps.create(&spec(&ours)).await.unwrap();
    drop(handle);
    soon_gone(taps, &name).await;
    let fd: OwnedFd = taps.create(&spec(&ours)).await.map(TapHandle::into_fd).unwrap();
    let copy = fd.try_clone().unwrap();
    drop(fd);
    assert!(taps.observe(&name).await.unwrap().is_some());
    drop(copy);
    soon_gone(taps, &name).await;
    drop(their_handle);
    soon_gone(taps, &tap_name(theirs.vm)).await;
    assert_eq!(taps.list_marked(&theirs.install).await.unwrap(), []);
}

#[test]
fn the_real_taps_conform() {
    Namespace::new().block_on(|| async { taps_conform(&LinuxTaps::new()).await });
}

#[tokio::test]
async fn the_fake_taps_conform() {
    let fake = FakeTaps::new();
    taps_conform(&fake).await;
    assert_eq!(fake.existing(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn the_fake_does_what_a_test_asks_of_it() {
    let fake = FakeTaps::new();
    let mark = mark(1, 7);
    fake.set_fault(TapOp::Create, Some(Fault::Fails));
    fake.create(&spec(&mark)).await.unwrap_err();
    assert_eq!(fake.existing(), Vec::<String>::new());
    fake.set_fault(TapOp::Create, Some(Fault::Late(Duration::from_secs(5))));
    let begun = tokio::time::Instant::now();
    let handle = fake.create(&spec(&mark)).await.unwrap();
    assert_eq!(begun.elapsed(), Duration::from_secs(5));
    fake.set_fault(TapOp::Remove, Some(Fault::FailsAfterwards));
    fake.remove(handle.name(), &mark).await.unwrap_err();
    assert_eq!(fake.existing(), Vec::<String>::new());
    fake.set_fault(TapOp::Observe, Some(Fault::Never));
    let never = tokio::time::timeout(Duration::from_secs(9), fake.observe("fc-00000007"));
    never.await.unwrap_err();
    assert_eq!(fake.calls(), [TapOp::Create, TapOp::Create, TapOp::Remove, TapOp::Observe]);

    fake.add_link("fc-00000007", Some(&mark.to_string()), &[(GATEWAY, 24)]);
    fake.set_fault(TapOp::Create, None);
    assert!(matches!(fake.create(&spec(&mark)).await, Err(TapError::AlreadyExists { .. })));
    fake.add_route(Ipv4Addr::new(10, 1, 2, 3), 8, "eth0");
    let subnets: Vec<_> =
        fake.host_subnets().await.unwrap().iter().map(|s| s.to_string()).collect();
    assert!(subnets.contains(&"the route to 10.0.0.0/8 of eth0".to_owned()), "{subnets:?}");
}

#[test]
fn a_tap_speaks_no_ipv6() {
    Namespace::new().block_on(|| async {
        let handle = LinuxTaps::new().create(&spec(&mark(1, 3))).await.unwrap();
        // Of this thread's namespace, like everything here.
        let path = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", handle.name());
        assert_eq!(std::fs::read_to_string(path).unwrap(), "1\n");
    });
}

#[test]
fn links_of_others_are_told_apart_and_left_alone() {
    let namespace = Namespace::new();
    // A look-alike TAP without a mark, one with a mark that is none, a link of another kind.
    namespace.ip("tuntap add fc-00000001 mode tap");
    namespace.ip("tuntap add fc-00000002 mode tap");
    namespace.ip("link set fc-00000002 alias matchlock:0101010101010101:vm-00000002x");
    namespace.ip("link add fc-00000003 type veth peer name other");
    // Found by the kernel when asked for the name, but another link.
    namespace.ip("link property add dev other altname fc-00000004");
    namespace.block_on(|| async {
        let taps = LinuxTaps::new();
        for vm in 1..=3 {
            let mark = mark(1, vm);
            let refused = taps.create(&spec(&mark)).await.unwrap_err();
            assert!(matches!(refused, TapError::AlreadyExists { .. }), "{vm}: {refused}");
            let refused = taps.remove(&tap_name(mark.vm), &mark).await.unwrap_err();
            assert!(matches!(refused, TapError::NotOurs { .. }), "{vm}: {refused}");
            assert!(taps.observe(&tap_name(mark.vm)).await.unwrap().is_some());
        }
        assert_eq!(taps.observe("fc-00000004").await.unwrap(), None);
        taps.remove("fc-00000004", &mark(1, 4)).await.unwrap();
        assert!(taps.create(&spec(&mark(1, 4))).await.is_err());
        assert_eq!(taps.list_marked(&mark(1, 1).install).await.unwrap(), []);
    });
}

#[test]
fn a_tap_lives_as_long_as_the_process_that_it_was_handed_to() {
    Namespace::new().block_on(|| async {
        let taps = LinuxTaps::new();
        let handle = taps.create(&spec(&mark(1, 5))).await.unwrap();
        let name = handle.name().to_owned();
        rustix::io::fcntl_setfd(handle.fd(), rustix::io::FdFlags::empty()).unwrap();
        let mut hypervisor =
            Command::new("/bin/cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        drop(handle);
        assert!(taps.observe(&name).await.unwrap().is_some());
        hypervisor.kill().unwrap();
        hypervisor.wait().unwrap();
        soon_gone(&taps, &name).await;
    });
}

#[test]
fn a_dropped_creation_leaves_nothing() {
    Namespace::new().block_on(|| async {
        let taps = LinuxTaps::new();
        let mark = mark(1, 6);
        let mut completed = 0;
        for steps in 1..100 {
            let spec = spec(&mark);
            let mut creation = Box::pin(taps.create(&spec));
            for _ in 0..steps {
                tokio::select! {
                    biased;
                    made = &mut creation => {
                        made.unwrap();
                        completed += 1;
                        break;
                    }
                    () = tokio::task::yield_now() => {}
                }
            }
            drop(creation);
            soon_gone(&taps, "fc-00000006").await;
        }
        assert!((1..99).contains(&completed), "{completed}");
    });
}

#[test]
fn everything_that_the_host_uses_is_known() {
    let namespace = Namespace::new();
    namespace.ip("link add up0 type veth peer name up1");
    namespace.ip("address add 203.0.113.7/24 dev up0");
    namespace.ip("address add 10.77.0.1 peer 10.88.0.1/32 dev up0");
    namespace.ip("link set up0 up");
    namespace.ip("link set up1 up");
    namespace.ip("route add default via 203.0.113.1");
    namespace.ip("route add 0.0.0.0/1 dev up0");
    namespace.ip("route add 128.0.0.0/1 dev up0");
    namespace.ip("route add 172.20.0.0/14 via 203.0.113.1 table 77");
    namespace.ip("route add blackhole 192.168.200.0/23");
    let subnets = namespace.block_on(|| async { LinuxTaps::new().host_subnets().await.unwrap() });
    let shown: Vec<_> = subnets.iter().map(ToString::to_string).collect();
    for expected in [
        "the address in 127.0.0.0/8 of lo",
        "the address in 203.0.113.0/24 of up0",
        "the address in 10.77.0.1/32 of up0",
        "the address in 10.88.0.1/32 of up0",
        "the route to 203.0.113.0/24 of up0",
        "the route to 172.20.0.0/14 of up0",
        "the route to 192.168.200.0/23",
        "the route to 127.0.0.0/8 of lo",
    ] {
        assert!(shown.contains(&expected.to_owned()), "{expected}: {shown:#?}");
    }
    assert!(subnets.iter().all(|subnet| subnet.prefix > 1), "{shown:#?}");
}

#[test]
fn without_privilege_the_error_says_what_to_do() {
    Namespace::new().block_on(|| async {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective = rustix::thread::CapabilitySet::empty();
        rustix::thread::set_capabilities(None, sets).unwrap();
        let refused = LinuxTaps::new().create(&spec(&mark(1, 8))).await.unwrap_err();
        assert!(matches!(refused, TapError::NotPermitted { .. }), "{refused}");
        assert!(refused.to_string().contains("--no-network"), "{refused}");
        // Looking needs none.
        assert_eq!(LinuxTaps::new().observe("fc-00000008").await.unwrap(), None);
    });
}

/// `cargo test -p matchlock-host --test net -- --ignored --nocapture measure`
#[test]
#[ignore = "a measurement"]
fn measure_taps() {
    Namespace::new().block_on(|| async {
        let taps = LinuxTaps::new();
        let mut held = Vec::new();
        for existing in [0, 100, 500] {
            while held.len() < existing {
                let vm = u32::try_from(held.len()).unwrap();
                held.push(taps.create(&spec(&mark(2, vm))).await.unwrap());
            }
            let mut times: [Vec<Duration>; 4] = Default::default();
            for _ in 0..30 {
                let mark = mark(1, 0x0bad_cafe);
                let name = tap_name(mark.vm);
                let begun = Instant::now();
                let handle = taps.create(&spec(&mark)).await.unwrap();
                times[0].push(begun.elapsed());
                let begun = Instant::now();
                taps.remove(&name, &mark).await.unwrap();
                times[1].push(begun.elapsed());
                drop(handle);
                let handle = taps.create(&spec(&mark)).await.unwrap();
                let begun = Instant::now();
                drop(handle);
                times[2].push(begun.elapsed());
                let begun = Instant::now();
                taps.host_subnets().await.unwrap();
                times[3].push(begun.elapsed());
            }
            for (what, times) in
                ["create", "remove", "close", "host_subnets"].iter().zip(&mut times)
            {
                times.sort();
                println!("{existing} TAPs: {what}: p50 {:?}, max {:?}", times[15], times[29]);
            }
        }
    });
}
