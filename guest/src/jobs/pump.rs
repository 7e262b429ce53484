//! Moves bytes between a command's pipes and its job, and notices its end.
//!
//! ```text
//!   report ─► decided ─► stdout, stderr ─► Output (stops at the window)
//!                        Stdin ─► stdin
//!   end of the init ─► what is left in the pipes ─► Exited
//! ```
//!
//! # Invariants
//! 1. Nothing is read that there is no room for: the command blocks instead.
//! 2. After the init's end every writer of the namespace is gone, so what is in the pipes is all
//!    there will be: "empty" is the end, even if somebody elsewhere still holds a pipe open.
//!
//! # Failure
//! A pipe that cannot be read is at its end, with a line on the console. A released job's pump
//! lets go of the pipes at once.

use std::io;
use std::rc::Rc;

use matchlock_wire::message::{ExitStatus, OutputStream};
use rustix::process::WaitStatus;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::Jobs;
use super::job::Job;
use crate::boot::console;
use crate::launch::{Command, Launched, Report, explain};

/// How much is read from a pipe at once.
const READ_BYTES: usize = 64 * 1024;

/// Everything of a job but the job.
pub(super) struct Pipes {
    report: pipe::Receiver,
    status: std::os::fd::OwnedFd,
    ended: oneshot::Receiver<WaitStatus>,
    stdin: Option<pipe::Sender>,
    output: [Option<pipe::Receiver>; 2],
}

const STREAMS: [OutputStream; 2] = [OutputStream::Stdout, OutputStream::Stderr];

/// Makes a job of a launched command and the pipes to be pumped.
pub(super) fn split(id: matchlock_wire::message::JobId, launched: Launched) -> (Rc<Job>, Pipes) {
    let job = Rc::new(Job::new(id, launched.process, launched.stdin.is_some()));
    let pipes = Pipes {
        report: launched.report,
        status: launched.status,
        ended: launched.ended,
        stdin: launched.stdin,
        output: [Some(launched.stdout), Some(launched.stderr)],
    };
    (job, pipes)
}

/// Follows a command from its clone to its end.
pub(super) async fn run(jobs: Rc<Jobs>, job: Rc<Job>, command: Command, pipes: Pipes) {
    let failure = match Report::read(pipes.report).await {
        Ok(report) => report.map(|report| explain(&command, report)),
        // What became of the command shows in its end.
        Err(error) => {
            console::failure("cannot read a command's report", &error);
            None
        }
    };
    drop(command);
    job.decide(failure.clone());
    if let Some(failure) = failure {
        jobs.start_failed(&job, failure);
        return;
    }
    let stdin = pump_stdin(&job, pipes.stdin);
    let output = pump_output(&jobs, &job, pipes.output, pipes.ended);
    // Stdin lasts as long as the command, at most.
    let ended = tokio::select! {
        biased;
        () = job.released.wait() => return,
        ended = output => ended,
        () = async { stdin.await; std::future::pending().await } => return,
    };
    job.with_stdin(super::stdin::Stdin::close);
    job.finish(exit_status(&pipes.status, ended));
}

// ---- output --------------------------------------------------------------------------------

/// Reads both pipes until nothing more can come. Returns how the init ended.
async fn pump_output(
    jobs: &Jobs,
    job: &Job,
    mut pipes: [Option<pipe::Receiver>; 2],
    mut ended: oneshot::Receiver<WaitStatus>,
) -> Option<WaitStatus> {
    loop {
        wait_for_space(job).await;
        let [stdout, stderr] = &pipes;
        let index = tokio::select! {
            end = &mut ended => {
                drain(jobs, job, pipes).await;
                return end.ok();
            }
            () = readable(stdout.as_ref()) => 0,
            () = readable(stderr.as_ref()) => 1,
        };
        let Some(pipe) = &pipes[index] else { continue };
        let result = pipe.try_io(|| read_some(jobs, job, pipe, STREAMS[index]));
        if !go_on(&result) {
            pipes[index] = None;
        }
    }
}

