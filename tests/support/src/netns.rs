//! Two network namespaces of a test's own: a host for VMs, and the internet that it is connected to.
//!
//! ```text
//!  VM ─ fc-… ─ [ host: up0 203.0.113.1 ] ── veth ── [ inet0 203.0.113.2: the internet, 8.8.8.8, … ]
//! ```
//!
//! Each namespace is kept by a process that dies with the thread that made it, so nothing of them
//! outlives a test, however it ends.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The host's address on the way to the internet.
pub const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The internet's end of that way.
pub const INTERNET: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// A public server.
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
/// Private, special and shared addresses that all answer in the internet namespace.
pub const FORBIDDEN: [Ipv4Addr; 5] = [
    Ipv4Addr::new(10, 1, 2, 3),
    Ipv4Addr::new(172, 16, 0, 9),
    Ipv4Addr::new(192, 168, 7, 7),
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(100, 64, 0, 9),
];

/// A namespace, kept by a process.
#[derive(Debug)]
pub struct Namespace(Child);

impl Namespace {
    /// A new one, with nothing in it; it goes with the thread that made it.
    ///
    /// # Errors
    /// When it cannot be made: it takes root.
    pub fn new() -> Result<Self> {
        let mut keeper = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "-n", "sh", "-c", "echo; exec sleep 100000"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("setpriv")?;
        // A line tells that it is in its namespace.
        let mut line = String::new();
        let stdout = keeper.stdout.take().context("its output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(!line.is_empty(), "no network namespace could be made: run the tests as root");
        Ok(Self(keeper))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    /// A command in the namespace.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg("--net").arg("--target").arg(self.pid().to_string()).arg("--").arg(program);
        command
    }

    /// Runs a script in it; what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.command("sh").args(["-ec", script]).output()?;
        if !output.status.success() {
            bail!("{script}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait().map(drop)) {
            eprintln!("could not end the keeper of a network namespace: {error}");
        }
    }
}

/// A host for VMs and the internet that it is connected to.
#[derive(Debug)]
pub struct TestNet {
    host: Namespace,
    internet: Namespace,
    peers: Arc<Mutex<Vec<IpAddr>>>,
    uploads: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl TestNet {
    /// A host that reaches the internet, with strict reverse-path filtering, and servers there: on
    /// every address, port 80 tells who asked (HTTP) and port 81 sends as many megabytes as one byte
    /// asks for, port 82 takes whatever comes; port 53 of [`PUBLIC`] and the first of [`FORBIDDEN`] answers that every name is
    /// [`PUBLIC`].
    ///
    /// # Errors
    /// When the namespaces cannot be made: it takes root.
    pub fn new() -> Result<Self> {
        let (host, internet) = (Namespace::new()?, Namespace::new()?);
        host.sh(&format!(
            "ip link set lo up
             ip link add up0 type veth peer name inet0 netns {}
             ip addr add {HOST}/24 dev up0; ip link set up0 up; ip route add default via {INTERNET}
             for conf in all default up0; do echo 1 > /proc/sys/net/ipv4/conf/$conf/rp_filter; done
             # As on a host where nothing was run yet; a new namespace has what the first one has.
             echo 0 > /proc/sys/net/ipv4/ip_forward",
            internet.pid()
        ))?;
        let others: String =
            FORBIDDEN.iter().map(|address| format!("ip addr add {address}/32 dev lo\n")).collect();
        internet.sh(&format!(
            "ip addr add {INTERNET}/24 dev inet0; ip link set inet0 up; ip link set lo up
             ip addr add {PUBLIC}/32 dev lo\n{others}"
        ))?;
        let net = Self { host, internet, peers: Arc::default(), uploads: Arc::default() };
        net.serve()?;
        Ok(net)
    }

    /// A command on the host.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        self.host.command(program)
    }

    /// Runs a script on the host; what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.host.sh(script)
    }

