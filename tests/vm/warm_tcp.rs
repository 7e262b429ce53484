//! The secret of the TCP sequence numbers: the kernel draws it once, with its first connection, and
//! whoever knows it can guess where the connections of a guest begin.
//!
//! ```text
//!   net A ─ home A ─ guest 192.168.100.2:p ─► gateway:p ─┐ the same four numbers, so the first sequence
//!            one cache, one snapshot                     ├─ number is hash(secret, four numbers) + clock
//!   net B ─ home B ─ guest 192.168.100.2:p ─► gateway:p ─┘
//! ```

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use matchlock_test_support::netns::TestNet;
use matchlock_test_support::{Installation, Running, wait_until};
use nix::sys::socket::sockopt::TcpRepair;
use nix::sys::socket::{getsockopt, setsockopt};
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};

use super::warm::{WARM, installation};
use super::{PATIENCE, network, stderr};

sockopt_impl!(
    /// Which half of a connection under repair is asked for.
    RepairQueue,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_REPAIR_QUEUE,
    u32
);
sockopt_impl!(
    /// The sequence number that a connection under repair is at.
    QueueSeq,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_QUEUE_SEQ,
    u32
);

/// `TCP_RECV_QUEUE`: what we receive, which is what the guest sends.
const RECEIVED: u32 = 1;

/// From these to these ports of the gateway.
const PORTS: [u16; 4] = [5001, 5002, 5003, 5004];

/// How much of the difference of two numbers may be the clock's: 4 s in its ticks of 64 ns.
///
/// A guest's clock is set when it goes on, and is behind the host's by as long as that took. The host
/// looks at its own a moment after the guest has. Both are less than 2 s on a machine that boots guests
/// at all. Of two numbers that have nothing to do with each other one pair in 34 is that near (twice
/// 62.5 million of 2^32), so four at once are a false alarm in one run of 1.4 million.
const NEAR: u32 = 4 * TICKS_A_SECOND;
const TICKS_A_SECOND: u32 = 1_000_000_000 / 64;

/// A connection's first sequence number, and when it was made, in the clock's ticks of 64 ns.
type First = (u32, u32);

#[test]
fn two_vms_of_one_snapshot_do_not_share_the_secret_of_their_sequence_numbers() {
    let (net, installation) = (TestNet::new().unwrap(), installation());
    let made = network::output(&net, &installation, &["warm"]);
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    let one = connections(&net, &installation, installation.cache());
    let (other_net, other_home) = (TestNet::new().unwrap(), Installation::bare().unwrap());
    let other = connections(&other_net, &other_home, installation.cache());
    let apart: Vec<u32> = one.iter().zip(&other).map(|(one, other)| apart(*one, *other)).collect();
    assert!(apart.iter().any(|ticks| *ticks > NEAR), "one secret for two: {apart:?} ticks");
    network::assert_nothing_left(&net, &installation);
    network::assert_nothing_left(&other_net, &other_home);
}

/// How far the numbers of two connections are apart that the clock does not account for.
fn apart(one: First, other: First) -> u32 {
    let numbers = other.0.wrapping_sub(one.0);
    let clock = other.1.wrapping_sub(one.1);
    let difference = numbers.wrapping_sub(clock);
    difference.min(difference.wrapping_neg())
}

/// Starts a VM from the snapshot in the cache, which makes one connection from each port to the same
/// port of its gateway.
fn connections(net: &TestNet, home: &Installation, cache: &Path) -> Vec<First> {
    let listeners = net
        .on_host(|| {
            let listen = |port| {
                let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            };
            PORTS.map(listen).into_iter().collect::<anyhow::Result<Vec<_>>>()
        })
        .unwrap();
    // A range of one port says from where.
    let from = |port| {
        format!(
            "echo {port} {port} > /proc/sys/net/ipv4/ip_local_port_range
             nc 192.168.100.1 {port} </dev/null\n"
        )
    };
    let script = PORTS.map(from).concat();
    let args =
        ["run", "--allow-host-access", "--image", "busybox", "--", "sh", "-ec", script.as_str()];
    let mut command = network::command(net, home, &args);
    let run = Running::start(command.env("MATCHLOCK_CACHE", cache).env("MATCHLOCK_LOG", "info"));
    let run = run.unwrap();
    let firsts = listeners.iter().map(first).collect();
    let said = run.wait(PATIENCE).unwrap();
    assert_eq!(said.status.code(), Some(0), "{}", stderr(&said));
    assert!(stderr(&said).contains(WARM), "{}", stderr(&said));
    firsts
}

fn first(listener: &TcpListener) -> First {
    let mut stream = None;
    wait_until(PATIENCE, "a connection", || {
        stream = listener.accept().ok();
        Ok(stream.is_some())
    })
    .unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
    let ticks = u32::try_from(now / 64 % (1 << 32)).unwrap();
    let (stream, peer) = stream.unwrap();
    assert_eq!(
        peer.to_string(),
        format!("192.168.100.2:{}", listener.local_addr().unwrap().port())
    );
    (sequence_of_peer(&stream), ticks)
}

/// The peer's sequence number. It has sent nothing but the beginning, and perhaps the end, of the
/// connection: it is the first but for one or two.
fn sequence_of_peer(stream: &TcpStream) -> u32 {
    setsockopt(stream, TcpRepair, &1).unwrap();
    setsockopt(stream, RepairQueue, &RECEIVED).unwrap();
    let number = getsockopt(stream, QueueSeq).unwrap();
    // Otherwise the peer would not be told of the end.
    setsockopt(stream, TcpRepair, &0).unwrap();
    number
}
