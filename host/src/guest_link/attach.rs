//! How a job goes on in another session, and how it is let go of.
//!
//! ```text
//!   Attach{what was delivered} ─► Attached{stdin taken} ─► stdin from there again, output goes on
//!                              ├► Failed, was not started, Request ─► the request itself once more
//!                              ├► Failed, was not started          ─► the command is refused
//!                              └► anything else                    ─► the guest broke the protocol
//! ```
//!
//! # Invariants
//! 1. A job that may be in the guest is attached before its request is sent again: see
//!    [`super::job`].
//! 2. The guest has [`REQUEST_DEADLINE`] for its answer; then the session ends as lost, since an
//!    honest guest may be that slow.
//! 3. A job is let go of once: in a session that lived until the guest had ended the stream.

use matchlock_wire::message::{ExecAttach, ExecFailure, ExecFailureKind, ExecOutput, Request};
use tokio::time::timeout;

use super::driver::Mux;
use super::job::{Talk, name_of};
use super::line::Line;
use super::session::REQUEST_DEADLINE;
use super::sessions::Sessions;
use super::{LinkError, codec};

/// What the guest said to an attachment.
pub(super) enum Attachment {
    /// It goes on.
    Made,
    /// The request has not reached the guest before.
    Unknown(ExecFailure),
    /// The command was not executed.
    Refused(ExecFailure),
}

impl Talk {
    /// Asks for the job's attachment to this stream.
    ///
    /// # Errors
    /// The cause of the session's end.
    pub(super) async fn attach(&self, line: &mut Line) -> Result<Attachment, LinkError> {
        let output_offset = self.state().output.rewind();
        let request = Request::Attach(ExecAttach { job: self.id, output_offset });
        let ending = line.ending().clone();
        let answer = async {
            line.request(request).map_err(|error| {
                ending.end(LinkError::Lost { cause: codec::with_sources(&error) })
            })?;
            let answer = self.attached(line.answer().await?).map_err(|cause| ending.end(cause))?;
            if matches!(answer, Attachment::Unknown(_)) {
                line.finish().await;
            }
            Ok(answer)
        };
        match timeout(REQUEST_DEADLINE, answer).await {
            Ok(answer) => answer,
            Err(_) => {
                let cause = format!("it did not answer an attachment within {REQUEST_DEADLINE:?}");
                Err(ending.end(LinkError::Lost { cause }))
            }
        }
    }

    /// Takes the answer to an attachment.
    fn attached(&self, answer: ExecOutput) -> Result<Attachment, LinkError> {
        let mut state = self.state();
        let violation = |what: String| LinkError::Protocol { what };
        match answer {
            ExecOutput::Attached { stdin_offset } => {
                state.stdin.rewind(stdin_offset).map_err(violation)?;
                if !state.started {
                    self.start(&mut state);
                }
                Ok(Attachment::Made)
            }
            ExecOutput::Failed(failure) if state.started => Err(violation(format!(
                "it does not go on with a command that it has started: {}",
                codec::clean(&failure.message)
            ))),
            // Besides an unknown job this kind stands for a request that is wrong in itself: that one
            // is refused again.
            ExecOutput::Failed(failure) if failure.kind == ExecFailureKind::Request => {
                state.stdin.rewind(0).map_err(violation)?;
                Ok(Attachment::Unknown(failure))
            }
            ExecOutput::Failed(failure) => Ok(Attachment::Refused(failure)),
            other => Err(violation(format!("it answered an attachment with {}", name_of(&other)))),
        }
    }

    /// Sees that the guest lets go of the job, in as many sessions as it takes.
    pub(super) async fn part(&self, sessions: &Sessions, mut line: Option<Line>) {
        while self.state().requested {
            let line = match line.take() {
                Some(line) => line,
                None => {
                    let Ok(session) = sessions.live().await else { return };
                    let Ok(line) = self.reopen(session.mux()).await else { continue };
                    line
                }
            };
            if line.release().await {
                return;
            }
        }
    }

    /// A stream that takes the job's release. What the guest answers does not matter: a job that it
    /// does not know is released.
    async fn reopen(&self, mux: &Mux) -> Result<Line, LinkError> {
        let mut line = Line::open(mux).await?;
        let output_offset = self.state().output.rewind();
        line.request(Request::Attach(ExecAttach { job: self.id, output_offset })).map_err(
            |error| mux.ending().end(LinkError::Lost { cause: codec::with_sources(&error) }),
        )?;
        Ok(line)
    }
}
