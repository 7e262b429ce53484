//! The network of VMs: what a TAP and its tables cost to make and to remove, by us and by the
//! programs `ip` and `nft`, and what a guest and its host send each other. Everything happens in a
//! network namespace of its own. Ends by writing target/bench/network.md for `scenarios`.
//! `make bench`.

mod artifacts;

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use matchlock_host::firewall::{
    Firewall as _, FirewallHandle, FirewallSpec, LinuxFirewall, filter_table, nat_table,
};
use matchlock_host::tap::{LinuxTaps, TapHandle, TapSpec, Taps as _, tap_name};
use matchlock_model::id::{InstallId, Mark, VmId};
use matchlock_test_support::{Installation, Running};
use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;

const IN_NAMESPACE: &str = "--in-a-namespace-of-its-own";
/// How many VMs are there already.
const EXISTING: [u32; 3] = [0, 100, 500];
const ROUNDS: u32 = 30;
const MTU: u32 = 1500;

/// What one transfer carries.
const MEGABYTES: u32 = 16;
/// Transfers in each direction; one more goes before them and is not counted.
const TRANSFERS: usize = 5;
/// The host sends on this port, and takes on the next.
const PORT: u16 = 81;
const PATIENCE: Duration = Duration::from_secs(600);

fn main() -> Result<()> {
    if !std::env::args().any(|arg| arg == IN_NAMESPACE) {
        let status = Command::new("unshare")
            .arg("--net")
            .arg(std::env::current_exe()?)
            .arg(IN_NAMESPACE)
            .status()
            .context("unshare")?;
        ensure!(status.success(), "failed in its network namespace; it takes root");
        return Ok(());
    }
    feed("ip", &["link", "set", "lo", "up"], "")?;
    // Each VM holds two descriptors.
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?;

    let section =
        ["## The network\n\n".to_owned(), set_up_and_tear_down()?, throughput()?].concat();
    let file = artifacts::network_section();
    std::fs::create_dir_all(file.parent().context("a directory")?)?;
    std::fs::write(&file, &section)?;
    println!("{section}\nwritten to {}", file.display());
    Ok(())
}

/// Runs a program to its end with this input; what it printed.
fn feed(program: &str, args: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context(program.to_owned())?;
    child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{program} {args:?} failed on:\n{input}");
    Ok(String::from_utf8(output.stdout)?)
}

/// A VM of the benchmark's own, with a subnet of its own.
fn specs(number: u32) -> (TapSpec, FirewallSpec) {
    let vm = VmId::new(number);
    let mark = Mark { install: InstallId::from_bytes([7; 8]), vm };
    let subnet = Ipv4Addr::new(10, 0, 0, 0).to_bits() + number * 4;
    let tap = TapSpec {
        mark: mark.clone(),
        gateway: Ipv4Addr::from_bits(subnet + 1),
        prefix: 30,
        mtu: MTU,
    };
    let firewall = FirewallSpec {
        mark,
        tap: tap_name(vm),
        guest: Ipv4Addr::from_bits(subnet + 2),
        dns_servers: vec![Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(8, 8, 4, 4)],
        allow_private: false,
        allow_host_access: false,
    };
    (tap, firewall)
}

/// A VM's TAP and tables, made by us.
struct Made {
    tap: TapHandle,
    tables: FirewallHandle,
    mark: Mark,
}

impl Made {
    async fn new(number: u32) -> Result<Self> {
        let (tap, firewall) = specs(number);
        let made = LinuxTaps::new().create(&tap).await?;
        let tables = LinuxFirewall::new().apply(&firewall).await?;
        ensure!(tables.is_dead_mans_switch(), "this kernel's tables have no owner");
        Ok(Self { tap: made, tables, mark: tap.mark })
    }

    /// As a VM's end does it; both look again whether it is gone.
    async fn remove(self) -> Result<()> {
        LinuxTaps::new().remove(self.tap.name(), &self.mark).await?;
        drop(self.tap);
        Ok(LinuxFirewall::new().release(self.tables).await?)
    }
}

