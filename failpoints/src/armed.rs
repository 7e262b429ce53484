//! With the feature: points that fail when the environment says so.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::sync::OnceLock;

use rustix::process::{Signal, getpid, kill_process};

use crate::Area;

/// The variable that names the file in which passed points are noted.
const LOG: &str = "MATCHLOCK_FAILPOINTS_LOG";

/// The variable that names the mutation to turn on.
const MUTATION: &str = "MATCHLOCK_MUTATION";

/// A failure that a test injected.
#[derive(Debug, Clone)]
pub struct Injected {
    point: String,
}

impl fmt::Display for Injected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "injected at {}", self.point)
    }
}

impl std::error::Error for Injected {}

impl From<Injected> for io::Error {
    fn from(injected: Injected) -> Self {
        Self::other(injected)
    }
}

/// Arms the points that `FAILPOINTS` names, until the answer is dropped.
#[must_use]
pub fn arm() -> impl Sized {
    fail::FailScenario::setup()
}

/// The log, opened once. Appended to in one write per line, so that threads do not mix.
fn log() -> Option<&'static File> {
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    FILE.get_or_init(|| {
        let path = std::env::var_os(LOG)?;
        match OpenOptions::new().append(true).create(true).open(&path) {
            Ok(file) => Some(file),
            // Without it the suite could not tell what was passed: better none of it.
            Err(error) => panic!("could not open {LOG}={}: {error}", path.display()),
        }
    })
    .as_ref()
}

fn note(line: &str) {
    if let Some(mut file) = log()
        && let Err(error) = file.write_all(line.as_bytes())
    {
        panic!("could not write to the log of failpoints: {error}");
    }
}

/// Sends this process a signal. Returns after a SIGSTOP only, once it is continued.
fn signal_self(signal: Signal) {
    if let Err(errno) = kill_process(getpid(), signal) {
        panic!("could not signal this process: {errno}");
    }
}

pub(crate) fn hit(area: &Area, step: &str, when: &str) -> Result<(), Injected> {
    let point = format!("{}.{step}.{when}", area.name);
    assert!(area.steps.contains(&step), "the failpoint {point} is in no list");
    note(&format!("hit {point}\n"));
    let act = |action: Option<String>| {
        let action = action.unwrap_or_default();
        note(&format!("fired {point} {action}\n"));
        match action.as_str() {
            "kill" => {
                signal_self(Signal::KILL);
                loop {
                    std::thread::park();
                }
            }
            "stop" => {
                signal_self(Signal::STOP);
                Ok(())
            }
            "panic" => panic!("injected at {point}"),
            "error" => Err(Injected { point: point.clone() }),
            other => panic!("unknown action {other:?} of the failpoint {point}"),
        }
    };
    fail::eval(&point, act).unwrap_or(Ok(()))
}

fn mutation() -> Option<&'static str> {
    static NAME: OnceLock<Option<String>> = OnceLock::new();
    NAME.get_or_init(|| std::env::var(MUTATION).ok()).as_deref()
}

pub(crate) fn mutated(name: &str) -> bool {
    mutation() == Some(name)
}

pub(crate) fn skips(area: &Area, step: &str) -> bool {
    let skipped = mutation().and_then(|name| name.strip_prefix("skip:"));
    skipped.and_then(|name| name.split_once('.')) == Some((area.name, step))
}
