//! A guest with a NIC on a TAP: a real boot, in a network namespace of the test's own.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use matchlock_host::guest_bundle::GuestBundle;
use matchlock_host::guest_link::{ExecEvent, GuestLink, LinkConnector, YamuxConnector};
use matchlock_host::hypervisor::{Hypervisor, Machine, MachineSpec, Nic, Qemu, QemuOptions, Start};
use matchlock_host::process::Spawner;
use matchlock_host::rootfs::{LinuxRootfs, Rootfs, VmPaths};
use matchlock_model::exec::{ExecSpec, ExitStatus};
use matchlock_model::guest::{GuestConfig, GuestNetwork};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::common::{DEADLINE, soon, unique_mark};

const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 2);
const MTU: u16 = 1400;

/// What is sent through the NIC in each direction: many packets, also of those that an offload
/// puts together.
const BULK_BYTES: usize = 3_000_000;

mod request {
    nix::ioctl_write_ptr_bad!(tun_set_iff, nix::request_code_write!(b'T', 202, 4), libc::ifreq);
}

/// Makes a TAP that lives as long as a descriptor of it.
fn make_tap(name: &str, vnet_header: bool) -> OwnedFd {
    let tap = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let tap = tap.expect("/dev/net/tun");
    // SAFETY: an interface request is plain data; all zeroes is one with an empty name.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in interface.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = libc::c_char::from_ne_bytes([byte]);
    }
    let header = if vnet_header { libc::IFF_VNET_HDR } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_TUN_EXCL | header;
    interface.ifr_ifru.ifru_flags =
        libc::c_short::from_ne_bytes([flags.to_ne_bytes()[0], flags.to_ne_bytes()[1]]);
    // SAFETY: the descriptor is the TUN device and the request is a valid interface request.
    unsafe { request::tun_set_iff(tap.as_raw_fd(), &interface) }.expect("TUNSETIFF");
    tap
}

/// What a command of the host's says; it must succeed.
fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().expect("a shell");
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// The files of a VM whose image is a busybox.
async fn make_spec(home: &Path, nic: Nic) -> MachineSpec {
    let cache = std::env::var_os("MATCHLOCK_TEST_CACHE").expect("MATCHLOCK_TEST_CACHE: make test");
    let bundle = GuestBundle::find_with(Path::new(&cache), None, None).expect("a guest bundle");
    let mark = unique_mark();
    let paths = VmPaths::new(&home.join("vms"), mark.vm);
    std::fs::create_dir(home.join("vms")).expect("a directory");
    let rootfs = LinuxRootfs::new();
    rootfs.create_dir(&paths).await.expect("the VM's directory");
    rootfs.create_disk(&paths, 64).await.expect("the VM's disk");
    let base_disk = home.join("base.erofs");
    sh(&format!(
        "cd '{}' && mkdir -p image/bin && cp \"$(command -v busybox)\" image/bin/ \
         && for name in sh ip ping wget cat nc md5sum; do ln -s busybox image/bin/$name; done \
         && mkfs.erofs --quiet base.erofs image",
        home.display()
    ));
    let GuestBundle { kernel, initramfs, .. } = bundle;
    MachineSpec {
        mark,
        paths,
        kernel,
        initramfs,
        base_disk,
        vcpus: 1,
        memory_mb: 256,
        nic: Some(nic),
        start: Start::default(),
    }
}

/// Runs a shell script in the guest, and says what it printed and how it ended.
async fn in_guest(link: &Arc<dyn GuestLink>, script: &str) -> (String, ExitStatus) {
    let spec = ExecSpec {
        argv: ["sh", "-c", script].map(|word| word.as_bytes().to_vec()).into(),
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: false,
        terminal: None,
        stop_signal: None,
    };
    let mut session = soon("exec", link.exec(&spec)).await.expect("it is taken");
    let mut printed = Vec::new();
    loop {
        match soon("an event", session.events.recv()).await.expect("an event").expect("a link") {
            ExecEvent::Started => {}
            ExecEvent::Output(_, data) => printed.extend_from_slice(&data),
            ExecEvent::Exited(status) => {
                return (String::from_utf8_lossy(&printed).into_owned(), status);
            }
            ExecEvent::Refused(refusal) => panic!("{script}: {refusal:?}"),
        }
    }
}

/// A guest on a TAP. The TAP is the machine's alone.
struct World {
    home: TempDir,
    machine: Arc<dyn Machine>,
    link: Arc<dyn GuestLink>,
    config: GuestConfig,
    // Held: its machines die with its spawner.
    _qemu: Qemu,
}

