//! The network of VMs: what a TAP and its tables cost to make and to remove, by us and by the
//! programs `ip` and `nft`, and what a guest and its host send each other, with Matchlock and with
//! bare QEMU. Ends by writing target/bench/network.md for `scenarios`. `make bench`.
//!
//! Everything happens in network namespaces that have no name and belong to this benchmark's
//! processes, which die with the one that was started: however it ends, the kernel removes them.

#[path = "../artifacts/mod.rs"]
mod artifacts;
mod bare;
#[path = "../samples/mod.rs"]
mod samples;
mod tables;
mod throughput;

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const IN_NAMESPACE: &str = "--in-a-namespace-of-its-own";

fn main() -> Result<()> {
    if !std::env::args().any(|arg| arg == IN_NAMESPACE) {
        let status = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net"])
            .arg(std::env::current_exe()?)
            .arg(IN_NAMESPACE)
            .status()
            .context("setpriv")?;
        ensure!(status.success(), "failed in its network namespace; it takes root");
        return Ok(());
    }
    feed("ip", &["link", "set", "lo", "up"], "")?;
    // Each VM holds two descriptors.
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?;

    let before = load_average()?;
    let throughput = throughput::section()?;
    let tables = tables::section()?;
    // Others' work shows in every maximum.
    let load = format!(
        "\nLoad average (1, 5, 15 minutes) before all this: {before}; after it: {}.\n",
        load_average()?
    );
    let section = ["## The network\n\n", &tables, &throughput, &load].concat();
    let file = artifacts::section("network");
    std::fs::create_dir_all(file.parent().context("a directory")?)?;
    std::fs::write(&file, &section)?;
    println!("{section}\nwritten to {}", file.display());
    Ok(())
}

fn load_average() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(", "))
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
