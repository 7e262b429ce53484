//! SIGINT, SIGTERM and SIGHUP: the first asks for a graceful stop, the second forces it, the
//! third leaves at once.

use std::io;
use std::time::Duration;

use matchlock_model::exit;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::stderr;

/// A signal that asks us to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// SIGHUP.
    Hangup,
    /// SIGINT.
    Interrupt,
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
}

impl Interrupts {
    /// Takes these signals over from their default actions.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn install() -> io::Result<Self> {
        let mut hangup = signal(SignalKind::hangup())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let (send, arrived) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut count = 0_u32;
            loop {
                let which = next(&mut hangup, &mut interrupt, &mut terminate).await;
                count += 1;
                if count >= 3 {
                    leave_at_once(which);
                }
                if send.send(which).is_err() {
                    return;
                }
            }
        });
        Ok(Self { arrived, first: None })
    }

    /// The next signal.
    pub async fn next(&mut self) -> Interrupt {
        match self.arrived.recv().await {
            Some(which) => {
                self.first.get_or_insert(which);
                which
            }
            // The listening task never ends before this end is dropped.
            None => std::future::pending().await,
        }
    }

    /// The first signal that was taken from [`Self::next`], if any.
    #[must_use]
    pub const fn first(&self) -> Option<Interrupt> {
        self.first
    }
}

async fn next(hangup: &mut Signal, interrupt: &mut Signal, terminate: &mut Signal) -> Interrupt {
    tokio::select! {
        _ = hangup.recv() => Interrupt::Hangup,
        _ = interrupt.recv() => Interrupt::Interrupt,
        _ = terminate.recv() => Interrupt::Terminate,
    }
}

#[expect(clippy::exit, reason = "the user asked for the third time; `matchlock gc` finishes")]
fn leave_at_once(which: Interrupt) -> ! {
    let text = "matchlock: leaving at once; run `matchlock gc` to finish the clean-up\n";
    stderr::write(text, Duration::ZERO);
    std::process::exit(i32::from(which.exit_code()));
}