    /// Takes connections on a port of all of the host's addresses, and ends each at once.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub fn listen_on_host(&self, port: u16) -> Result<()> {
        let listener = in_namespace(&self.host, move || {
            Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?)
        })?;
        std::thread::spawn(move || {
            let ended = listener.incoming().try_for_each(|stream| stream.map(drop));
            end_of("host's", ended.map_err(Into::into));
        });
        Ok(())
    }

    /// Makes something on the host, a socket for example; it stays there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn on_host<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        in_namespace(&self.host, make)
    }

    /// Counts from now on the packets to each of these addresses that come to the internet.
    ///
    /// # Errors
    /// When they cannot be counted.
    pub fn count_arrivals(&self, addresses: &[Ipv4Addr]) -> Result<()> {
        let mut rules = "add table ip count
             add chain ip count arrivals { type filter hook prerouting priority raw; }\n"
            .to_owned();
        for address in addresses {
            rules += &format!("add rule ip count arrivals ip daddr {address} counter\n");
        }
        self.internet.sh(&format!("nft '{rules}'")).map(drop)
    }

    /// How many packets came to each of the counted addresses.
    ///
    /// # Errors
    /// When they were not counted.
    pub fn arrivals(&self) -> Result<Vec<u64>> {
        let shown = self.internet.sh("nft list chain ip count arrivals")?;
        let after = shown.split("counter packets ").skip(1);
        let numbers = after.map(|rest| rest.split(' ').next().unwrap_or_default().parse());
        Ok(numbers.collect::<Result<_, _>>()?)
    }

    /// Who asked the servers, in order.
    #[must_use]
    pub fn peers(&self) -> Vec<IpAddr> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was sent to port 82, one for each connection.
    #[must_use]
    pub fn uploads(&self) -> Vec<Vec<u8>> {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The TAPs and the tables of VMs on the host.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn links_and_tables(&self) -> Result<Vec<String>> {
        let said = self.sh(
            "ip -o link | grep -o 'fc-[0-9a-f]*' || true; nft list tables | grep matchlock || true",
        )?;
        Ok(said.lines().map(str::to_owned).collect())
    }

    /// The sockets are made in the internet namespace, and stay in it.
    fn serve(&self) -> Result<()> {
        let (web, bulk, sink, dns) = in_namespace(&self.internet, || {
            let any = Ipv4Addr::UNSPECIFIED;
            let [web, bulk, sink] = [80, 81, 82].map(|port| TcpListener::bind((any, port)));
            // An answer comes from the address that was asked.
            let dns = [PUBLIC, FORBIDDEN[0]].map(|address| UdpSocket::bind((address, 53)));
            Ok((web?, bulk?, sink?, dns))
        })?;
        let peers = Arc::clone(&self.peers);
        std::thread::spawn(move || end_of("web", answer_web(&web, &peers)));
        std::thread::spawn(move || end_of("bulk", send_bulk(&bulk)));
        let uploads = Arc::clone(&self.uploads);
        std::thread::spawn(move || end_of("upload", take_uploads(&sink, &uploads)));
        for socket in dns {
            let socket = socket?;
            std::thread::spawn(move || end_of("dns", answer_dns(&socket)));
        }
        Ok(())
    }
}

/// Makes something in a namespace, on a thread that goes there and ends.
pub(crate) fn in_namespace<T: Send + 'static>(
    namespace: &Namespace,
    make: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let namespace = File::open(format!("/proc/{}/ns/net", namespace.pid()))?;
    let made = std::thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        make()
    });
    made.join().map_err(|_| anyhow::anyhow!("a thread of the test panicked"))?
}

/// A server that fails makes its test fail; this says why.
fn end_of(name: &str, result: Result<()>) {
    if let Err(error) = result {
        eprintln!("the test's {name} server: {error:#}");
    }
}

fn answer_web(listener: &TcpListener, peers: &Mutex<Vec<IpAddr>>) -> Result<()> {
    for stream in listener.incoming() {
        let mut stream = stream?;
        let peer = stream.peer_addr()?.ip();
        peers.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
        let body = format!("peer {peer}\n");
        // Who only connects and goes is counted all the same.
        if stream.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            if let Err(error) = stream.write_all((head + &body).as_bytes()) {
                eprintln!("the test's web server lost {peer}: {error}");
            }
        }
    }
    Ok(())
}

/// The megabyte that is sent again and again.
#[must_use]
pub fn megabyte() -> Vec<u8> {
    (0..1_u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

fn send_bulk(listener: &TcpListener) -> Result<()> {
    let megabyte = megabyte();
    for stream in listener.incoming() {
        let mut stream = stream?;
        let mut count = [0];
        stream.read_exact(&mut count)?;
        for _ in 0..count[0] {
            stream.write_all(&megabyte)?;
        }
    }
    Ok(())
}

fn take_uploads(listener: &TcpListener, uploads: &Mutex<Vec<Vec<u8>>>) -> Result<()> {
    for stream in listener.incoming() {
        let mut bytes = Vec::new();
        stream?.read_to_end(&mut bytes)?;
        uploads.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
    }
    Ok(())
}

/// A name for which the answer is sent again and again.
const STREAM: &[u8] = b"stream";

/// Sends the same for half a minute, whether anybody is there or not.
fn stream(socket: &UdpSocket, answer: &[u8], peer: SocketAddr) -> Result<()> {
    let (_keeps, pause) = std::sync::mpsc::channel::<()>();
    for _ in 0..600 {
        socket.send_to(answer, peer)?;
        // Nobody sends: it is a pause.
        assert!(pause.recv_timeout(Duration::from_millis(50)).is_err());
    }
    Ok(())
}

/// Answers each question with [`PUBLIC`], or with nothing for other types of records.
fn answer_dns(socket: &UdpSocket) -> Result<()> {
    let mut packet = [0; 512];
    loop {
        let (length, peer) = socket.recv_from(&mut packet)?;
        let question = packet.get(..length).context("a packet")?;
        // Header: id, then flags and counts; a question: name, type, class.
        let is_a = question.get(length.saturating_sub(4)..) == Some(&[0, 1, 0, 1]);
        let mut answer = question.get(..2).context("an id")?.to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
        answer.extend(question.get(12..).context("a question")?);
        if is_a {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(PUBLIC.octets());
        }
        socket.send_to(&answer, peer)?;
        if question.windows(STREAM.len()).any(|part| part == STREAM) {
            let socket = socket.try_clone()?;
            std::thread::spawn(move || end_of("stream", stream(&socket, &answer, peer)));
        }
    }
}
