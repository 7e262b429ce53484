//! What the rules do to packets: guests, the host and an internet, each a namespace.
//!
//! ```text
//!   guest  192.168.100.2 ── fc-0badcafe .1 ┐
//!   other  192.168.101.2 ── fc-0badcaff .1 ├ host ─ up0 203.0.113.1 ── 203.0.113.9 internet
//!   third  198.51.100.2 ─── fc-0badcafd .1 ┘          it has every private address as well, and
//!                                                     a route back to the guests
//! ```
//!
//! Links named like TAPs stand for them. Without a firewall everybody reaches everybody
//! ([`without_a_firewall_everything_is_reached`]), so what is refused is refused by the rules.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use matchlock_host::firewall::{Firewall as _, FirewallHandle, FirewallSpec, LinuxFirewall};
use matchlock_model::id::Mark;

use crate::firewall::spec;
use crate::namespace::{Namespace, mark};

pub(crate) const PORT: u16 = 8080;
/// A name server that the guest is given, and one that it is not.
const NAME_SERVER: &str = "10.0.0.53";
const OTHER_NAME_SERVER: &str = "10.1.1.1";
pub(crate) const INTERNET: &str = "203.0.113.9";

/// Private addresses, which lead to the "internet" here.
pub(crate) const PRIVATE: &[&str] =
    &["10.1.1.1", "172.16.5.5", "192.168.7.7", "100.64.1.1", "198.18.0.1", "192.0.0.9"];
/// What is never open. 127/8, 0/8 and multicast never leave a Linux guest's stack.
const NEVER: &[&str] = &["169.254.169.254", "240.0.0.1"];
/// The host: the guest's gateway, another guest's, and the address that the world sees.
const HOST: &[&str] = &["192.168.100.1", "192.168.101.1", "203.0.113.1"];
/// Other guests; the third one in no private range, and without tables of its own.
const GUESTS: &[&str] = &["192.168.101.2", "198.51.100.2"];

/// What came of trying to reach somebody.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The other side answered: with the address that it saw.
    Reached(String),
    /// An error came, at once.
    Refused,
    /// Nothing came.
    Silence,
}

pub(crate) struct World {
    pub(crate) host: Namespace,
    pub(crate) guest: Namespace,
    pub(crate) other: Namespace,
    third: Namespace,
    internet: Namespace,
}

/// Listens on every address of a namespace: says who called, then echoes.
fn serve(namespace: &Namespace, port: u16) {
    namespace.run(move || {
        let listener = TcpListener::bind(("::", port)).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let caller = stream.peer_addr().unwrap().ip().to_canonical();
                    if stream.write_all(format!("{caller}\n").as_bytes()).is_ok() {
                        let mut echo = stream.try_clone().unwrap();
                        drop(std::io::copy(&mut stream, &mut echo));
                    }
                });
            }
        });
    });
}

/// A name server's UDP half: says who asked.
fn serve_udp(namespace: &Namespace, address: &'static str) {
    namespace.run(move || {
        let socket = UdpSocket::bind((address, 53)).unwrap();
        std::thread::spawn(move || {
            let mut question = [0; 64];
            while let Ok((_, caller)) = socket.recv_from(&mut question) {
                drop(socket.send_to(caller.ip().to_string().as_bytes(), caller));
            }
        });
    });
}

impl World {
    pub(crate) fn new() -> Self {
        let new = Namespace::new;
        let world = Self { host: new(), guest: new(), other: new(), third: new(), internet: new() };
        for (guest, tap, subnet) in [
            (&world.guest, "fc-0badcafe", "192.168.100"),
            (&world.other, "fc-0badcaff", "192.168.101"),
            (&world.third, "fc-0badcafd", "198.51.100"),
        ] {
            let (gateway, address) = (format!("{subnet}.1/24"), format!("{subnet}.2/24"));
            world.host.connect(tap, &gateway, guest, "eth0", &address);
            guest.ip(&format!("route add default via {subnet}.1"));
            serve(guest, PORT);
        }
        world.host.connect("up0", "203.0.113.1/24", &world.internet, "eth0", "203.0.113.9/24");
        world.host.ip("route add default via 203.0.113.9");
        // So that a packet that was not masqueraded comes back too, and is seen for what it is.
        world.internet.ip("route add default via 203.0.113.1");
        for address in PRIVATE.iter().chain(NEVER).chain(&[NAME_SERVER]) {
            world.internet.ip(&format!("address add {address}/32 dev lo"));
        }
        world.host.run(|| {
            // As strict as hosts come.
            std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1").unwrap();
            assert!(LinuxFirewall::new().enable_ip_forward().unwrap());
        });
        for namespace in [&world.host, &world.internet] {
            serve(namespace, PORT);
        }
        serve(&world.internet, 53);
        serve_udp(&world.internet, NAME_SERVER);
        serve_udp(&world.internet, OTHER_NAME_SERVER);
        world
    }

    fn apply(&self, spec: FirewallSpec) -> FirewallHandle {
        self.host.block_on(|| async move { LinuxFirewall::new().apply(&spec).await.unwrap() })
    }

