//! Kills at random instants, seeded.

use std::time::{Duration, Instant};

use anyhow::Result;
use matchlock_test_support::netns::Namespace;
use matchlock_test_support::wait_until;
use rustix::process::Signal;

use super::case::{PATIENCE, Report, Stage};
use super::host;
use super::suite::draw;

/// A command that runs for a moment, so that a kill may also meet it and the removal after it.
const RUN: &[&str] = &["run", "--image", "busybox", "--", "sleep", "1"];

/// From the start of `run` to its end on a quiet machine, more or less.
const LIFE_MS: u64 = 6_000;

/// Whom the seed kills.
pub(crate) const VICTIMS: [&str; 4] = ["owner", "hypervisor", "both", "owner and gc"];

/// Whom this seed kills.
pub(crate) fn victim(seed: u64) -> &'static str {
    let index = usize::try_from(draw(seed, "victim") % 4).unwrap_or_default();
    VICTIMS.get(index).copied().unwrap_or("owner")
}

fn sleep_until(at: Instant) -> Result<()> {
    wait_until(Duration::from_secs(60), "a moment", || Ok(Instant::now() >= at))
}

/// Kills at an instant that the seed says, once at most per victim; then `gc`.
pub(crate) fn play(net: &Namespace, seed: u64) -> Result<Report> {
    let stage = Stage::new(net, None)?;
    let before = host::all(net, &stage.installation)?;
    // Half of them in the first second: there everything is made.
    let span = if draw(seed, "early").is_multiple_of(2) { 400 } else { LIFE_MS };
    let delay = Duration::from_millis(draw(seed, "delay") % span);
    let begun = Instant::now();
    let owner = stage.start("", RUN)?;
    let beside = draw(seed, "beside").is_multiple_of(2);
    if beside {
        // Whatever it meets, it must leave a living owner's VM alone.
        stage.start("", &["gc"])?.wait(PATIENCE)?;
    }
    sleep_until(begun + delay)?;
    let victim = victim(seed);
    if victim == "hypervisor" || victim == "both" {
        stage.kill_hypervisors()?;
    }
    if victim != "hypervisor" {
        // One that has ended is a zombie still, and takes the signal.
        owner.signal(Signal::KILL)?;
    }
    let ended = owner.wait(PATIENCE)?;
    if victim == "owner and gc" {
        let gc = stage.start("", &["gc"])?;
        let instant = Instant::now() + Duration::from_millis(draw(seed, "gc") % 60);
        sleep_until(instant)?;
        gc.signal(Signal::KILL)?;
        gc.wait(PATIENCE)?;
    }
    let mut leaks = host::false_claims(&stage.installation)?;
    // A run that nobody killed in time has cleaned up after itself.
    let said = String::from_utf8_lossy(&ended.stderr);
    if victim == "hypervisor" && said.contains("was not cleaned up") {
        leaks.push(said.trim().to_owned());
    }
    let (recovery, wrong) = stage.recover()?;
    leaks.extend(wrong);
    let mut left = Vec::new();
    let clean = wait_until(Duration::from_secs(10), "a clean host", || {
        left = host::difference(&before, &host::all(net, &stage.installation)?);
        Ok(left.is_empty())
    });
    if clean.is_err() {
        leaks.extend(left);
    }
    Ok(Report { leaks, recovery, hypervisor: None })
}
