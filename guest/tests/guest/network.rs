//! The network that a configuration sets up, in network namespaces of the tests' own.

use std::process::Command;
use std::time::{Duration, Instant};

use matchlock_guest::boot::console::chain;
use matchlock_guest::network::{self, NetworkError, PATIENCE};
use matchlock_wire::message::Network;
use nix::sched::{CloneFlags, unshare};

const NETWORK: Network = Network {
    mac: [0xAA, 0xFC, 0x0B, 0xAD, 0xCA, 0xFE],
    address: std::net::Ipv4Addr::new(10, 64, 0, 6),
    prefix: 30,
    gateway: std::net::Ipv4Addr::new(10, 64, 0, 5),
    gateway_mac: [0xAA, 0xFD, 0x0B, 0xAD, 0xCA, 0xFE],
    mtu: 1400,
};

/// Runs a test in a new network namespace. On a thread of its own: with one test thread the
/// harness runs tests on its main thread.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (needs root)");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// What a command says; it must succeed.
fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A NIC whose cable is plugged in.
const NIC: &str = "ip link add odd0 address aa:fc:0b:ad:ca:fe type veth peer name far0 \
                   && ip link set far0 up";

#[test]
fn a_network_is_set_up_once_and_again() {
    in_a_namespace(|| {
        sh("ip link add aaa0 type veth peer name bbb0");
        sh(NIC);
        // An interface that is up cannot be renamed.
        sh("ip link set odd0 up");
        let mut routes = Vec::new();
        for _ in 0..2 {
            network::set_up(&NETWORK, PATIENCE).unwrap();
            let link = sh("ip -o link show eth0");
            assert!(link.contains("mtu 1400") && link.contains(",UP"), "{link}");
            let addresses = sh("ip -o addr show eth0");
            assert_eq!(addresses.lines().count(), 1, "{addresses}");
            let expected = "inet 10.64.0.6/30 brd 10.64.0.7 scope global eth0";
            assert!(addresses.contains(expected), "{addresses}");
            assert_eq!(sh("cat /proc/sys/net/ipv6/conf/eth0/disable_ipv6"), "1\n");
            // The gateway answers no ARP, and needs none.
            let expected = "10.64.0.5 lladdr aa:fd:0b:ad:ca:fe PERMANENT";
            assert_eq!(sh("ip neigh show dev eth0").trim(), expected);
            routes.push(sh("ip route"));
        }
        assert_eq!(routes[0], routes[1]);
        assert!(routes[0].starts_with("default via 10.64.0.5 dev eth0 "), "{}", routes[0]);
        assert_eq!(routes[0].lines().count(), 2, "{}", routes[0]);
        // Another interface that takes the same address, as what is stacked on a NIC does, is
        // not the NIC, though it is listed first.
        sh("ip link set aaa0 address aa:fc:0b:ad:ca:fe");
        network::set_up(&NETWORK, PATIENCE).unwrap();
        assert_eq!(sh("ip -o addr show aaa0"), "");
    });
}

#[test]
fn a_network_without_a_broadcast_address() {
    in_a_namespace(|| {
        sh(NIC);
        let network = Network { prefix: 31, gateway: [10, 64, 0, 7].into(), ..NETWORK };
        network::set_up(&network, PATIENCE).unwrap();
        let addresses = sh("ip -o addr show eth0");
        assert!(addresses.contains("inet 10.64.0.6/31 scope global"), "{addresses}");
    });
}

#[test]
fn an_interface_that_comes_late_is_awaited() {
    in_a_namespace(|| {
        // Not before the wait has begun, unless this machine is very slow; then it proves less.
        let mut late =
            Command::new("sh").args(["-ec", &format!("sleep 0.3; {NIC}")]).spawn().unwrap();
        let begun = Instant::now();
        network::set_up(&NETWORK, Duration::from_secs(60)).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(30), "its coming was not noticed");
        assert!(late.wait().unwrap().success());
    });
}

#[test]
fn a_missing_interface_is_named_and_so_is_a_step_that_fails() {
    in_a_namespace(|| {
        let error = network::set_up(&NETWORK, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, NetworkError::NoInterface { .. }), "{error:?}");
        let expected = "there is no network interface aa:fc:0b:ad:ca:fe after 20ms: the machine \
                        has no such NIC, or the kernel no driver (virtio_net)";
        assert_eq!(error.to_string(), expected);

        sh(NIC);
        let bad = Network { prefix: 33, ..NETWORK };
        let error = network::set_up(&bad, PATIENCE).unwrap_err();
        let text = chain(&error);
        assert!(text.starts_with("cannot give eth0 the address 10.64.0.6/33: "), "{text}");
        let bad = Network { mtu: 0, ..NETWORK };
        let text = chain(&network::set_up(&bad, PATIENCE).unwrap_err());
        assert!(text.starts_with("cannot set the MTU of eth0 to 0 bytes: "), "{text}");
        let bad = Network { gateway: [192, 0, 2, 1].into(), ..NETWORK };
        let text = chain(&network::set_up(&bad, PATIENCE).unwrap_err());
        assert!(text.starts_with("cannot send everything through 192.0.2.1: "), "{text}");
    });
}
