//! The sessions of a link, one after the other, and whether there will be another one.
//!
//! ```text
//!   session ── Lost ──► none ── replace (reconnect) ──► session ── …
//!      │                 └───── given up, or the link dropped ──► over
//!      └── Protocol ─────────────────────────────────────────────► over
//! ```
//!
//! # Invariants
//! 1. A session is replaced only after its end, and never after a violation: "over" is for good.
//! 2. A link that was given up goes on until its session ends. The cause of that is the last word.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::LinkError;
use super::session::Requests;

/// The session of now and the end of all.
#[derive(Debug)]
pub(super) struct Sessions {
    current: watch::Sender<Requests>,
    given_up: CancellationToken,
}

impl Sessions {
    /// Begins with this session; there will be no other one once `given_up` is cancelled.
    pub(super) fn new(first: Requests, given_up: CancellationToken) -> Self {
        Self { current: watch::Sender::new(first), given_up }
    }

    /// The session of now, whether it has ended or not.
    pub(super) fn current(&self) -> Requests {
        self.current.borrow().clone()
    }

    /// Waits for a session that has not ended.
    ///
    /// # Errors
    /// The cause of the last one's end, when there will be none.
    pub(super) async fn live(&self) -> Result<Requests, LinkError> {
        let mut current = self.current.subscribe();
        loop {
            let session = current.borrow_and_update().clone();
            let Some(cause) = session.mux().ending().now() else { return Ok(session) };
            if matches!(cause, LinkError::Protocol { .. }) {
                return Err(cause);
            }
            tokio::select! {
                biased;
                changed = current.changed() => if changed.is_err() { return Err(cause) },
                () = self.given_up.cancelled() => return Err(cause),
            }
        }
    }

    /// Waits until there is no session and will be none; the cause of the last one's end.
    pub(super) async fn over(&self) -> LinkError {
        loop {
            match self.live().await {
                Ok(session) => session.mux().ending().ended().await,
                Err(cause) => return cause,
            };
        }
    }

    /// Whether another session may be begun.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn may_begin(&self) -> Result<(), LinkError> {
        let ended = self.current.borrow().mux().ending().now();
        match ended {
            Some(cause @ LinkError::Protocol { .. }) => Err(cause),
            ended if self.given_up.is_cancelled() => {
                Err(ended
                    .unwrap_or_else(|| LinkError::Lost { cause: "it was given up".to_owned() }))
            }
            _ => Ok(()),
        }
    }

    /// Puts a new session in place of the one that has ended.
    pub(super) fn replace(&self, session: Requests) {
        self.current.send_replace(session);
    }

    /// There will be no other session.
    pub(super) fn give_up(&self) {
        self.given_up.cancel();
    }

    /// Waits until the link is given up.
    pub(super) async fn given_up(&self) {
        self.given_up.cancelled().await;
    }
}