/// The same of another VM, made by programs.
struct ByPrograms {
    spec: TapSpec,
    rules: String,
}

impl ByPrograms {
    /// The rules are those of a VM that is there, under this one's name.
    fn like(vm: u32, number: u32) -> Result<Self> {
        let tap = tap_name(VmId::new(vm));
        let list =
            |family: &str, table: String| feed("nft", &["list", "table", family, &table], "");
        let listed = list("inet", filter_table(&tap))? + &list("ip", nat_table(&tap))?;
        // A table with an owner would go with the program.
        let unowned: Vec<&str> =
            listed.lines().filter(|line| line.trim() != "flags owner").collect();
        let (theirs, ours) = (VmId::new(vm).suffix(), VmId::new(number).suffix());
        Ok(Self { spec: specs(number).0, rules: unowned.join("\n").replace(&theirs, &ours) + "\n" })
    }

    fn make(&self) -> Result<()> {
        let (name, spec) = (self.spec.name(), &self.spec);
        let batch = format!(
            "tuntap add dev {name} mode tap vnet_hdr\n\
             link set dev {name} alias {} mtu {}\n\
             address add {}/{} dev {name}\n\
             link set dev {name} up\n",
            spec.mark, spec.mtu, spec.gateway, spec.prefix
        );
        feed("ip", &["-batch", "-"], &batch)?;
        for setting in ["ipv6/conf/{}/disable_ipv6", "ipv4/conf/{}/arp_ignore"] {
            std::fs::write(format!("/proc/sys/net/{}", setting.replace("{}", &name)), "1")?;
        }
        feed("nft", &["-f", "-"], &self.rules)?;
        Ok(())
    }

    fn remove(&self) -> Result<()> {
        let tap = self.spec.name();
        feed("ip", &["link", "delete", "dev", &tap], "")?;
        let (filter, nat) = (filter_table(&tap), nat_table(&tap));
        let deletions = format!("delete table inet {filter}\ndelete table ip {nat}\n");
        feed("nft", &["-f", "-"], &deletions)?;
        Ok(())
    }
}

/// The median and the longest, in milliseconds.
fn median_and_longest(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    let at = |index: usize| times.get(index).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3);
    (at(times.len() / 2), at(times.len().saturating_sub(1)))
}

/// The times of both ways, each to make and to remove.
#[derive(Default)]
struct Times {
    making: [Vec<Duration>; 2],
    removing: [Vec<Duration>; 2],
}

async fn measure(existing: u32) -> Result<Times> {
    let (ours, theirs) = (existing, existing + 1);
    let template = Made::new(ours).await?;
    let programs = ByPrograms::like(ours, theirs)?;
    template.remove().await?;
    let mut times = Times::default();
    // By turns, so that whatever else this machine does falls on both.
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let made = Made::new(ours).await?;
        times.making[0].push(begun.elapsed());
        let begun = Instant::now();
        made.remove().await?;
        times.removing[0].push(begun.elapsed());

        let begun = Instant::now();
        programs.make()?;
        times.making[1].push(begun.elapsed());
        let begun = Instant::now();
        programs.remove()?;
        times.removing[1].push(begun.elapsed());
    }
    Ok(times)
}

fn set_up_and_tear_down() -> Result<String> {
    let runtime = Runtime::new()?;
    let mut text = format!(
        "`cargo bench --bench network`, in a network namespace of its own: a VM's TAP and its two \
         tables, made and removed again {ROUNDS} times beside so many VMs, by us (netlink; removing \
         looks again whether they are gone) and by turns with the same rules by the programs `ip` \
         and `nft`. Milliseconds, median / longest.\n\n\
         | VMs there | set-up | by programs | tear-down | by programs |\n|---|---|---|---|---|\n",
    );
    let mut there = Vec::new();
    for existing in EXISTING {
        for number in u32::try_from(there.len())?..existing {
            there.push(runtime.block_on(Made::new(number))?);
        }
        eprintln!("set-up and tear-down beside {existing} VMs");
        let times = runtime.block_on(measure(existing))?;
        write!(text, "| {existing} |")?;
        for ways in [times.making, times.removing] {
            for way in ways {
                let (median, longest) = median_and_longest(way);
                write!(text, " {median:.1} / {longest:.1} |")?;
            }
        }
        text.push('\n');
    }
    eprintln!("removing them");
    for made in there {
        runtime.block_on(made.remove())?;
    }
    Ok(text + "\n")
}

