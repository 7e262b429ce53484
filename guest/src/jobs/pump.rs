//! Moves bytes between a command's pipes, or its terminal, and its job, and notices its end.
//!
//! ```text
//!   report ─► decided ─► stdout, stderr ─► Output (stops at the window)
//!                        Stdin ─► stdin
//!   end of the init ─► what is left in the pipes ─► Exited
//!   released, with a terminal ─► SIGHUP to its foreground, hang-up ─► what is left is killed
//! ```
//!
//! # Invariants
//! 1. Nothing is read that there is no room for: the command blocks instead.
//! 2. After the init's end every writer of the namespace is gone, so what is in the pipes is all
//!    there will be: "empty" is the end, even if somebody elsewhere still holds a pipe open.
//!
//! # Failure
//! A pipe that cannot be read is at its end, with a line on the console. A released job's pump
//! lets go of the pipes or the terminal at once.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use matchlock_wire::message::{ExitStatus, JobId, OutputStream};
use rustix::process::WaitStatus;
use tokio::io::Interest;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::Jobs;
use super::job::Job;
use super::stdin::Stdin;
use crate::boot::console;
use crate::launch::{Command, End, Launched, Report, Terminal, explain};

/// How much is read from a pipe at once.
const READ_BYTES: usize = 64 * 1024;

/// How long a command has to act on the end of its terminal.
const HANG_UP: Duration = Duration::from_millis(500);

/// Everything of a job but the job.
pub(super) struct Pipes {
    report: pipe::Receiver,
    status: OwnedFd,
    ended: oneshot::Receiver<WaitStatus>,
    stdin: Option<End>,
    output: [Option<End>; 2],
    terminal: Option<Rc<Terminal>>,
}

const STREAMS: [OutputStream; 2] = [OutputStream::Stdout, OutputStream::Stderr];

/// Makes a job of a launched command and the pipes to be pumped.
pub(super) fn split(id: JobId, launched: Launched) -> (Rc<Job>, Pipes) {
    let has_stdin = launched.stdin.is_some();
    let (process, terminal) = (Some(launched.process), launched.terminal.as_ref());
    let job = Rc::new(Job::new(id, process, has_stdin, terminal));
    let pipes = Pipes {
        report: launched.report,
        status: launched.status,
        ended: launched.ended,
        stdin: launched.stdin,
        output: [Some(launched.stdout), launched.stderr],
        terminal: launched.terminal,
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
    let Pipes { status, mut ended, stdin, output, terminal, .. } = pipes;
    let end = {
        let stdin = pump_stdin(&job, stdin);
        let output = pump_output(&jobs, &job, output, &mut ended);
        // Stdin lasts as long as the command, at most.
        tokio::select! {
            biased;
            () = job.released.wait() => None,
            end = output => Some(end),
            () = async { stdin.await; std::future::pending().await } => None,
        }
    };
    match (end, terminal) {
        (Some(end), _) => {
            job.with_stdin(Stdin::close);
            job.finish(exit_status(&status, end));
        }
        (None, Some(terminal)) => hang_up(&job, terminal, ended).await,
        (None, None) => {}
    }
}

/// Takes the terminal of a released command away, and then the command. Both pumps have let go of
/// it before.
async fn hang_up(job: &Job, terminal: Rc<Terminal>, ended: oneshot::Receiver<WaitStatus>) {
    if let Err(error) = terminal.hang_up() {
        console::failure("cannot tell a command that its terminal goes", &error);
    }
    drop(terminal);
    if tokio::time::timeout(HANG_UP, ended).await.is_err() {
        job.kill();
    }
}

// ---- output --------------------------------------------------------------------------------

/// Reads both pipes until nothing more can come. Returns how the init ended.
async fn pump_output(
    jobs: &Jobs,
    job: &Job,
    mut pipes: [Option<End>; 2],
    ended: &mut oneshot::Receiver<WaitStatus>,
) -> Option<WaitStatus> {
    loop {
        wait_for_space(job).await;
        let [stdout, stderr] = &pipes;
        let index = tokio::select! {
            end = &mut *ended => {
                drain(jobs, job, pipes).await;
                return end.ok();
            }
            () = readable(stdout.as_ref()) => 0,
            () = readable(stderr.as_ref()) => 1,
        };
        let Some(pipe) = &pipes[index] else { continue };
        let read = |fd: &OwnedFd| read_some(jobs, job, fd, STREAMS[index]);
        let result = pipe.fd().try_io(Interest::READABLE, read);
        if !go_on(&result) {
            pipes[index] = None;
        }
    }
}

async fn readable(pipe: Option<&End>) {
    match pipe {
        Some(pipe) => match pipe.fd().readable().await {
            Ok(mut ready) => ready.retain_ready(),
            Err(error) => console::failure("cannot wait for a command's output", &error),
        },
        None => std::future::pending().await,
    }
}

pub(super) async fn wait_for_space(job: &Job) {
    while job.output_space() == 0 {
        job.space_freed.notified().await;
    }
}

/// One read, straight into the job. `Ok(0)` is the pipe's end.
fn read_some(jobs: &Jobs, job: &Job, pipe: &OwnedFd, stream: OutputStream) -> io::Result<usize> {
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
            // A terminal that was hung up in the guest.
            _ if error.raw_os_error() == Some(libc::EIO) => false,
            _ => {
                console::failure("cannot read a command's output", error);
                false
            }
        },
    }
}

