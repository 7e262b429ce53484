//! A VM's TAP and its two tables, made and removed beside many others.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use matchlock_host::firewall::{
    Firewall as _, FirewallHandle, FirewallSpec, LinuxFirewall, filter_table, nat_table,
};
use matchlock_host::netlock::{LinuxNetworkLocks, NetworkLocks as _};
use matchlock_host::tap::{LinuxTaps, TapHandle, TapSpec, Taps as _, tap_name};
use matchlock_model::id::{InstallId, Mark, VmId};
use tokio::runtime::Runtime;

use crate::feed;
use crate::samples::Samples;

/// How many VMs are there already.
const EXISTING: [u32; 3] = [0, 100, 500];
const ROUNDS: u32 = 50;
const MTU: u32 = 1500;
const INSTALL: [u8; 8] = [7; 8];
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// A VM of the benchmark's own, with a subnet of its own.
fn specs(number: u32) -> (TapSpec, FirewallSpec) {
    let vm = VmId::new(number);
    let mark = Mark { install: InstallId::from_bytes(INSTALL), vm };
    let subnet = Ipv4Addr::new(10, 0, 0, 0).to_bits() + number * 4;
    let tap = TapSpec {
        mark: mark.clone(),
        gateway: Ipv4Addr::from_bits(subnet + 1),
        guest: Ipv4Addr::from_bits(subnet + 2),
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

/// The time since the last one.
struct Laps(Instant);

impl Laps {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}

/// What the two parts of a network took.
struct Took {
    tap: Duration,
    tables: Duration,
}

/// A VM's TAP and tables, made by us.
struct Made {
    tap: TapHandle,
    tables: FirewallHandle,
    mark: Mark,
}

impl Made {
    async fn new(number: u32) -> Result<(Self, Took)> {
        let (spec, rules) = specs(number);
        let mut laps = Laps(Instant::now());
        let tap = LinuxTaps::new().create(&spec).await?;
        let took_tap = laps.lap();
        let tables = LinuxFirewall::new().apply(&rules).await?;
        let took = Took { tap: took_tap, tables: laps.lap() };
        ensure!(tables.is_dead_mans_switch(), "this kernel's tables have no owner");
        Ok((Self { tap, tables, mark: spec.mark }, took))
    }

    /// As a VM's end does it, which looks again whether they are gone.
    async fn remove(self) -> Result<Took> {
        let Self { tap, tables, mark } = self;
        let (name, firewall) = (tap.name().to_owned(), LinuxFirewall::new());
        let mut laps = Laps(Instant::now());
        LinuxTaps::new().remove(&name, &mark).await?;
        drop(tap);
        let tap = laps.lap();
        firewall.release(tables).await?;
        firewall.remove(&name, &mark).await?;
        Ok(Took { tap, tables: laps.lap() })
    }
}

/// What a VM's start looks at besides, as `actors/src/{subnet_allocator,vm/network.rs}` do it.
const LOOKS: [&str; 3] =
    ["look for stale TAPs", "look at addresses and routes, twice", "look for others' chains"];

async fn look_around() -> Result<[Duration; 3]> {
    let (taps, firewall) = (LinuxTaps::new(), LinuxFirewall::new());
    let mut laps = Laps(Instant::now());
    taps.list_marked(&InstallId::from_bytes(INSTALL)).await?;
    let stale = laps.lap();
    let lock = LinuxNetworkLocks::new().acquire(LOCK_PATIENCE).await?;
    taps.host_subnets().await?;
    taps.host_subnets().await?;
    drop(lock);
    let subnets = laps.lap();
    firewall.enable_ip_forward()?;
    firewall.obstacles().await?;
    Ok([stale, subnets, laps.lap()])
}

/// The same of another VM, made by programs.
struct ByPrograms {
    spec: TapSpec,
    rules: String,
}

/// Both tables of a VM as `nft` shows them, under this number's name.
fn listed(vm: u32, under: u32) -> Result<String> {
    let tap = tap_name(VmId::new(vm));
    let list = |family: &str, table: String| feed("nft", &["list", "table", family, &table], "");
    let text = list("inet", filter_table(&tap))? + &list("ip", nat_table(&tap))?;
    // A table with an owner would go with the program. `# progname` tells of the owner. Empty lines
    // set off what is gone then.
    let lines = text.lines().filter(|line| !["", "flags owner"].contains(&line.trim()));
    let lines: Vec<&str> = lines.map(|line| line.split(" #").next().unwrap_or(line)).collect();
    Ok(lines.join("\n").replace(&VmId::new(vm).suffix(), &VmId::new(under).suffix()) + "\n")
}

impl ByPrograms {
    /// The rules are those of a VM that is there, under this one's name. That they are the same is
    /// checked: `nft` reads them in and shows them again.
    fn like(vm: u32, number: u32) -> Result<Self> {
        let this = Self { spec: specs(number).0, rules: listed(vm, number)? };
        this.make()?;
        let (made, wanted) = (listed(number, number)?, &this.rules);
        ensure!(made == *wanted, "nft made other rules:\n{made}\nfrom:\n{wanted}");
        this.remove()?;
        Ok(this)
    }

    fn make(&self) -> Result<Took> {
        let (name, spec) = (self.spec.name(), &self.spec);
        let batch = format!(
            "tuntap add dev {name} mode tap vnet_hdr\n\
             link set dev {name} alias {} mtu {}\n\
             address add {}/{} dev {name}\n\
             link set dev {name} up\n",
            spec.mark, spec.mtu, spec.gateway, spec.prefix
        );
        let mut laps = Laps(Instant::now());
        feed("ip", &["-batch", "-"], &batch)?;
        for setting in ["ipv6/conf/{}/disable_ipv6", "ipv4/conf/{}/arp_ignore"] {
            std::fs::write(format!("/proc/sys/net/{}", setting.replace("{}", &name)), "1")?;
        }
        let tap = laps.lap();
        feed("nft", &["-f", "-"], &self.rules)?;
        Ok(Took { tap, tables: laps.lap() })
    }

    fn remove(&self) -> Result<Took> {
        let name = self.spec.name();
        let (filter, nat) = (filter_table(&name), nat_table(&name));
        let deletions = format!("delete table inet {filter}\ndelete table ip {nat}\n");
        let mut laps = Laps(Instant::now());
        feed("ip", &["link", "delete", "dev", &name], "")?;
        let tap = laps.lap();
        feed("nft", &["-f", "-"], &deletions)?;
        Ok(Took { tap, tables: laps.lap() })
    }
}

/// TAP, tables and both, in milliseconds.
#[derive(Default)]
struct Times {
    tap: Samples,
    tables: Samples,
    both: Samples,
}

impl Times {
    fn push(&mut self, took: &Took) {
        self.tap.push_ms(took.tap);
        self.tables.push_ms(took.tables);
        self.both.push_ms(took.tap + took.tables);
    }
}

/// One number of VMs that are there; ours first, then the programs'.
#[derive(Default)]
struct Measured {
    looking: [Samples; LOOKS.len()],
    making: [Times; 2],
    removing: [Times; 2],
}

async fn measure(existing: u32) -> Result<Measured> {
    let (ours, theirs) = (existing, existing + 1);
    let template = Made::new(ours).await?.0;
    let programs = ByPrograms::like(ours, theirs)?;
    template.remove().await?;
    let mut measured = Measured::default();
    // By turns, so that whatever else this machine does falls on both.
    for _ in 0..ROUNDS {
        for (samples, took) in measured.looking.iter_mut().zip(look_around().await?) {
            samples.push_ms(took);
        }
        let (made, took) = Made::new(ours).await?;
        measured.making[0].push(&took);
        measured.removing[0].push(&made.remove().await?);
        measured.making[1].push(&programs.make()?);
        measured.removing[1].push(&programs.remove()?);
    }
    Ok(measured)
}

fn write_rows(text: &mut String, existing: u32, measured: &Measured) -> Result<()> {
    let mut row = |what: &str, ours: &Samples, theirs: &Samples| {
        let ratio = theirs.combine(ours, |theirs, ours| theirs / ours).median();
        let [ours, theirs] =
            [ours, theirs].map(|times| format!("{:.2} / {:.1}", times.median(), times.most()));
        writeln!(text, "| {existing} | {what} | {ours} | {theirs} | {ratio:.2} |")
    };
    for (doing, [ours, theirs]) in [("make", &measured.making), ("remove", &measured.removing)] {
        row(&format!("{doing} the TAP"), &ours.tap, &theirs.tap)?;
        row(&format!("{doing} the tables"), &ours.tables, &theirs.tables)?;
        row(&format!("**{doing} both**"), &ours.both, &theirs.both)?;
    }
    for (what, times) in LOOKS.iter().zip(&measured.looking) {
        let (median, most) = (times.median(), times.most());
        writeln!(text, "| {existing} | {what} | {median:.2} / {most:.1} | | |")?;
    }
    Ok(())
}

pub(crate) fn section() -> Result<String> {
    let runtime = Runtime::new()?;
    let nft = feed("nft", &["--version"], "")?;
    let mut text = format!(
        "`cargo bench --bench network`. A VM's TAP and its two tables, made and removed {ROUNDS} \
         times beside so many others, in a network namespace of their own. By Matchlock: the calls \
         of its VM actor (netlink; removing ends by looking whether they are gone). By programs: \
         `ip -batch -` and `ip link delete` for the TAP; {} for the tables (`nft -f -`, with the \
         rules that `nft list table` shows of ours, which is checked). They do not look again, but \
         `nft` first asks the kernel about every table there is. The two take turns. Milliseconds, \
         p50 / max of {ROUNDS}; the ratio is programs to Matchlock, the median of the rounds' \
         ratios. What a start looks at besides (stale TAPs, the host's addresses and routes under \
         the lock, other people's chains) is in rows of its own.\n\n\
         | VMs there | what | Matchlock | programs | ratio |\n|---|---|---|---|---|\n",
        nft.trim(),
    );
    let mut there = Vec::new();
    for existing in EXISTING {
        for number in u32::try_from(there.len())?..existing {
            there.push(runtime.block_on(Made::new(number))?.0);
        }
        eprintln!("set-up and tear-down beside {existing} VMs");
        write_rows(&mut text, existing, &runtime.block_on(measure(existing))?)?;
    }
    eprintln!("removing them");
    for made in there {
        runtime.block_on(made.remove())?;
    }
    Ok(text + "\n")
}
