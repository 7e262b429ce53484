//! SIGINT, SIGTERM, SIGQUIT and SIGHUP: the first asks for a graceful stop, the second forces it, the
//! third leaves at once. Only the first SIGHUP counts: a terminal that is closed sends several, by
//! the kernel and by the shell.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use matchlock_model::exit;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::{stderr, terminal};

/// A signal that asks us to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// SIGHUP.
    Hangup,
    /// SIGINT.
    Interrupt,
    /// SIGQUIT.
    Quit,
    /// SIGTERM.
    Terminate,
}

impl Interrupt {
    /// The signal's number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Hangup => 1,
            Self::Interrupt => 2,
            Self::Quit => 3,
            Self::Terminate => 15,
        }
    }

    /// The exit code of a command that was interrupted so.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        exit::by_signal(self.number())
    }
}

/// The signals that arrive from now on.
#[derive(Debug)]
pub struct Interrupts {
    arrived: mpsc::UnboundedReceiver<Interrupt>,
    first: Option<Interrupt>,
    is_hung_up: bool,
}

impl Interrupts {
    /// Takes these signals over from their default actions.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn install() -> io::Result<Self> {
        let mut early = Vec::new();
        let mut hangup = listen(Interrupt::Hangup, &mut early)?;
        let mut interrupt = listen(Interrupt::Interrupt, &mut early)?;
        let mut quit = listen(Interrupt::Quit, &mut early)?;
        let mut terminate = listen(Interrupt::Terminate, &mut early)?;
        let (send, arrived) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut count = 0_u32;
            let mut is_hung_up = false;
            let mut early = early.into_iter();
            loop {
                let before = early.next();
                let which = tokio::select! {
                    biased;
                    Some(which) = std::future::ready(before) => which,
                    _ = hangup.recv() => Interrupt::Hangup,
                    _ = interrupt.recv() => Interrupt::Interrupt,
                    _ = quit.recv() => Interrupt::Quit,
                    _ = terminate.recv() => Interrupt::Terminate,
                };
                if which == Interrupt::Hangup && std::mem::replace(&mut is_hung_up, true) {
                    continue;
                }
                count += 1;
                if count >= 3 {
                    leave_at_once(which);
                }
                if send.send(which).is_err() {
                    return;
                }
            }
        });
        Ok(Self { arrived, first: None, is_hung_up: false })
    }

    /// The next signal.
    pub async fn next(&mut self) -> Interrupt {
        loop {
            match self.arrived.recv().await {
                // That is known already.
                Some(Interrupt::Hangup) if self.is_hung_up => {}
                Some(which) => {
                    self.first.get_or_insert(which);
                    return which;
                }
                // The listening task never ends before this end is dropped.
                None => std::future::pending().await,
            }
        }
    }

    /// Our terminal is gone: as if a SIGHUP had come. The one that may still come is the same.
    pub fn hang_up(&mut self) -> Interrupt {
        self.is_hung_up = true;
        *self.first.get_or_insert(Interrupt::Hangup)
    }

    /// The first signal that was taken from [`Self::next`], if any.
    #[must_use]
    pub const fn first(&self) -> Option<Interrupt> {
        self.first
    }
}

/// Takes a signal over. Tokio installs its handler a moment before it listens; what came in between
/// would be lost, and is added to `early`. (It may then be heard twice: a second signal, which forces.)
fn listen(which: Interrupt, early: &mut Vec<Interrupt>) -> io::Result<Signal> {
    let number = i32::from(which.number());
    let came = Arc::new(AtomicBool::new(false));
    let noted = signal_hook::flag::register(number, Arc::clone(&came))?;
    let listening = signal(SignalKind::from_raw(number))?;
    signal_hook::low_level::unregister(noted);
    if came.load(Ordering::SeqCst) {
        early.push(which);
    }
    Ok(listening)
}

#[expect(clippy::exit, reason = "the user asked for the third time; `matchlock gc` finishes")]
fn leave_at_once(which: Interrupt) -> ! {
    terminal::restore();
    let text = "matchlock: leaving at once; run `matchlock gc` to finish the clean-up\n";
    stderr::write(text, Duration::ZERO);
    std::process::exit(i32::from(which.exit_code()));
}
