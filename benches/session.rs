//! Sessions (`matchlock rpc`): the round trip of a command in a warm VM, from `create` to a VM's first
//! command, and what a VM costs the session's process. Ends by writing target/bench/session.md for
//! `scenarios`. `make bench`.

mod artifacts;
mod kernels;

use std::fmt::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use matchlock_test_support::{Installation, Session, small_vm};
use serde_json::{Value, json};

use kernels::GuestKernel;

/// Commands that are measured, at each number at once.
const COMMANDS: usize = 640;
const ROUNDS: usize = 3;

fn main() -> Result<()> {
    let kernels = kernels::built()?;
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let section = [
        "\n## Sessions\n\n`cargo bench --bench session`: the real program, busybox VMs of 128 MB without a network.\n\n",
        &round_trips(&kernels)?,
        kernels::not_measured(&kernels),
        &first_commands(&kernels)?,
        &memory(kernels.last().context("no kernel")?)?,
        &format!("\nLoad average before all this: {}.\n", load.trim()),
    ]
    .concat();
    let file = artifacts::section("session");
    std::fs::create_dir_all(file.parent().context("a directory")?)?;
    std::fs::write(&file, &section)?;
    println!("{section}\nwritten to {}", file.display());
    Ok(())
}

fn start(installation: &Installation) -> Result<Session> {
    Session::start(installation.command(&["rpc"])?.stderr(Stdio::inherit()))
}

fn close(mut session: Session) -> Result<()> {
    session.call("close", &json!({ "timeout_seconds": 60 }))?;
    let status = session.wait(Duration::from_secs(60))?;
    ensure!(status.is_some_and(|status| status.success()), "the session ended with {status:?}");
    Ok(())
}

/// The time at this part of all, from 0 to 1.
fn percentile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index of a short list"
    )]
    let at = ((times.len() - 1) as f64 * part).round() as usize;
    times.get(at).copied().unwrap_or_default()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Runs commands, so many at once; the time of each.
fn run(session: &mut Session, at_once: usize, command: &Value) -> Result<Vec<Duration>> {
    let mut asked = std::collections::HashMap::new();
    let (mut times, mut left) = (Vec::new(), COMMANDS);
    while times.len() < COMMANDS {
        while asked.len() < at_once && left > 0 {
            let params = json!({ "command": command });
            let began = Instant::now();
            asked.insert(session.send("exec", &params)?, began);
            left -= 1;
        }
        let is_one = |m: &Value| m["id"].as_u64().is_some_and(|id| asked.contains_key(&id));
        let answer = session.message("an answer", is_one)?;
        ensure!(answer["result"]["exit_code"] == 0, "{answer}");
        let id = answer["id"].as_u64().context("an id")?;
        times.push(asked.remove(&id).context("it was asked")?.elapsed());
    }
    Ok(times)
}

fn round_trips(kernels: &[GuestKernel]) -> Result<String> {
    let mut text = String::from(
        "| kernel | `exec` in a VM that runs | at once | p50 | p99 | commands/s | goal |\n\
         |---|---|---|---|---|---|---|\n",
    );
    let ways = [("`true`, without a shell", json!(["true"])), ("`sh -c true`", json!("true"))];
    for kernel in kernels {
        let mut session = start(&kernel.installation)?;
        session.create_vm()?;
        for ((name, command), at_once) in ways.iter().flat_map(|way| [(way, 1), (way, 32)]) {
            let began = Instant::now();
            let mut times = run(&mut session, at_once, command)?;
            let rate = f64::from(u32::try_from(COMMANDS)?) / began.elapsed().as_secs_f64();
            let has_goal = kernel.name == "own" && at_once == 1 && command.is_array();
            writeln!(
                text,
                "| {} | {name} | {at_once} | {:.1} ms | {:.1} ms | {rate:.0} | {} |",
                kernel.title(),
                ms(percentile(&mut times, 0.5)),
                ms(percentile(&mut times, 0.99)),
                if has_goal { "p50 ≤ 7 ms" } else { "" },
            )?;
        }
        close(session)?;
    }
    Ok(text)
}

