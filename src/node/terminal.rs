//! Our own terminal, while a guest's takes its place: raw mode and the way back from it, its size,
//! and what the user's shell does with us meanwhile.
//!
//! ```text
//!             enter (foreground)            guard dropped · restore · panic on the main thread
//!   Untouched ──────────────────► Raw ────────────────────────────────────────► Untouched
//!       │ enter (background)      │ ▲                                             ▲
//!       ▼                 SIGTSTP │ │ SIGCONT, in the foreground                  │
//!   Suspended ◄───────────────────┘ │                                             │
//!       └───────────────────────────┴─────────────────────────────────────────────┘
//! ```
//!
//! # Invariants
//! 1. The modes that were there before are kept outside of any task, in [`STATE`]: whoever ends the
//!    process gives them back with [`restore`], also from a panic or the third signal.
//! 2. A terminal that is somebody else's at the moment (we are in the background) is not touched.
//! 3. Raw mode ends before anything is printed that is not the guest's. What must be printed all the
//!    same (a log line, another thread's panic) ends its lines as raw mode needs it.
//!
//! # When things go wrong
//! * **The terminal is gone**: there is nothing to restore, which is no error.
//! * **SIGKILL, SIGSTOP**: nobody can restore it. After a SIGSTOP the shell does, and a SIGCONT makes
//!   it raw again; after a SIGKILL the user types `reset`.

use std::io;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use matchlock_model::exec::{Terminal, TerminalSize};
use rustix::io::Errno;
use rustix::process::{Signal, getpgid, getpgrp, getpid, getppid, getsid, kill_process};
use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{
    OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Where stdin's terminal is in its life. The modes are those that it had before.
enum State {
    Untouched,
    Raw(Termios),
    Suspended(Termios),
}

static STATE: Mutex<State> = Mutex::new(State::Untouched);

/// Nothing may be printed while it is held: what prints asks [`is_raw`].
fn state() -> MutexGuard<'static, State> {
    // Whatever panicked, the state is whole: it is only replaced.
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether our stdin is a terminal.
#[must_use]
pub fn is_stdin() -> bool {
    isatty(stdin())
}

/// The terminal that a guest's command gets for ours: of our size, and of our kind.
#[must_use]
pub fn like_ours() -> Terminal {
    let term = std::env::var_os("TERM").and_then(|term| term.into_string().ok());
    Terminal { size: size(), term: term.filter(|term| !term.is_empty()) }
}

/// The size of our terminal, whichever of our streams is one.
fn size() -> TerminalSize {
    for stream in [stdout(), stdin(), stderr()] {
        match tcgetwinsize(stream) {
            Ok(found) if (found.ws_row, found.ws_col) != (0, 0) => {
                return TerminalSize { rows: found.ws_row, cols: found.ws_col };
            }
            // No terminal, or one that does not know.
            Ok(_) | Err(_) => {}
        }
    }
    TerminalSize::default()
}

/// Gives the terminal back when dropped.
#[derive(Debug)]
#[must_use = "the terminal is given back when it is dropped"]
pub struct RawMode(());

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes our terminal raw: every key goes to whoever reads it.
///
/// # Errors
/// When it is none, or is gone.
pub fn enter() -> io::Result<RawMode> {
    static HOOK: Once = Once::new();
    HOOK.call_once(panic_on_our_lines);
    let mut state = state();
    let modes = tcgetattr(stdin())?;
    *state = if in_foreground() {
        set_raw(&modes)?;
        State::Raw(modes)
    } else {
        // As soon as it is ours again.
        State::Suspended(modes)
    };
    Ok(RawMode(()))
}

/// Gives the terminal back as it was, if it is ours and not given back yet.
pub fn restore() {
    let before = std::mem::replace(&mut *state(), State::Untouched);
    if let State::Raw(modes) = before {
        give_back(&modes);
    }
}

/// Whether our terminal is raw now.
#[must_use]
pub fn is_raw() -> bool {
    matches!(&*state(), State::Raw(_))
}

/// Gives the terminal back for a while. False if it was not raw.
fn suspend() -> bool {
    let modes = {
        let mut state = state();
        let State::Raw(modes) = &*state else { return false };
        let modes = modes.clone();
        *state = State::Suspended(modes.clone());
        modes
    };
    give_back(&modes);
    true
}

/// Makes a terminal raw (again) that should be, if it is ours.
fn resume() {
    let result = {
        let mut state = state();
        let (State::Raw(modes) | State::Suspended(modes)) = &*state else { return };
        if !in_foreground() {
            return;
        }
        let modes = modes.clone();
        let result = set_raw(&modes);
        *state = State::Raw(modes);
        result
    };
    if let Err(error) = result {
        tracing::debug!(%error, "the terminal is gone");
    }
}

fn set_raw(modes: &Termios) -> io::Result<()> {
    let mut raw = modes.clone();
    raw.make_raw();
    // What was typed before is kept: the guest reads it.
    Ok(tcsetattr(stdin(), OptionalActions::Now, &raw)?)
}

fn give_back(modes: &Termios) {
    if in_foreground()
        && let Err(error) = tcsetattr(stdin(), OptionalActions::Now, modes)
    {
        tracing::debug!(%error, "the terminal is gone");
    }
}

/// Whether the terminal is ours to change: a change from the background would stop us.
fn in_foreground() -> bool {
    match tcgetpgrp(stdin()) {
        Ok(group) => group == getpgrp(),
        // Nobody's job control: it is not our controlling terminal, or is that of another container.
        Err(Errno::NOTTY | Errno::OPNOTSUPP) => true,
        Err(_) => false,
    }
}

/// A panic is told on a terminal that shows lines. If that panic ends the process, it stays so;
/// elsewhere whoever supervises goes on, and so does raw mode.
fn panic_on_our_lines() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let was_raw = suspend();
        before(panic);
        let ends_us = std::thread::current().name() == Some("main");
        if was_raw && !ends_us {
            resume();
        }
    }));
}

/// Follows our terminal from now on, until this process ends: its size, and the shell's wish that
/// we stop or go on.
///
/// # Errors
/// When the signals cannot be received.
pub fn follow(to: watch::Sender<TerminalSize>) -> io::Result<()> {
    let mut resized = signal(SignalKind::window_change())?;
    let mut continued = signal(SignalKind::from_raw(Signal::CONT.as_raw()))?;
    let mut stopped = signal(SignalKind::from_raw(Signal::TSTP.as_raw()))?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = resized.recv() => {}
                _ = continued.recv() => resume(),
                _ = stopped.recv() => {
                    stop();
                    continue;
                }
            }
            let size = size();
            to.send_if_modified(|known| std::mem::replace(known, size) != size);
        }
    });
    Ok(())
}

/// Stops this process, as SIGTSTP does to one that takes no notice of it: not if nobody is there
/// who could let it go on.
fn stop() {
    if !is_a_job() {
        return;
    }
    suspend();
    if let Err(error) = kill_process(getpid(), Signal::STOP) {
        tracing::warn!(%error, "could not stop this process");
        resume();
    }
}

/// Whether our parent is a shell that keeps us as a job: of our session, in another group.
fn is_a_job() -> bool {
    let Some(parent) = getppid() else { return false };
    match (getsid(Some(parent)), getpgid(Some(parent))) {
        (Ok(session), Ok(group)) => Ok(session) == getsid(None) && group != getpgrp(),
        _ => false,
    }
}