async fn readable(pipe: Option<&pipe::Receiver>) {
    match pipe {
        Some(pipe) => {
            if let Err(error) = pipe.readable().await {
                console::failure("cannot wait for a command's output", &error);
            }
        }
        None => std::future::pending().await,
    }
}

async fn wait_for_space(job: &Job) {
    while job.output_space() == 0 {
        job.space_freed.notified().await;
    }
}

/// One read, straight into the job. `Ok(0)` is the pipe's end.
fn read_some(
    jobs: &Jobs,
    job: &Job,
    pipe: &pipe::Receiver,
    stream: OutputStream,
) -> io::Result<usize> {
    jobs.with_scratch(READ_BYTES, |scratch| {
        let limit = scratch.len().min(job.output_space());
        let count = rustix::io::read(pipe, &mut scratch[..limit])?;
        job.with_output(|output| output.push(stream, &scratch[..count]));
        Ok(count)
    })
}

/// Whether a pipe is to be read again after this.
fn go_on(result: &io::Result<usize>) -> bool {
    match result {
        Ok(count) => *count > 0,
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => true,
            _ => {
                console::failure("cannot read a command's output", error);
                false
            }
        },
    }
}

/// Reads what is left in the pipes of a command that has ended.
async fn drain(jobs: &Jobs, job: &Job, pipes: [Option<pipe::Receiver>; 2]) {
    for (pipe, stream) in pipes.into_iter().zip(STREAMS) {
        let Some(pipe) = pipe else { continue };
        loop {
            wait_for_space(job).await;
            // Not by readiness: the question is what is there now.
            match read_some(jobs, job, &pipe, stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                result => {
                    if !go_on(&result) {
                        break;
                    }
                }
            }
        }
    }
}

// ---- stdin ---------------------------------------------------------------------------------

/// Writes stdin into the pipe until its end, or until the command closes it.
async fn pump_stdin(job: &Job, pipe: Option<pipe::Sender>) {
    let Some(pipe) = pipe else { return };
    loop {
        let (at_end, empty) = job.with_stdin(|stdin| (stdin.at_end(), stdin.next().is_empty()));
        if at_end {
            break;
        }
        if empty {
            job.stdin_came.notified().await;
            continue;
        }
        let result = job.with_stdin(|stdin| {
            let count = pipe.try_write(stdin.next())?;
            stdin.take(count);
            io::Result::Ok(())
        });
        match result {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if pipe.writable().await.is_err() {
                    break;
                }
            }
            // The command has closed its end.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            Err(error) => {
                console::failure("cannot write a command's stdin", &error);
                break;
            }
        }
    }
    job.with_stdin(super::stdin::Stdin::close);
}

// ---- the end -------------------------------------------------------------------------------

/// How the command ended: in its init's words, or killed together with it.
fn exit_status(status: &std::os::fd::OwnedFd, init: Option<WaitStatus>) -> ExitStatus {
    let mut bytes = [0; 4];
    if let Ok(4) = rustix::io::read(status, &mut bytes) {
        return from_raw(i32::from_ne_bytes(bytes));
    }
    // The init had no time for its last words: it was killed, with all of its namespace.
    let signal = init.and_then(WaitStatus::terminating_signal);
    ExitStatus::Signal(small(signal.unwrap_or(libc::SIGKILL)))
}

fn from_raw(status: i32) -> ExitStatus {
    if libc::WIFEXITED(status) {
        ExitStatus::Code(small(libc::WEXITSTATUS(status)))
    } else {
        ExitStatus::Signal(small(libc::WTERMSIG(status)))
    }
}

fn small(number: i32) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_statuses_are_codes_or_signals() {
        assert_eq!(from_raw(0), ExitStatus::Code(0));
        assert_eq!(from_raw(7 << 8), ExitStatus::Code(7));
        assert_eq!(from_raw(255 << 8), ExitStatus::Code(255));
        assert_eq!(from_raw(9), ExitStatus::Signal(9));
        assert_eq!(from_raw(11 | 0x80), ExitStatus::Signal(11));
    }
}