/// Reads what is left in the pipes of a command that has ended.
async fn drain(jobs: &Jobs, job: &Job, pipes: [Option<End>; 2]) {
    for (pipe, stream) in pipes.into_iter().zip(STREAMS) {
        let Some(pipe) = pipe else { continue };
        loop {
            wait_for_space(job).await;
            // Not by readiness: the question is what is there now.
            match read_some(jobs, job, pipe.fd().get_ref(), stream) {
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
async fn pump_stdin(job: &Job, pipe: Option<End>) {
    let Some(pipe) = pipe else { return };
    let mut line_begun = false;
    loop {
        let (at_end, empty) = job.with_stdin(|stdin| (stdin.at_end(), stdin.next().is_empty()));
        if at_end {
            if let End::Terminal(terminal) = &pipe {
                type_end(terminal, line_begun).await;
            }
            break;
        }
        if empty {
            job.stdin_came.notified().await;
            continue;
        }
        let result = pipe.fd().try_io(Interest::WRITABLE, |fd| {
            job.with_stdin(|stdin| {
                let next = stdin.next();
                let count = rustix::io::write(fd, next)?;
                if let Some(last) = next.get(..count).and_then(<[u8]>::last) {
                    line_begun = !matches!(last, b'\n' | b'\r');
                }
                stdin.take(count);
                io::Result::Ok(())
            })
        });
        if !written(&result, &pipe).await {
            break;
        }
    }
    job.with_stdin(Stdin::close);
}

/// Types the end of input. A new session of the host's may say it once more; only the first is typed.
async fn type_end(terminal: &Rc<Terminal>, line_begun: bool) {
    let keys = match terminal.end_of_file(line_begun) {
        Ok(keys) => keys,
        Err(error) => return console::failure("cannot ask a terminal for its keys", &error),
    };
    let end = End::Terminal(Rc::clone(terminal));
    let mut keys = keys.as_slice();
    while !keys.is_empty() {
        let result = end.fd().try_io(Interest::WRITABLE, |fd| {
            let count = rustix::io::write(fd, keys)?;
            keys = keys.get(count..).unwrap_or_default();
            io::Result::Ok(())
        });
        if !written(&result, &end).await {
            return;
        }
    }
}

/// Waits for room after a write that found none. False if there will be none.
async fn written(result: &io::Result<()>, pipe: &End) -> bool {
    let Err(error) = result else { return true };
    match error.kind() {
        io::ErrorKind::Interrupted => true,
        io::ErrorKind::WouldBlock => match pipe.fd().writable().await {
            Ok(mut ready) => {
                ready.retain_ready();
                true
            }
            Err(_) => false,
        },
        // The command has closed its end.
        io::ErrorKind::BrokenPipe => false,
        _ if error.raw_os_error() == Some(libc::EIO) => false,
        _ => {
            console::failure("cannot write a command's stdin", error);
            false
        }
    }
}

// ---- the end -------------------------------------------------------------------------------

/// How the command ended: in its init's words, or killed together with it.
fn exit_status(status: &OwnedFd, init: Option<WaitStatus>) -> ExitStatus {
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