    /// Tables that nobody owns, so that they can be made anew.
    fn apply_plain(&self, spec: FirewallSpec) {
        let firewall = LinuxFirewall::with_plain_tables();
        drop(self.host.block_on(|| async move { firewall.apply(&spec).await.unwrap() }));
    }

    /// The tables of the guest and of the other one.
    pub(crate) fn firewalls(
        &self,
        allow_private: bool,
        allow_host_access: bool,
    ) -> [FirewallHandle; 2] {
        // The other's come first: its refusal must not be a hang for who calls it.
        let guest = Ipv4Addr::new(192, 168, 101, 2);
        let other = self.apply(FirewallSpec { guest, ..base(&mark(1, 0x0bad_caff)) });
        let allowed = FirewallSpec { allow_private, allow_host_access, ..guest_spec() };
        [self.apply(allowed), other]
    }
}

fn base(mark: &Mark) -> FirewallSpec {
    FirewallSpec { dns_servers: vec![NAME_SERVER.parse().unwrap()], ..spec(mark) }
}

fn guest_spec() -> FirewallSpec {
    base(&mark(1, 0x0bad_cafe))
}

fn classify(result: std::io::Result<String>, took: Duration) -> Outcome {
    match result {
        Ok(seen) => Outcome::Reached(seen),
        Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => {
            Outcome::Silence
        }
        Err(error) => {
            assert!(took < Duration::from_secs(1), "{error} only after {took:?}");
            Outcome::Refused
        }
    }
}

/// How long nothing must come to be silence; a retransmission comes after one second.
const PATIENCE: Duration = Duration::from_millis(2500);

fn greeting(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut seen = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
        seen.extend(byte);
    }
    Ok(String::from_utf8_lossy(&seen).trim().to_owned())
}

/// Connects by TCP.
pub(crate) fn call(from: &Namespace, to: &str, port: u16) -> Outcome {
    let to = SocketAddr::new(to.parse().unwrap(), port);
    from.run(move || {
        let begun = Instant::now();
        let connected = TcpStream::connect_timeout(&to, PATIENCE);
        classify(connected.and_then(|mut stream| greeting(&mut stream)), begun.elapsed())
    })
}

/// Asks by UDP.
fn ask(from: &Namespace, to: &str, port: u16) -> Outcome {
    let to = SocketAddr::new(to.parse().unwrap(), port);
    from.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect(to).unwrap();
        let begun = Instant::now();
        let mut answer = [0; 64];
        let answered = socket.send(b"?").and_then(|_| socket.recv(&mut answer));
        let text = answered.map(|length| String::from_utf8_lossy(&answer[..length]).into_owned());
        classify(text, begun.elapsed())
    })
}

/// Connects from another source address than the route's.
fn call_from_address(from: &Namespace, source: &str, to: &str) -> Outcome {
    use rustix::net::{AddressFamily, SocketAddrV4, SocketType, bind, connect, socket, sockopt};
    let source: Ipv4Addr = source.parse().unwrap();
    let to: Ipv4Addr = to.parse().unwrap();
    from.run(move || {
        let begun = Instant::now();
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&socket, &SocketAddrV4::new(source, 0)).unwrap();
        // A blocking connect obeys the time-out for sending.
        sockopt::set_socket_timeout(socket.as_fd(), sockopt::Timeout::Send, Some(PATIENCE))
            .unwrap();
        let result = match connect(&socket, &SocketAddrV4::new(to, PORT)) {
            Err(rustix::io::Errno::INPROGRESS) => Err(ErrorKind::TimedOut.into()),
            result => result.map_err(Into::into),
        };
        let greeted = result.and_then(|()| greeting(&mut TcpStream::from(socket)));
        classify(greeted, begun.elapsed())
    })
}

pub(crate) fn all(from: &Namespace, to: &[&[&str]], expected: &Outcome) {
    for address in to.concat() {
        assert_eq!(call(from, address, PORT), *expected, "{address}");
    }
}

fn reached(seen: &str) -> Outcome {
    Outcome::Reached(seen.to_owned())
}

/// What the internet sees of a guest.
pub(crate) fn masqueraded() -> Outcome {
    reached("203.0.113.1")
}

#[test]
fn without_a_firewall_everything_is_reached() {
    let world = World::new();
    let as_itself = reached("192.168.100.2");
    all(&world.guest, &[&[INTERNET], PRIVATE, NEVER, HOST, GUESTS], &as_itself);
    assert_eq!(ask(&world.guest, OTHER_NAME_SERVER, 53), as_itself);
    world.guest.ip("address add 192.168.100.3/24 dev eth0");
    let spoofed = call_from_address(&world.guest, "192.168.100.3", INTERNET);
    assert_eq!(spoofed, reached("192.168.100.3"));
    assert_eq!(call(&world.internet, "192.168.100.2", PORT), reached("203.0.113.9"));
    assert_eq!(call(&world.host, "192.168.100.2", PORT), reached("192.168.100.1"));
}