impl World {
    async fn new(vnet_header: bool) -> Self {
        let home = tempfile::tempdir().expect("a directory");
        let tap = make_tap("fc-test", vnet_header);
        sh(&format!(
            "ip addr add {HOST}/24 dev fc-test; ip link set lo up
             ip link set fc-test address aa:fd:0b:ad:ca:fe arp off
             ip neigh add {GUEST} lladdr aa:fc:0b:ad:ca:fe dev fc-test
             ip link set fc-test mtu {MTU} up"
        ));
        let vm = unique_mark().vm;
        let (mac, gateway_mac) = (vm.mac(), vm.gateway_mac());
        let nic = Nic { mac, mtu: MTU, tap: Arc::new(tap), firewall: None };
        let spec = make_spec(home.path(), nic).await;
        let options = QemuOptions { program: None, acceleration: None, cache: home.path().into() };
        let qemu = Qemu::new(Spawner::new().expect("a spawner"), options);
        let machine = soon("launch", qemu.launch(&spec)).await.expect("it launches");
        // Ours of the TAP is closed.
        drop(spec);
        let link = YamuxConnector.connect(&*machine, DEADLINE).await.expect("a link");
        let config = GuestConfig {
            hostname: "box".into(),
            add_hosts: Vec::new(),
            dns_servers: vec![HOST.into()],
            cpu_millis: 0,
            network: Some(GuestNetwork {
                mac,
                address: GUEST,
                prefix: 24,
                gateway: HOST,
                gateway_mac,
                mtu: MTU,
            }),
        };
        Self { home, machine, link, config, _qemu: qemu }
    }

    /// What a script in the guest prints; it must succeed.
    async fn guest(&self, script: &str) -> String {
        let (printed, status) = in_guest(&self.link, script).await;
        assert_eq!(status, ExitStatus::Code(0), "{script}: {printed}");
        printed
    }

    /// The guest's first command finds everything set up.
    async fn looks_around(&self) {
        let printed = self.guest("ip addr; ip route; cat /etc/resolv.conf").await;
        println!("{printed}");
        let expected = [
            "eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1400 ",
            "link/ether aa:fc:0b:ad:ca:fe ",
            "inet 192.168.100.2/24 brd 192.168.100.255 scope global eth0",
            "default via 192.168.100.1 dev eth0",
            "nameserver 192.168.100.1",
        ];
        for expected in expected {
            assert!(printed.contains(expected), "{expected}");
        }
        let with_ipv6 = self.guest("cat /proc/net/if_inet6").await;
        assert!(!with_ipv6.contains("eth0"), "{with_ipv6}");
    }

    /// The largest packet (28 bytes are its headers), and a lot in each direction.
    async fn talks(&self) {
        println!("{}", self.guest(&format!("ping -c1 -s1372 {HOST}")).await);
        let listener = TcpListener::bind((HOST, 0)).await.expect("a listener");
        let port = listener.local_addr().expect("its address").port();
        let bulk: Vec<u8> = (0_u32..).flat_map(u32::to_le_bytes).take(BULK_BYTES).collect();
        let copy = self.home.path().join("bulk");
        std::fs::write(&copy, &bulk).expect("a file");

        let served = async {
            let (mut stream, from) = listener.accept().await?;
            // To the empty line at its end: what is left unread would reset the connection.
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await?);
            }
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {BULK_BYTES}\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&bulk).await?;
            io::Result::Ok(from.ip())
        };
        let script = format!("wget -qO /got http://{HOST}:{port}/ && md5sum < /got");
        let (from, sum) = tokio::join!(soon("a request", served), self.guest(&script));
        assert_eq!(from.expect("it is served"), GUEST);
        assert_eq!(sum, sh(&format!("md5sum < '{}'", copy.display())));

        let served = async {
            let (mut stream, _) = listener.accept().await?;
            let mut received = Vec::new();
            stream.read_to_end(&mut received).await?;
            io::Result::Ok(received)
        };
        let script = format!("nc {HOST} {port} < /got");
        let (received, _) = tokio::join!(soon("the bulk", served), self.guest(&script));
        assert!(received.expect("it arrives") == bulk, "not what the guest has sent");
    }
}

async fn a_guest_uses_its_nic(vnet_header: bool) {
    let world = World::new(vnet_header).await;
    world.link.configure(&world.config).await.expect("it is configured");
    world.looks_around().await;
    world.talks().await;
    // Once more, as when the host has come back.
    world.link.configure(&world.config).await.expect("it is configured again");
    world.guest(&format!("ping -c1 {HOST}")).await;
    assert_eq!(world.machine.console_tail(20).expect("its console"), [""; 0]);

    // A guest that is told of another NIC than its own says so.
    let mut other = world.config.clone();
    other.network = other.network.map(|network| GuestNetwork { mac: [2; 6], ..network });
    let error = world.link.configure(&other).await.expect_err("there is no such NIC");
    assert!(error.to_string().contains("no network interface 02:02:02:02:02:02"), "{error}");

    assert!(sh("ip -o link").contains("fc-test"), "the machine holds its TAP");
    soon("kill", world.machine.kill(DEADLINE)).await.expect("it is killed");
    soon("the end of the TAP", async {
        while sh("ip -o link").contains("fc-test") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Runs a test in a new network namespace: everything that it starts is in there too. On a thread
/// of its own, as with one test thread the harness runs tests on its main thread.
fn in_a_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: a network namespace and a TAP need root");
        return;
    }
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_guest_uses_its_nic_with_offloads() {
    in_a_namespace(|| a_guest_uses_its_nic(true));
}

#[test]
fn a_guest_uses_its_nic_without_offloads() {
    in_a_namespace(|| a_guest_uses_its_nic(false));
}
