//! One command with its buffers, its end, and the stream that is attached to it.
//!
//! ```text
//!              launch                    end of the command, all output read
//!   Starting ─────────► Running ────────────────────────────────► Exited
//!      │ report of the child   └───────────── Release ──────────────┤
//!      ▼                                                            ▼
//!   Failed (told to whoever asks)                               released: killed; a terminal is
//!                                                               hung up first, by the pump
//! ```
//!
//! # Invariants
//! 1. At most one stream is attached; a new one evicts the old one.
//! 2. Only the attached stream is woken, for whatever there is to send.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use matchlock_wire::frame::MAX_CHUNK_BYTES;
use matchlock_wire::message::{ExecFailure, ExecOutput, ExitStatus, JobId, TerminalSize};
use rustix::process::Pid;
use tokio::sync::Notify;

use super::output::Output;
use super::stdin::{Stdin, StdinError};
use crate::boot::console;
use crate::latch::Latch;
use crate::launch::{Process, Terminal};

/// A stream's hold on a job.
#[derive(Debug, Default)]
pub struct Attachment {
    /// There may be something to send.
    pub wake: Notify,
    /// Another stream has taken over.
    pub evicted: Latch,
    sent: Cell<u64>,
    stdin_acknowledged: Cell<u64>,
    exit_sent: Cell<bool>,
}

#[derive(Debug)]
struct State {
    output: Output,
    stdin: Stdin,
    exit: Option<ExitStatus>,
    attachment: Option<Rc<Attachment>>,
}

/// A job.
#[derive(Debug)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Set once it is known whether the command was executed.
    pub decided: Latch,
    /// Set by `Release`.
    pub released: Latch,
    /// Output was acknowledged: there may be space.
    pub space_freed: Notify,
    /// Stdin, or its end, has come.
    pub stdin_came: Notify,
    /// `None` for a job without a command.
    process: Option<Process>,
    /// Its terminal, which goes with the pump: nobody else keeps it from being hung up.
    terminal: Option<Weak<Terminal>>,
    failure: RefCell<Option<ExecFailure>>,
    state: RefCell<State>,
}

impl Job {
    /// A job whose small init was cloned, or one without a command.
    pub fn new(
        id: JobId,
        process: Option<Process>,
        has_stdin: bool,
        terminal: Option<&Rc<Terminal>>,
    ) -> Self {
        Self {
            id,
            decided: Latch::default(),
            released: Latch::default(),
            space_freed: Notify::new(),
            stdin_came: Notify::new(),
            process,
            terminal: terminal.map(Rc::downgrade),
            failure: RefCell::new(None),
            state: RefCell::new(State {
                output: Output::default(),
                stdin: Stdin::new(has_stdin),
                exit: None,
                attachment: None,
            }),
        }
    }

    /// The command was executed, or was not.
    pub fn decide(&self, failure: Option<ExecFailure>) {
        *self.failure.borrow_mut() = failure;
        self.decided.set();
    }

    /// Why the command was not executed, once that is decided.
    pub fn failure(&self) -> Option<ExecFailure> {
        self.failure.borrow().clone()
    }

    /// The command has ended and all its output is here.
    pub fn finish(&self, exit: ExitStatus) {
        self.state.borrow_mut().exit = Some(exit);
        self.wake_stream();
    }

    /// Kills the command and lets everybody let go of the job. A command on a terminal is told
    /// before: its pump hangs the terminal up.
    pub fn release(&self) {
        self.released.set();
        if self.terminal.is_none() || !self.decided.is_set() {
            self.kill();
        }
        self.wake_stream();
    }

    /// Kills the command and everything in its namespace.
    pub fn kill(&self) {
        if let Some(process) = &self.process
            && let Err(error) = process.kill()
        {
            console::failure("cannot kill a released command", &error);
        }
    }

    /// Sends a signal to the command's process group; SIGHUP to its terminal's foreground too.
    ///
    /// # Errors
    /// When the number is no signal or the kernel refuses.
    pub fn signal(&self, number: i32) -> std::io::Result<()> {
        // Without a command there is nobody to get it.
        let Some(process) = &self.process else { return Ok(()) };
        match self.terminal.as_ref().and_then(Weak::upgrade) {
            Some(terminal) => process.signal_at(&terminal, number),
            None => process.signal(number),
        }
    }