/// Sends everything, and waits until the guest has it.
fn send(mut stream: TcpStream, megabyte: &[u8]) -> Result<()> {
    set_socket_linger(&stream, Some(PATIENCE))?;
    for _ in 0..MEGABYTES {
        stream.write_all(megabyte)?;
    }
    drop(stream);
    Ok(())
}

/// Takes everything, and then ends the connection.
fn take(mut stream: TcpStream, buffer: &mut [u8]) -> Result<()> {
    for _ in 0..MEGABYTES {
        stream.read_exact(buffer)?;
    }
    Ok(())
}

/// The rates of a transfer, in MiB/s: median, median absolute deviation, least and most.
fn rates(times: &[Duration]) -> String {
    let median = |values: &mut Vec<f64>| {
        values.sort_unstable_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let mut rates: Vec<f64> =
        times.iter().map(|time| f64::from(MEGABYTES) / time.as_secs_f64()).collect();
    let middle = median(&mut rates);
    let (least, most) = (rates.first().unwrap_or(&f64::NAN), rates.last().unwrap_or(&f64::NAN));
    let mut deviations: Vec<f64> = rates.iter().map(|rate| (rate - middle).abs()).collect();
    format!("{middle:.0} ± {:.0} | {least:.0} … {most:.0}", median(&mut deviations))
}

/// A real guest and the gateway; each transfer is timed by the host, from the connection to the
/// last byte.
fn throughput() -> Result<String> {
    let installation = Installation::new()?;
    eprintln!("throughput");
    let listen = |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port));
    let (sending, taking) = (listen(PORT)?, listen(PORT + 1)?);
    let script = format!(
        "host=$(ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p')
         for round in $(seq {}); do
             nc $host {PORT} </dev/null >/dev/null
             dd if=/dev/zero bs=1M count={MEGABYTES} 2>/dev/null | nc $host {}
         done",
        TRANSFERS + 1,
        PORT + 1
    );
    let args = ["run", "--image", "busybox", "--allow-host-access", "--", "sh", "-ec", &script];
    let mut command = installation.command(&args)?;
    let guest = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let host = std::thread::spawn(move || -> Result<[Vec<Duration>; 2]> {
        let mut buffer: Vec<u8> = vec![0x5a; 1 << 20];
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..=TRANSFERS {
            let (stream, _) = sending.accept()?;
            let begun = Instant::now();
            send(stream, &buffer)?;
            times[0].push(begun.elapsed());
            let (stream, _) = taking.accept()?;
            let begun = Instant::now();
            take(stream, &mut buffer)?;
            times[1].push(begun.elapsed());
        }
        Ok(times)
    });
    // If the guest fails first, the thread waits on; it ends with this process.
    let output = guest.wait(PATIENCE)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let times = host.join().map_err(|_| anyhow::anyhow!("the host's side panicked"))??;
    let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let mut text = format!(
        "A guest (`matchlock run`, {} KVM) and its gateway over TCP, {TRANSFERS} times {MEGABYTES} \
         MiB each way in turn: MiB/s.\n\n\
         | direction | median | least … most |\n|---|---|---|\n",
        if kvm { "with" } else { "without" }
    );
    for (direction, times) in ["host to guest", "guest to host"].into_iter().zip(&times) {
        writeln!(text, "| {direction} | {} |", rates(times.get(1..).unwrap_or_default()))?;
    }
    text.push_str("\nBare QEMU on the same TAP: not measured.\n");
    Ok(text)
}
