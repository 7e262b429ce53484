//! One `matchlock run`, taken apart by the times in its log.

use std::process::Stdio;
use std::time::SystemTime;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use matchlock_test_support::Installation;

/// What happened when, in milliseconds since the start of the program.
pub(crate) struct Life {
    pub(crate) before_spawn: f64,
    /// From the spawn to the agent's answer.
    pub(crate) ready: f64,
    /// From the spawn to the end of the command.
    pub(crate) first_command: f64,
    pub(crate) after_end: f64,
    pub(crate) whole: f64,
    pub(crate) effects: Vec<Span>,
}

/// An effect of the VM's actor, or the command.
pub(crate) struct Span {
    pub(crate) name: String,
    pub(crate) begin: f64,
    pub(crate) end: f64,
}

/// How a microVM begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    Cold,
    Warm,
}

impl Start {
    /// For a table.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
        }
    }
}

/// Runs `true` in a microVM.
pub(crate) fn of_a_run(installation: &Installation, start: Start) -> Result<Life> {
    let mut command = installation.command(&["run", "--no-network"])?;
    if start == Start::Cold {
        command.arg("--cold");
    }
    command.args(["--image", "busybox", "--", "true"]);
    let filter = "warn,matchlock_actors=debug";
    command.env("MATCHLOCK_LOG", filter).stdout(Stdio::null()).stderr(Stdio::piped());
    let began = Timestamp::try_from(SystemTime::now())?;
    let output = command.output()?;
    let ended = Timestamp::try_from(SystemTime::now())?;
    let log = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the run failed: {log}");
    let is_warm = log.contains("started from a snapshot");
    ensure!(is_warm == (start == Start::Warm), "it did not start as it was to: {log}");
    read(&log, began, since(began, ended)).with_context(|| log.into_owned())
}

fn since(began: Timestamp, at: Timestamp) -> f64 {
    at.duration_since(began).as_secs_f64() * 1e3
}

fn read(log: &str, began: Timestamp, whole: f64) -> Result<Life> {
    let mut effects = Vec::new();
    let mut stop = None;
    for line in log.lines() {
        let Some((time, text)) = line.split_once(' ') else { continue };
        let Ok(time) = time.parse::<Timestamp>() else { continue };
        let end = since(began, time);
        if text.contains("event=Stop(") {
            stop.get_or_insert(end);
        }
        let (Some(name), Some(took)) = (field(text, "effect="), field(text, "took_us=")) else {
            continue;
        };
        let took: f64 = took.parse()?;
        effects.push(Span { name: name.to_owned(), begin: end - took / 1e3, end });
    }
    let first = |name: &str| {
        let found = effects.iter().find(|span| span.name == name);
        found.with_context(|| format!("the log has no {name}"))
    };
    let (spawn, ready) = (first("launch")?.begin, first("connect_guest")?.end);
    let up = first("configure_guest")?.end;
    let stop = stop.context("the log has no stop")?;
    effects.push(Span { name: "the command".to_owned(), begin: up, end: stop });
    effects.sort_by(|a, b| a.begin.total_cmp(&b.begin));
    Ok(Life {
        before_spawn: spawn,
        ready: ready - spawn,
        first_command: stop - spawn,
        after_end: whole - stop,
        whole,
        effects,
    })
}

/// The value of a field of a line of the log.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.split_once(name)?.1.split(' ').next()
}
