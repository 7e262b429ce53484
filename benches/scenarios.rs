//! What no micro-benchmark shows: several processes at once, whole lives of VMs. Ends by writing
//! docs/PERFORMANCE.md, from its own numbers and those that criterion, `boot`, `network`, `fleet`,
//! `session` and `images` left. `make bench`.

mod artifacts;
mod common;
mod dead;

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use matchlock_model::phase::Phase;
use matchlock_store::open_state;
use matchlock_test_support::Installation;
use serde_json::Value;
use tempfile::TempDir;

const WRITER_ARGUMENT: &str = "--one-of-several-writers";
/// Measures `gc` alone, and writes no page: for whoever makes it faster.
const GC_ARGUMENT: &str = "--only-gc";
const PROCESSES: u32 = 4;
const ROUND: Duration = Duration::from_secs(5);
const LIVES: u32 = 10;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|arg| arg == WRITER_ARGUMENT) {
        let number = args.get(at + 2).context("a number")?.parse()?;
        return write_for_a_while(Path::new(args.get(at + 1).context("a home")?), number);
    }
    if args.iter().any(|arg| arg == GC_ARGUMENT) {
        println!("{}", dead::section()?);
        return Ok(());
    }
    let report = [
        section("boot")?,
        criterion_table()?,
        several_processes()?,
        growth()?,
        dead::section()?,
        section("network")?,
        section("fleet")?,
        section("session")?,
        section("images")?,
    ]
    .concat();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/PERFORMANCE.md");
    std::fs::write(&path, format!("{}{report}", heading()?))?;
    println!("{report}\nwritten to {}", path.display());
    Ok(())
}