    /// Tells the command that the guest shuts down, if it wants a signal of its own for that; the pid
    /// of its small init then.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn stop(&self) -> std::io::Result<Option<Pid>> {
        self.process.as_ref().map_or(Ok(None), Process::stop)
    }

    /// Whether the command has a terminal, or had one.
    pub fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// Sets the size of the command's terminal. One that is gone with its command has no size.
    ///
    /// # Errors
    /// When there never was one, or the kernel refuses.
    pub fn resize(&self, size: TerminalSize) -> std::io::Result<()> {
        let Some(terminal) = &self.terminal else {
            return Err(std::io::Error::other("the command has no terminal"));
        };
        terminal.upgrade().map_or(Ok(()), |terminal| terminal.resize(size))
    }

    // ---- the stream's side -----------------------------------------------------------------

    /// Attaches a stream that has output up to `offset`. Returns its hold and the offset from
    /// which stdin is to be sent.
    ///
    /// # Errors
    /// A line, when that output is not here any more or does not exist yet.
    pub fn attach(&self, offset: u64) -> Result<(Rc<Attachment>, u64), String> {
        let mut state = self.state.borrow_mut();
        let (base, end) = (state.output.base(), state.output.end());
        if offset < base || offset > end {
            return Err(format!("output offset {offset} is not between {base} and {end}"));
        }
        state.output.acknowledge(offset);
        let stdin_offset = state.stdin.rewind();
        let attachment = Rc::new(Attachment::default());
        attachment.sent.set(offset);
        attachment.stdin_acknowledged.set(stdin_offset);
        if let Some(old) = state.attachment.replace(Rc::clone(&attachment)) {
            old.evicted.set();
        }
        drop(state);
        self.space_freed.notify_one();
        Ok((attachment, stdin_offset))
    }

    /// The next message for the attached stream, if there is one now.
    pub fn next_message(&self, attachment: &Attachment) -> Option<ExecOutput> {
        let state = self.state.borrow();
        let taken = state.stdin.taken();
        if taken > attachment.stdin_acknowledged.replace(taken) {
            return Some(ExecOutput::StdinAck { offset: taken });
        }
        if let Some(chunk) = state.output.chunk(attachment.sent.get(), MAX_CHUNK_BYTES) {
            let count = u64::try_from(chunk.data.len()).unwrap_or(u64::MAX);
            attachment.sent.set(chunk.offset + count);
            return Some(ExecOutput::Output {
                stream: chunk.stream,
                offset: chunk.offset,
                data: chunk.data,
            });
        }
        let exit = state.exit?;
        (!attachment.exit_sent.replace(true)).then_some(ExecOutput::Exited(exit))
    }

    /// The host has everything before `offset`.
    ///
    /// # Errors
    /// A line, when that was never sent.
    pub fn acknowledge(&self, attachment: &Attachment, offset: u64) -> Result<(), String> {
        let sent = attachment.sent.get();
        if offset > sent {
            return Err(format!("output is acknowledged up to {offset}, but only {sent} was sent"));
        }
        self.state.borrow_mut().output.acknowledge(offset);
        self.space_freed.notify_one();
        Ok(())
    }

    /// Bytes for stdin.
    ///
    /// # Errors
    /// When the host broke the rules of stdin.
    pub fn receive_stdin(&self, offset: u64, data: &[u8]) -> Result<(), StdinError> {
        self.state.borrow_mut().stdin.receive(offset, data)?;
        self.stdin_came.notify_one();
        // Without a pipe it was taken at once.
        self.wake_stream();
        Ok(())
    }

    /// The end of stdin.
    ///
    /// # Errors
    /// When it is not where the bytes end.
    pub fn end_stdin(&self, offset: u64) -> Result<(), StdinError> {
        self.state.borrow_mut().stdin.end(offset)?;
        self.stdin_came.notify_one();
        Ok(())
    }

    // ---- the pumps' side -------------------------------------------------------------------

    /// Works on the output. The attached stream is woken afterwards.
    pub fn with_output<T>(&self, work: impl FnOnce(&mut Output) -> T) -> T {
        let result = work(&mut self.state.borrow_mut().output);
        self.wake_stream();
        result
    }

    /// How many bytes of output there is room for.
    pub fn output_space(&self) -> usize {
        self.state.borrow().output.space()
    }

    /// Works on stdin. The attached stream is woken afterwards.
    pub fn with_stdin<T>(&self, work: impl FnOnce(&mut Stdin) -> T) -> T {
        let result = work(&mut self.state.borrow_mut().stdin);
        self.wake_stream();
        result
    }

    fn wake_stream(&self) {
        if let Some(attachment) = &self.state.borrow().attachment {
            attachment.wake.notify_one();
        }
    }
}