fn first_commands(kernels: &[GuestKernel]) -> Result<String> {
    let mut text = String::from(
        "\n| kernel | from `create` (cold) to the end of the first `exec` | median | slowest |\n\
         |---|---|---|---|\n",
    );
    for (kernel, vms) in kernels.iter().flat_map(|kernel| [(kernel, 1), (kernel, 8)]) {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            times.extend(first_commands_of(&kernel.installation, vms)?);
        }
        let slowest = times.iter().max().copied().unwrap_or_default();
        writeln!(
            text,
            "| {} | {vms} at once | {:.0} ms | {:.0} ms |",
            kernel.title(),
            ms(percentile(&mut times, 0.5)),
            ms(slowest)
        )?;
    }
    Ok(text)
}

fn first_commands_of(installation: &Installation, vms: usize) -> Result<Vec<Duration>> {
    let mut session = start(installation)?;
    let mut cold = small_vm();
    cold["cold"] = json!(true);
    let began = Instant::now();
    let mut waiting = Vec::new();
    for _ in 0..vms {
        waiting.push(session.send("create", &cold)?);
    }
    let mut commands = Vec::new();
    while let Some(id) = waiting.first().copied() {
        let created = session.answer(id)?.map_err(|e| anyhow::anyhow!("{e:?}"))?;
        waiting.remove(0);
        let params = json!({ "vm_id": created["id"], "command": ["true"] });
        commands.push(session.send("exec", &params)?);
    }
    let mut times = Vec::new();
    for id in commands {
        session.answer(id)?.map_err(|e| anyhow::anyhow!("{e:?}"))?;
        times.push(began.elapsed());
    }
    close(session)?;
    Ok(times)
}

/// A number of kB in a file of a process.
fn kilobytes(pid: u32, file: &str, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}"))?;
    let line = text.lines().find(|line| line.starts_with(name)).context(name.to_owned())?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
}

/// The hypervisors of a session: its children.
fn hypervisors(session: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{session}/task"))? {
        let children = std::fs::read_to_string(task?.path().join("children"))?;
        for pid in children.split_whitespace() {
            found.push(pid.parse()?);
        }
    }
    Ok(found)
}

fn memory(kernel: &GuestKernel) -> Result<String> {
    let mut session = start(&kernel.installation)?;
    let pid = session.pid()?;
    let mut text = format!("\nMemory, {}, VMs that booted:\n", kernel.title());
    text.push_str(
        "\n| VMs in one session, each after a command | the session's process | of it, for each VM \
         after the first | a hypervisor, resident | its share |\n|---|---|---|---|---|\n",
    );
    let (mut vms, mut first) = (0, 0);
    for wanted in [1, 10, 30] {
        while vms < wanted {
            session.create_vm()?;
            vms += 1;
        }
        for vm in session.call("list", &json!({}))?["vms"].as_array().context("vms")? {
            let params = json!({ "vm_id": vm["id"], "command": ["true"] });
            session.call("exec", &params)?;
        }
        let own = kilobytes(pid, "status", "VmRSS")?;
        let each = if vms == 1 {
            first = own;
            String::new()
        } else {
            format!("{} kB", own.saturating_sub(first) / (vms - 1))
        };
        let machines = hypervisors(pid)?;
        ensure!(machines.len() as u64 == vms, "{} hypervisors for {vms} VMs", machines.len());
        let mean = |file: &str, name: &str| -> Result<u64> {
            let sum =
                machines.iter().map(|pid| kilobytes(*pid, file, name)).sum::<Result<u64>>()?;
            Ok(sum / vms / 1024)
        };
        writeln!(
            text,
            "| {vms} | {own} kB | {each} | {} MiB | {} MiB |",
            mean("status", "VmRSS")?,
            mean("smaps_rollup", "Pss:")?
        )?;
    }
    close(session)?;
    text.push_str(
        "\nA hypervisor's share counts what several of them map (its program, the kernel's file) in \
         parts.\n",
    );
    Ok(text)
}