fn heading() -> Result<String> {
    let said = |program: &str, args: &[&str]| -> Result<String> {
        let output = Command::new(program).args(args).output().context(program.to_owned())?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    // The documents are what this run is writing.
    let changed = said("git", &["status", "--porcelain", "--", ".", ":(exclude)docs"])?;
    let dirty = if changed.is_empty() { "" } else { "-dirty" };
    Ok(format!(
        "# Performance\n\n\
         Written by `make bench` on {} at commit {}{dirty}. Machine: {} × {}, Linux {}. Goals are goals; \
         the spread is the median absolute deviation.\n\n",
        said("date", &["-u", "+%Y-%m-%d"])?,
        said("git", &["rev-parse", "--short", "HEAD"])?,
        std::thread::available_parallelism()?,
        model.trim_start_matches(['\t', ' ', ':']),
        said("uname", &["-r"])?,
    ))
}

/// The section that another bench left, if it ran.
fn section(bench: &str) -> Result<String> {
    let file = artifacts::section(bench);
    match std::fs::read_to_string(&file) {
        Ok(text) => Ok(format!("\n{text}")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).with_context(|| file.display().to_string()),
    }
}

/// What criterion measured: the time of one iteration in nanoseconds, median and deviation.
fn criterion(name: &str) -> Result<(f64, f64)> {
    let file = artifacts::target().join("criterion").join(name).join("new/estimates.json");
    let text =
        std::fs::read(&file).with_context(|| format!("{}: run `make bench`", file.display()))?;
    let estimates: Value = serde_json::from_slice(&text)?;
    let point = |what: &str| {
        estimates[what]["point_estimate"].as_f64().with_context(|| format!("no {what} of {name}"))
    };
    Ok((point("median")?, point("median_abs_dev")?))
}

fn criterion_table() -> Result<String> {
    let mut text = String::from(
        "## The store\n\n\
         `cargo bench --bench store`: rows per second from so many callers, each waiting for its \
         answer, in one process.\n\n\
         | callers | group commit | one transaction each | ratio |\n|---|---|---|---|\n",
    );
    for callers in [1, 16, 128] {
        let rate = |way: &str| -> Result<(f64, f64)> {
            let (median, deviation) = criterion(&format!("write/{way}/{callers}"))?;
            let rows = f64::from(callers) * 8.0 * 1e9;
            Ok((rows / median, rows / median * deviation / median))
        };
        let (group, single) = (rate("group_commit")?, rate("one_transaction_each")?);
        writeln!(
            text,
            "| {callers} | {:.0} ± {:.0} | {:.0} ± {:.0} | {:.2} |",
            group.0,
            group.1,
            single.0,
            single.1,
            group.0 / single.0
        )?;
    }
    text.push_str("\n| what | time | goal |\n|---|---|---|\n");
    for (name, what, goal) in [
        ("open_nothing_pending", "opening `state.db` for writing, nothing pending", "5 ms"),
        ("list_1000_vms", "`matchlock list` of 1,000 VMs, the whole process", "20 ms"),
        ("list_1000_vms_json", "`matchlock list --json` of 1,000 VMs", "20 ms"),
    ] {
        let (median, deviation) = criterion(name)?;
        writeln!(text, "| {what} | {:.2} ms ± {:.2} | {goal} |", median / 1e6, deviation / 1e6)?;
    }
    text.push('\n');
    Ok(text)
}

/// One of several processes: writes, each write a transaction, and tells how many and the longest
/// wait in microseconds.
fn write_for_a_while(home: &Path, number: u32) -> Result<()> {
    let mut conn = open_state(home)?;
    common::write(&mut conn, vec![common::insert(number, home)]);
    for phase in [Phase::Created, Phase::Starting, Phase::Running] {
        common::write(&mut conn, vec![common::change(number, phase, 0)]);
    }
    println!("ready");
    std::io::stdin().read_exact(&mut [0])?;
    let (began, mut longest, mut rows) = (Instant::now(), Duration::ZERO, 0_u64);
    while began.elapsed() < ROUND {
        let asked = Instant::now();
        rows += 1;
        common::write(&mut conn, vec![common::change(number, Phase::Running, rows)]);
        longest = longest.max(asked.elapsed());
    }
    println!("{rows} {}", longest.as_micros());
    Ok(())
}

fn several_processes() -> Result<String> {
    let home = TempDir::new()?;
    drop(open_state(home.path())?);
    let mut writers = Vec::new();
    for number in 0..PROCESSES {
        let writer = Command::new(std::env::current_exe()?)
            .arg(WRITER_ARGUMENT)
            .arg(home.path())
            .arg(number.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        writers.push(writer);
    }
    for writer in &mut writers {
        let mut ready = [0; 6];
        writer.stdout.as_mut().context("its output")?.read_exact(&mut ready)?;
    }
    for writer in &mut writers {
        writer.stdin.take().context("its input")?.write_all(b"g")?;
    }
    let mut all = Vec::new();
    for writer in writers {
        let output = writer.wait_with_output()?;
        ensure!(output.status.success(), "a writer failed");
        let text = String::from_utf8(output.stdout)?;
        let (rows, longest) = text.trim().split_once(' ').context("two numbers")?;
        all.push((rows.parse::<u64>()?, longest.parse::<u64>()?));
    }
    let rows: Vec<String> = all.iter().map(|(rows, _)| rows.to_string()).collect();
    let total: u64 = all.iter().map(|(rows, _)| rows).sum();
    let longest = all.iter().map(|(_, longest)| *longest).max().unwrap_or(0);
    Ok(format!(
        "`cargo bench --bench scenarios`: {PROCESSES} processes that write at once for {} s, each \
         write a transaction: {} rows/s in all; rows of each: {}; the longest wait of any write: \
         {} ms.\n\n",
        ROUND.as_secs(),
        total / ROUND.as_secs(),
        rows.join(", "),
        longest / 1_000,
    ))
}

/// Real VMs from their beginning to their end.
fn growth() -> Result<String> {
    let installation = Installation::new()?;
    let size = || -> Result<i64> {
        let pages = "select page_count * page_size from pragma_page_count, pragma_page_size";
        Ok(installation.sql(pages)?.trim().parse()?)
    };
    let life = || -> Result<()> {
        let output = installation.run(&[], &["true"])?;
        ensure!(output.status.success(), "a run failed");
        Ok(())
    };
    life()?;
    let before = size()?;
    for _ in 0..LIVES {
        life()?;
    }
    let per_life = (size()? - before) / i64::from(LIVES);
    let rows = installation.sql("select count(*) from vm_lifecycle")?;
    let rows: i64 = rows.trim().parse()?;
    Ok(format!(
        "Growth of `state.db` per life of a VM (`matchlock run`, {LIVES} real ones): {:.1} KB, \
         {:.1} lifecycle rows; pruned after 30 days.\n",
        f64::from(i32::try_from(per_life)?) / 1024.0,
        f64::from(i32::try_from(rows)?) / f64::from(LIVES + 1),
    ))
}
