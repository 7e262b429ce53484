//! What the streams of a command carry: `matchlock exec` in a VM that runs, to its end.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use matchlock_test_support::Installation;

use crate::kernels::GuestKernel;
use crate::samples::Samples;

const ROUNDS: usize = 7;
const MIB: usize = 128;
const CHUNK: usize = 64 * 1024;

pub(crate) fn section<'a>(kernels: impl Iterator<Item = &'a GuestKernel>) -> Result<String> {
    let mut text = format!(
        "`matchlock exec` of {MIB} MiB in a VM that runs, the whole process, {ROUNDS} rounds: `dd \
         if=/dev/zero bs=64k` to a pipe that is read here, and a pipe that is filled here to `cat \
         >/dev/null`.\n\n| kernel | stdout, MiB/s | stdin, MiB/s |\n|---|---|---|\n"
    );
    for kernel in kernels {
        let (from, to) = measured(&kernel.installation)?;
        writeln!(text, "| {} | {} | {} |", kernel.title(), from.spread(0), to.spread(0))?;
    }
    Ok(text)
}

fn measured(installation: &Installation) -> Result<(Samples, Samples)> {
    let vm = installation.start_run(&[], &["sleep", "100000"])?;
    let id = installation.wait_for_status("running")?;
    let (mut from, mut to) = (Samples::default(), Samples::default());
    for _ in 0..ROUNDS {
        from.push(rate(stdout(installation, &id)?));
        to.push(rate(stdin(installation, &id)?));
    }
    vm.signal(rustix::process::Signal::TERM)?;
    vm.wait(Duration::from_secs(60))?;
    Ok((from, to))
}

fn rate(took: Duration) -> f64 {
    f64::from(u32::try_from(MIB).unwrap_or(u32::MAX)) / took.as_secs_f64()
}

fn exec(installation: &Installation, args: &[&str]) -> Result<Command> {
    let mut command = installation.command(&["exec"])?;
    command.args(args).stderr(Stdio::inherit());
    Ok(command)
}

fn stdout(installation: &Installation, id: &str) -> Result<Duration> {
    let count = format!("count={}", MIB * 16);
    let script = format!("exec dd if=/dev/zero bs=64k {count} 2>/dev/null");
    let mut command = exec(installation, &[id, "--", "sh", "-c", &script])?;
    let began = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut output = child.stdout.take().context("its output")?;
    let (mut buffer, mut bytes) = (vec![0; CHUNK], 0);
    loop {
        match output.read(&mut buffer)? {
            0 => break,
            count => bytes += count,
        }
    }
    ensure!(child.wait()?.success() && bytes == MIB << 20, "{bytes} bytes of output");
    Ok(began.elapsed())
}

fn stdin(installation: &Installation, id: &str) -> Result<Duration> {
    let mut command = exec(installation, &["-i", id, "--", "sh", "-c", "exec cat >/dev/null"])?;
    let began = Instant::now();
    let mut child = command.stdin(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("its input")?;
    let zeros = vec![0; CHUNK];
    for _ in 0..(MIB << 20) / CHUNK {
        input.write_all(&zeros)?;
    }
    drop(input);
    ensure!(child.wait()?.success(), "the command failed");
    Ok(began.elapsed())
}