#[test]
fn a_guest_reaches_the_internet_and_its_name_servers_only() {
    let world = World::new();
    let _held = world.firewalls(false, false);
    assert_eq!(call(&world.guest, INTERNET, PORT), masqueraded());
    all(&world.guest, &[PRIVATE, NEVER, HOST, GUESTS], &Outcome::Refused);

    assert_eq!(ask(&world.guest, NAME_SERVER, 53), masqueraded());
    assert_eq!(call(&world.guest, NAME_SERVER, 53), masqueraded());
    assert_eq!(call(&world.guest, NAME_SERVER, PORT), Outcome::Refused);
    assert_eq!(call(&world.guest, OTHER_NAME_SERVER, 53), Outcome::Refused);
    // UDP is refused by ICMP.
    assert_eq!(ask(&world.guest, OTHER_NAME_SERVER, 53), Outcome::Refused);
    assert_eq!(ask(&world.guest, "192.168.100.1", 53), Outcome::Refused);

    // Both at once.
    assert_eq!(call(&world.other, INTERNET, PORT), masqueraded());
    assert_eq!(call(&world.other, "192.168.100.2", PORT), Outcome::Refused);
}

#[test]
fn nobody_reaches_a_guest() {
    let world = World::new();
    let _held = world.firewalls(true, true);
    assert_eq!(call(&world.internet, "192.168.100.2", PORT), Outcome::Refused);
    assert_eq!(call(&world.host, "192.168.100.2", PORT), Outcome::Refused);
    assert_eq!(call(&world.third, "192.168.100.2", PORT), Outcome::Refused);
}

#[test]
fn each_permission_opens_what_it_says_and_nothing_else() {
    let world = World::new();
    let held = world.firewalls(true, false);
    all(&world.guest, &[&[INTERNET], PRIVATE], &masqueraded());
    all(&world.guest, &[NEVER, HOST, GUESTS], &Outcome::Refused);
    world.host.block_on(|| async move {
        for handle in held {
            LinuxFirewall::new().release(handle).await.unwrap();
        }
    });

    let _held = world.firewalls(false, true);
    all(&world.guest, &[HOST], &reached("192.168.100.2"));
    assert_eq!(call(&world.guest, INTERNET, PORT), masqueraded());
    all(&world.guest, &[PRIVATE, NEVER, GUESTS], &Outcome::Refused);
}

#[test]
fn spoofed_sources_and_ipv6_are_dropped() {
    let world = World::new();
    world.guest.ip("address add 192.168.100.3/24 dev eth0");
    world.host.ip("address add fd00::1/64 dev fc-0badcafe nodad");
    world.guest.ip("address add fd00::2/64 dev eth0 nodad");
    assert_eq!(call(&world.guest, "fd00::1", PORT), reached("fd00::2"));
    let _held = world.firewalls(true, true);
    let spoofed = call_from_address(&world.guest, "192.168.100.3", INTERNET);
    assert_eq!(spoofed, Outcome::Silence);
    let spoofed = call_from_address(&world.guest, "192.168.100.3", "192.168.100.1");
    assert_eq!(spoofed, Outcome::Silence);
    assert_eq!(call(&world.guest, "fd00::1", PORT), Outcome::Silence);
    assert_eq!(call(&world.guest, INTERNET, PORT), masqueraded());
}

#[test]
fn other_rules_of_the_host_do_not_lead_around_ours() {
    let world = World::new();
    for rule in [
        "add table ip around",
        "add chain ip around pre { type nat hook prerouting priority dstnat ; }",
        // A metadata service behind the host, and a published port of a container.
        "add rule ip around pre ip daddr 169.254.169.254 dnat to 203.0.113.1",
        "add rule ip around pre ip daddr 203.0.113.1 tcp dport 8081 dnat to 10.1.1.1:8080",
    ] {
        world.host.program("nft", rule);
    }
    let published = |world: &World| call(&world.guest, "203.0.113.1", 8081);
    assert_eq!(published(&world), reached("192.168.100.2"));
    all(&world.guest, &[&["169.254.169.254"]], &reached("192.168.100.2"));
    let _held = world.firewalls(false, true);
    all(&world.guest, &[NEVER, PRIVATE], &Outcome::Refused);
    assert_eq!(published(&world), Outcome::Refused);
}

#[test]
fn what_is_forbidden_later_ends_what_was_allowed_before() {
    let world = World::new();
    // Plain tables: those with an owner are as they were made for all their life.
    let allowed = FirewallSpec { allow_private: true, ..guest_spec() };
    world.apply_plain(allowed);
    let private = SocketAddr::new(PRIVATE[0].parse().unwrap(), PORT);
    let mut stream = world.guest.run(move || {
        let mut stream = TcpStream::connect_timeout(&private, PATIENCE).unwrap();
        assert_eq!(greeting(&mut stream).unwrap(), "203.0.113.1");
        stream.write_all(b"still there?\n").unwrap();
        assert_eq!(greeting(&mut stream).unwrap(), "still there?");
        stream
    });
    world.apply_plain(guest_spec());
    let ended = world.guest.run(move || {
        // A late acknowledgement may have been refused before anything is written.
        let answer = stream.write_all(b"and now?\n").and_then(|()| greeting(&mut stream));
        answer.unwrap_err().kind()
    });
    assert_eq!(ended, ErrorKind::ConnectionReset);
}
