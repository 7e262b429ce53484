//! What a guest and its gateway send each other over TCP: a Matchlock VM and bare QEMU, by turns.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use matchlock_test_support::{Installation, Running};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use serde_json::Value;

use crate::bare::{self, Bare};
use crate::samples::Samples;

/// What one transfer carries.
const MEBIBYTES: u32 = 32;
/// Rounds that count; one more goes before them.
const ROUNDS: u32 = 40;
/// The host sends on this port, and takes on the next.
const PORT: u16 = 81;
/// For one step of one transfer, and a guest's boot.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a guest runs. `nc` hands the connection to `dd`, which reads and writes it in large blocks;
/// the guest is there first and waits for its turn.
fn script(host: &str) -> String {
    format!(
        "for round in $(seq {}); do
             nc {host} {PORT} -e dd of=/dev/null bs=64k 2>/dev/null
             nc {host} {} -e dd if=/dev/zero bs=64k count={} 2>/dev/null
         done",
        ROUNDS + 1,
        PORT + 1,
        MEBIBYTES * 16,
    )
}

/// The host's ends of one guest's transfers.
struct Ports {
    sending: TcpListener,
    taking: TcpListener,
}

impl Ports {
    fn new(listen: impl Fn(u16) -> Result<TcpListener>) -> Result<Self> {
        let ports = Self { sending: listen(PORT)?, taking: listen(PORT + 1)? };
        for listener in [&ports.sending, &ports.taking] {
            set_socket_timeout(listener, Timeout::Recv, Some(PATIENCE))?;
        }
        Ok(ports)
    }

    fn accept(listener: &TcpListener) -> Result<TcpStream> {
        let (stream, _) = listener.accept().context("the guest does not connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Until the guest, which has read everything, ends the connection; in MiB/s.
    fn send(&self, mebibyte: &[u8]) -> Result<f64> {
        let mut stream = Self::accept(&self.sending)?;
        let begun = Instant::now();
        for _ in 0..MEBIBYTES {
            stream.write_all(mebibyte)?;
        }
        stream.shutdown(Shutdown::Write)?;
        ensure!(stream.read(&mut [0])? == 0, "the guest says something");
        Ok(f64::from(MEBIBYTES) / begun.elapsed().as_secs_f64())
    }

    /// Until the last byte is here; in MiB/s.
    fn take(&self, buffer: &mut [u8]) -> Result<f64> {
        let mut stream = Self::accept(&self.taking)?;
        let begun = Instant::now();
        for _ in 0..MEBIBYTES {
            stream.read_exact(buffer)?;
        }
        let elapsed = begun.elapsed();
        ensure!(stream.read(&mut [0])? == 0, "the guest sends too much");
        Ok(f64::from(MEBIBYTES) / elapsed.as_secs_f64())
    }
}

/// To the guest, and from it.
type Rates = [Samples; 2];

/// Matchlock's rates, then those of bare QEMU.
fn measure(ports: &[Ports; 2]) -> Result<[Rates; 2]> {
    let mut buffer: Vec<u8> = vec![0x5a; 1 << 20];
    let mut rates = [Rates::default(), Rates::default()];
    for round in 0..=ROUNDS {
        let mut rate = [[0.0; 2]; 2];
        // Whoever was first is second in the next round.
        let turns = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for guest in turns {
            rate[guest][0] = ports[guest].send(&buffer)?;
        }
        for guest in turns {
            rate[guest][1] = ports[guest].take(&mut buffer)?;
        }
        for (samples, rate) in rates.iter_mut().flatten().zip(rate.as_flattened()) {
            if round > 0 {
                samples.push(*rate);
            }
        }
    }
    Ok(rates)
}

/// How the guests are run (`kvm`, `tcg`), and what a Matchlock VM in this namespace reached, and the
/// same machine without Matchlock in another.
fn both() -> Result<(String, [Rates; 2])> {
    let installation = Installation::new()?;
    let host = "$(ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p')";
    let ours = Ports::new(|port| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?))?;
    let script_of_ours = script(host);
    let args =
        ["run", "--image", "busybox", "--allow-host-access", "--", "sh", "-ec", &script_of_ours];
    let mut command = installation.command(&args)?;
    let guest = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let vm = installation.wait_for_status("running")?;
    let description = installation.home().join("vms").join(vm).join("hypervisor.json");
    let description: Value = serde_json::from_slice(&std::fs::read(description)?)?;
    let acceleration = description["acceleration"].as_str().context("no acceleration")?.to_owned();
    let bare = Bare::like(&description, &script(&bare::GATEWAY.to_string()))?;
    let theirs = Ports::new(|port| bare.listen(port))?;
    let rates = match measure(&[ours, theirs]) {
        Ok(rates) => rates,
        Err(error) => bail!("{error:#}; the bare guest's logs:\n{}", bare.logs()),
    };
    let output = guest.wait(PATIENCE)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    installation.assert_nothing_left()?;
    Ok((acceleration, rates))
}

pub(crate) fn section() -> Result<String> {
    eprintln!("throughput");
    let (acceleration, [ours, theirs]) = both()?;
    let mut text = format!(
        "The same run: a guest and its gateway over TCP, {ROUNDS} times {MEBIBYTES} MiB each way, \
         {acceleration} on both sides: a `matchlock run --allow-host-access` VM, and by turns bare \
         QEMU: the arguments that the VM's `hypervisor.json` shows, with the same kernel, modules \
         and busybox, started by a shell on a TAP that `ip tuntap` made, in a namespace without \
         any table, its sockets not connected. Both run all the time; one transfers. In the guest \
         `nc -e dd bs=64k`; timed by the host: to the guest until its `dd` has read all and ended, \
         from the guest until the last byte is here. MiB/s, median ± median absolute deviation \
         (least … most); the ratio is Matchlock to bare QEMU in one round.\n\n\
         | direction | Matchlock | bare QEMU | ratio |\n|---|---|---|---|\n",
    );
    for (direction, (ours, theirs)) in
        ["host to guest", "guest to host"].into_iter().zip(ours.iter().zip(&theirs))
    {
        let ratio = ours.combine(theirs, |ours, theirs| ours / theirs);
        let cells = [ours.spread(0), theirs.spread(0), ratio.spread(2)];
        writeln!(text, "| {direction} | {} |", cells.join(" | "))?;
    }
    Ok(text)
}
