//! What a guest's ARP does to the host: nothing.

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::os::fd::AsFd;

use matchlock_host::tap::{LinuxTaps, TapSpec, Taps as _};
use matchlock_model::id::VmId;
use rustix::io::Errno;

use crate::namespace::{Namespace, mark};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 2);
/// A neighbour of the host's on another link.
const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// What each frame through a TAP has in front: nothing is offloaded.
const NO_OFFLOAD: [u8; 10] = [0; 10];
const REQUEST: u8 = 1;
const REPLY: u8 = 2;

/// `REQUEST`: who has `target`, tell `sender`. `REPLY`: `sender` is at `mac`.
fn arp(operation: u8, mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = [0xff; 6].to_vec();
    frame.extend(mac);
    // ARP; Ethernet, IPv4, their lengths, the operation.
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(mac);
    frame.extend(sender.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

/// A guest sends a frame.
fn send(tap: impl AsFd, frame: &[u8]) {
    let bytes = [&NO_OFFLOAD, frame].concat();
    assert_eq!(rustix::io::write(tap, &bytes).unwrap(), bytes.len());
}

/// The next frame that the host has for the guest.
fn receive(tap: impl AsFd) -> Option<Vec<u8>> {
    let mut buffer = [0; 2048];
    match rustix::io::read(tap, &mut buffer) {
        Ok(length) => Some(buffer[NO_OFFLOAD.len()..length].to_vec()),
        Err(Errno::AGAIN) => None,
        Err(errno) => panic!("{errno}"),
    }
}

/// Everything that a guest can say by ARP to be believed: with made-up addresses of anywhere, as
/// the host's router, as itself with another hardware address.
fn attack(tap: impl AsFd) {
    let liar = [0xAA, 0xFC, 0xFF, 0xFF, 0xFF, 0xFF];
    for number in 0..300_u16 {
        let [high, low] = number.to_be_bytes();
        for sender in [Ipv4Addr::new(10, 9, high, low), Ipv4Addr::new(192, 168, 100, low)] {
            send(&tap, &arp(REQUEST, liar, sender, GATEWAY));
        }
    }
    for sender in [GUEST, ROUTER, GATEWAY] {
        for operation in [REQUEST, REPLY] {
            send(&tap, &arp(operation, liar, sender, sender));
            send(&tap, &arp(operation, liar, sender, GATEWAY));
        }
    }
}

#[test]
fn a_guest_neither_fills_nor_poisons_the_hosts_neighbours_and_gets_no_answer() {
    let (host, router) = (Namespace::new(), Namespace::new());
    host.connect("up0", "203.0.113.1/24", &router, "eth0", "203.0.113.9/24");
    // Nobody listens there, but where it is, is known afterwards.
    let refused = host.run(|| TcpStream::connect((ROUTER, 9)).unwrap_err().kind());
    assert_eq!(refused, ErrorKind::ConnectionRefused);
    let of_router = |host: &Namespace| {
        let shown = host.ip("neigh show to 203.0.113.9");
        shown.split(" lladdr ").nth(1).expect("its address")[..17].to_owned()
    };
    let before = of_router(&host);
    let tap = host.block_on(|| async {
        // As credulous as a host can be.
        for setting in ["rp_filter", "arp_accept"] {
            for link in ["all", "default"] {
                let value = if setting == "rp_filter" { "0" } else { "1" };
                fs::write(format!("/proc/sys/net/ipv4/conf/{link}/{setting}"), value).unwrap();
            }
        }
        let mark = mark(1, 0x0bad_cafe);
        let spec = TapSpec { mark, gateway: GATEWAY, guest: GUEST, prefix: 24, mtu: 1500 };
        LinuxTaps::new().create(&spec).await.unwrap()
    });
    let own = "192.168.100.2 lladdr aa:fc:0b:ad:ca:fe PERMANENT";
    attack(tap.fd());
    let neighbours = host.ip("neigh show dev fc-0badcafe");
    assert_eq!(neighbours.lines().count(), 1);
    assert_eq!(neighbours.trim(), own);
    assert_eq!(of_router(&host), before);
    assert_eq!(receive(tap.fd()), None);

    // What the host has for its guest goes there at once: nobody is asked first.
    host.run(|| UdpSocket::bind((GATEWAY, 0)).unwrap().send_to(b"?", (GUEST, 9)).unwrap());
    let frame = receive(tap.fd()).expect("a packet");
    let vm = VmId::new(0x0bad_cafe);
    assert_eq!(frame[..14], [&vm.mac()[..], &vm.gateway_mac(), &[8, 0]].concat());

    // The same attack on a link that takes part in ARP.
    host.ip("link set fc-0badcafe arp on");
    attack(tap.fd());
    let filled = host.ip("neigh show dev fc-0badcafe").lines().count();
    assert!(filled > 300, "{filled}");
}
