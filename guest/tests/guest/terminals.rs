//! Commands on a terminal: a session of their own, keys, sizes, hang-up. The shell is a real one.

use std::path::{Path, PathBuf};

use matchlock_wire::message::{
    ExecInput, ExecOutput, ExecStart, ExitStatus, JOB_WINDOW_BYTES, JobId, Terminal, TerminalSize,
};
use rustix::fs::{Mode, OFlags};
use tokio::net::unix::pipe;

use super::support::{Guest, Host, Job, block_on, in_time, start};

const OK: ExecOutput = ExecOutput::Exited(ExitStatus::Code(0));

/// On a terminal that is typed on.
fn on_terminal(mut start: ExecStart) -> ExecStart {
    let size = TerminalSize { rows: 30, cols: 100 };
    start.terminal = Some(Terminal { size, term: Some("vt220".into()) });
    start.stdin = true;
    start
}

fn shell(job: u8, script: &str) -> ExecStart {
    on_terminal(start(job, &["sh", "-c", script]))
}

/// An interactive shell, with a prompt that nothing else prints.
fn interactive(job: u8) -> ExecStart {
    let mut start = on_terminal(start(job, &["sh", "-i"]));
    start.env.push(("PS1".into(), "ready> ".into()));
    start
}

/// Reads, and acknowledges, until what came since the last call has this text.
async fn expect(job: &mut Job, seen: &mut usize, text: &str) -> String {
    loop {
        let new = String::from_utf8_lossy(&job.stdout[*seen..]).into_owned();
        if let Some(at) = new.find(text) {
            *seen += at + text.len();
            return new[..at].to_owned();
        }
        match job.next().await {
            Some(ExecOutput::Output { .. }) => {
                let offset = job.offset;
                job.send(ExecInput::Ack { offset }).await;
            }
            Some(ExecOutput::Exited(status)) => panic!("{status:?} before {text:?}: {new:?}"),
            Some(_) => {}
            None => panic!("it ended before {text:?}: {new:?}"),
        }
    }
}

/// Reads until all that ever came has this text so many times.
async fn says(job: &mut Job, text: &str, times: usize) {
    while String::from_utf8_lossy(&job.stdout).matches(text).count() < times {
        job.next().await.unwrap();
        let offset = job.offset;
        job.send(ExecInput::Ack { offset }).await;
    }
}

/// Types, and waits until the agent has taken it.
async fn keys(job: &mut Job, text: &[u8]) {
    let offset = job.stdin_taken;
    job.send(ExecInput::Stdin { offset, data: text.to_vec() }).await;
    while job.stdin_taken < offset + text.len() as u64 {
        job.next().await.unwrap();
    }
}

async fn run(host: &Host, start: ExecStart) -> (ExecOutput, String) {
    let mut job = host.exec(start).await;
    let end = job.finish().await;
    assert_eq!(job.stderr, b"", "a terminal has one output");
    let text = String::from_utf8(job.stdout.clone()).unwrap();
    job.release().await;
    (end, text)
}

/// A pipe in the file system that is open for reading here: it ends when nobody holds it any more.
fn held_pipe(directory: &Path, name: &str) -> (PathBuf, pipe::Receiver) {
    let path = directory.join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    (path, reader)
}

/// Everything that is written into such a pipe until its last holder is gone. Somebody must have
/// opened it before.
async fn until_gone(reader: &pipe::Receiver) -> String {
    let mut all = Vec::new();
    loop {
        let mut buffer = [0; 256];
        in_time(reader.readable()).await.unwrap();
        match reader.try_read(&mut buffer) {
            Ok(0) => return String::from_utf8(all).unwrap(),
            Ok(count) => all.extend(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_command_leads_the_session_of_its_terminal() {
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        let script = "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo three; stty size; echo $TERM; \
                      tty; cut -d' ' -f5,6,8 /proc/$$/stat; echo err >&2; echo pid $$; exit 7";
        let (end, text) = run(&host, shell(1, script)).await;
        assert_eq!(end, ExecOutput::Exited(ExitStatus::Code(7)));
        let lines: Vec<&str> = text.split_terminator("\r\n").collect();
        let [three, size, term, tty, groups, err, pid] = lines[..] else { panic!("{text:?}") };
        assert_eq!((three, size, term, err), ("three", "30 100", "vt220", "err"));
        assert!(tty.starts_with("/dev/pts/"), "{tty}");
        // The process group, the session, and the terminal's foreground group.
        let pid = pid.strip_prefix("pid ").unwrap();
        assert_eq!(groups, format!("{pid} {pid} {pid}"));

        let mut unnamed = shell(2, "echo $TERM; stty size; tty");
        unnamed.terminal.as_mut().unwrap().term = None;
        let (_, text) = run(&host, unnamed).await;
        // The terminal before was given back: this one has its name.
        assert_eq!(text, format!("xterm\r\n30 100\r\n{tty}\r\n"));
        assert_eq!(guest.jobs.count(), 0);
    });
}

#[test]
fn a_terminal_belongs_to_its_user() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let script = "stat -c '%u %A' $(tty); echo again > $(tty); echo and > /dev/stderr; id -u";
        let mut start = shell(1, script);
        start.user = Some("4711:4712".into());
        let (end, text) = run(&host, start).await;
        assert_eq!(end, OK);
        let (owner, rest) = text.split_once("\r\n").unwrap();
        assert!(owner.starts_with("4711 crw"), "{owner}");
        assert_eq!(rest, "again\r\nand\r\n4711\r\n");
    });
}

#[test]
fn keys_are_signals_and_jobs_are_controlled() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let mut job = host.exec(interactive(1)).await;
        let seen = &mut 0;
        expect(&mut job, seen, "ready> ").await;
        // What is typed is shown, and its result is not the same text.
        keys(&mut job, b"echo $((6*7))\r").await;
        let shown = expect(&mut job, seen, "42\r\nready> ").await;
        assert_eq!(shown, "echo $((6*7))\r\n");
        // It says when it is in front: earlier, the keys would be the shell's.
        keys(&mut job, b"sh -c 'echo $((5*5)); exec sleep 1000'\r").await;
        expect(&mut job, seen, "25\r\n").await;
        keys(&mut job, b"\x03").await;
        expect(&mut job, seen, "^C").await;
        expect(&mut job, seen, "ready> ").await;
        // Stopped, shown, in the background, back in the foreground, interrupted. The shell says which
        // job it is before it puts it in front; the job says when it has been told to go on, which is
        // after that. It starts no other program: a shell that waits for one to be executed cannot stop.
        let told = "sh -c 'trap \"echo told\" CONT; echo $((5*7)); while :; do :; done'\r";
        keys(&mut job, told.as_bytes()).await;
        expect(&mut job, seen, "35\r\n").await;
        keys(&mut job, b"\x1a").await;
        expect(&mut job, seen, "Stopped").await;
        expect(&mut job, seen, "ready> ").await;
        keys(&mut job, b"bg; jobs\r").await;
        expect(&mut job, seen, "Running").await;
        expect(&mut job, seen, "ready> ").await;
        says(&mut job, "told\r\n", 1).await;
        keys(&mut job, b"fg\r").await;
        says(&mut job, "told\r\n", 2).await;
        keys(&mut job, b"\x1c").await;
        expect(&mut job, seen, "^\\").await;
        expect(&mut job, seen, "ready> ").await;
        keys(&mut job, b"exit 5\r").await;
        assert_eq!(job.finish().await, ExecOutput::Exited(ExitStatus::Code(5)));
        job.release().await;
    });
}

#[test]
fn the_end_of_stdin_is_the_end_of_file_key() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        // With a whole line before it, in the middle of one, and with nothing before it.
        for (id, typed, shown) in [
            (1, &b"one\r"[..], "one\r\none\r\nend\r\n"),
            (2, b"two", "twotwoend\r\n"),
            (3, b"", "end\r\n"),
        ] {
            let mut job = host.exec(shell(id, "cat; echo end")).await;
            if !typed.is_empty() {
                keys(&mut job, typed).await;
            }
            job.send(ExecInput::StdinEof { offset: typed.len() as u64 }).await;
            assert_eq!(job.finish().await, OK);
            assert_eq!(String::from_utf8_lossy(&job.stdout), shown);
            job.release().await;
        }
        let mut start = shell(4, "stty -icanon -echo; echo up; head -c 2 | od -An -tx1");
        start.stdin = true;
        let mut job = host.exec(start).await;
        expect(&mut job, &mut 0, "up\r\n").await;
        keys(&mut job, b"x").await;
        job.send(ExecInput::StdinEof { offset: 1 }).await;
        assert_eq!(job.finish().await, OK);
        assert!(job.stdout.ends_with(b" 78 04\r\n"), "{:?}", String::from_utf8_lossy(&job.stdout));
        job.release().await;
    });
}

#[test]
fn a_terminal_that_nobody_types_on_has_no_end() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let mut start = shell(1, "stty size; read line; echo never");
        start.stdin = false;
        let mut job = host.exec(start).await;
        expect(&mut job, &mut 0, "30 100\r\n").await;
        job.send(ExecInput::Stdin { offset: 0, data: b"typed\r".to_vec() }).await;
        job.send(ExecInput::StdinEof { offset: 6 }).await;
        let more = tokio::time::timeout(std::time::Duration::from_millis(200), async {
            loop {
                let message = job.next().await;
                if !matches!(message, Some(ExecOutput::StdinAck { .. })) {
                    return message;
                }
            }
        });
        assert!(more.await.is_err());
        job.release().await;
    });
}

#[test]
fn a_megabyte_of_any_bytes_goes_both_ways() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let size = 1_000_000;
        let input: Vec<u8> =
            (0..250_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let script = format!("stty raw -echo; echo up; head -c {size}");
        let mut job = host.exec(shell(1, &script)).await;
        expect(&mut job, &mut 0, "up\n").await;
        let before = job.stdout.len();
        assert_eq!(job.feed(&input).await, OK);
        assert!(job.stdout[before..] == input);
        job.release().await;
    });
}

#[test]
fn what_is_printed_before_the_end_is_all_there() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let (end, text) = run(&host, shell(1, "seq 1 100000")).await;
        assert_eq!(end, OK);
        let expected: String = (1..=100_000).map(|n| format!("{n}\r\n")).collect();
        assert!(text == expected, "{} of {} bytes", text.len(), expected.len());
        // Short-lived ones: their last words may still be on their way through the terminal.
        for id in 2..=100 {
            let (end, text) = run(&host, on_terminal(start(id, &["echo", "last words"]))).await;
            assert_eq!((end, text.as_str()), (OK, "last words\r\n"));
        }
    });
}

#[test]
fn a_reader_that_does_not_acknowledge_blocks_the_command() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let mut job = host.exec(shell(1, "seq 1 200000; echo end")).await;
        while job.offset < JOB_WINDOW_BYTES {
            job.next().await.unwrap();
        }
        assert_eq!(job.offset, JOB_WINDOW_BYTES);
        let more = tokio::time::timeout(std::time::Duration::from_millis(100), job.next()).await;
        assert!(more.is_err(), "{more:?} came beyond the window");
        let offset = job.offset;
        job.send(ExecInput::Ack { offset }).await;
        assert_eq!(job.finish().await, OK);
        let mut expected: String = (1..=200_000).map(|n| format!("{n}\r\n")).collect();
        expected.push_str("end\r\n");
        assert!(job.stdout == expected.as_bytes());
        job.release().await;
    });
}

#[test]
fn sizes_reach_the_foreground() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let script = "trap 'stty size' WINCH; echo up; while :; do sleep 1000 & wait; done";
        let mut job = host.exec(shell(1, script)).await;
        let seen = &mut 0;
        expect(&mut job, seen, "up\r\n").await;
        for (rows, cols) in [(50, 132), (1, 1), (65535, 2)] {
            job.send(ExecInput::Resize(TerminalSize { rows, cols })).await;
            expect(&mut job, seen, &format!("{rows} {cols}\r\n")).await;
        }
        job.release().await;

        // Without a terminal it is a mistake, which costs the stream and not the command.
        let mut plain = host.exec(start(2, &["sleep", "1000"])).await;
        assert_eq!(plain.next().await, Some(ExecOutput::Started));
        plain.send(ExecInput::Resize(TerminalSize { rows: 1, cols: 1 })).await;
        assert_eq!(plain.next().await, None);
        let again = host.attach(JobId([2; 16]), 0).await;
        again.release().await;

        // A command that has ended has no size any more, and nobody is to blame.
        let mut over = host.exec(shell(3, "true")).await;
        assert_eq!(over.finish().await, OK);
        over.send(ExecInput::Resize(TerminalSize { rows: 1, cols: 1 })).await;
        over.release().await;
    });
}

#[test]
fn a_new_stream_goes_on_where_the_old_one_was() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let mut first = host.exec(interactive(1)).await;
        let seen = &mut 0;
        expect(&mut first, seen, "ready> ").await;
        let known = first.offset;
        keys(&mut first, b"seq 1 20000; stty size; read a; echo got $a\r").await;
        let had = known + 500;
        while first.offset < had + 10_000 {
            // Received, and not acknowledged: it comes again.
            first.next().await.unwrap();
        }
        let known = first.stdin_taken;
        let mut second = host.attach(JobId([1; 16]), had).await;
        assert_eq!(second.next().await, Some(ExecOutput::Attached { stdin_offset: known }));
        second.send(ExecInput::Resize(TerminalSize { rows: 7, cols: 8 })).await;
        let seen = &mut 0;
        expect(&mut second, seen, "\r\n20000\r\n").await;
        expect(&mut second, seen, "\r\n").await;
        let mut all = first.stdout[..usize::try_from(had).unwrap()].to_vec();
        all.extend(&second.stdout);
        let expected: String = (1..=20_000).map(|n| format!("{n}\r\n")).collect();
        let all = String::from_utf8(all).unwrap();
        assert!(all.contains(&expected), "a byte is missing or came twice");
        keys(&mut second, b"it\r").await;
        expect(&mut second, seen, "got it\r\nready> ").await;
        second.send(ExecInput::StdinEof { offset: second.stdin_taken }).await;
        assert_eq!(second.finish().await, OK);
        second.release().await;
    });
}

#[test]
fn a_release_hangs_up_before_it_kills() {
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        let directory = tempfile::tempdir().unwrap();
        let (path, reader) = held_pipe(directory.path(), "words");
        // The shell, a child of it in front, and two that do not care; with job control the one in
        // front is a group of its own, and the shell has no terminal to take back any more.
        for (id, control, expected) in
            [(1, ":", &["front", "shell"][..]), (2, "set -m", &["front"])]
        {
            let script = format!(
                "{control}; exec 9>{path}; trap 'echo shell >&9; exit' HUP; \
                 (trap '' HUP TERM INT; sleep 1000) & setsid sh -c \"trap '' HUP; sleep 1001; true\" & \
                 sh -c 'trap \"echo front >&9; exit\" HUP; echo up; \
                 while :; do sleep 1002 & wait; done'",
                path = path.display()
            );
            let mut job = host.exec(shell(id, &script)).await;
            expect(&mut job, &mut 0, "up\r\n").await;
            job.release().await;
            assert_eq!(guest.jobs.count(), 0);
            let said = until_gone(&reader).await;
            let mut words: Vec<&str> = said.lines().collect();
            words.sort_unstable();
            words.dedup();
            assert_eq!(words, expected, "{control}");
        }
    });
}

#[test]
fn a_hang_up_signal_is_for_the_foreground_too() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let script = "set -m; trap 'echo shell; exit 3' HUP; \
             sh -c 'trap \"echo front; exit\" HUP; echo up; while :; do sleep 1002 & wait; done'";
        let mut job = host.exec(shell(1, script)).await;
        expect(&mut job, &mut 0, "up\r\n").await;
        job.send(ExecInput::Signal(libc::SIGHUP)).await;
        assert_eq!(job.finish().await, ExecOutput::Exited(ExitStatus::Code(3)));
        let text = String::from_utf8(job.stdout.clone()).unwrap();
        assert!(text.contains("front\r\n") && text.contains("shell\r\n"), "{text:?}");
        job.release().await;

        // Other signals are for the command's own group, which a shell with jobs has for itself.
        let script = "set -m; trap 'echo shell; exit 4' TERM; \
             sh -c 'trap \"echo front; exit\" TERM; echo up; read line; echo $line'";
        let mut job = host.exec(shell(2, script)).await;
        expect(&mut job, &mut 0, "up\r\n").await;
        job.send(ExecInput::Signal(libc::SIGTERM)).await;
        keys(&mut job, b"go on\r").await;
        assert_eq!(job.finish().await, ExecOutput::Exited(ExitStatus::Code(4)));
        let text = String::from_utf8(job.stdout.clone()).unwrap();
        assert!(!text.contains("front\r\n") && text.contains("shell\r\n"), "{text:?}");
        job.release().await;
    });
}

#[test]
fn a_shutdown_hangs_up_on_shells() {
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        let mut job = host.exec(interactive(1)).await;
        expect(&mut job, &mut 0, "ready> ").await;
        // It takes no notice of this.
        job.send(ExecInput::Signal(libc::SIGTERM)).await;
        keys(&mut job, b"echo $((1+1))\r").await;
        expect(&mut job, &mut 0, "2\r\n").await;
        guest.jobs.close();
        assert_eq!(job.finish().await, ExecOutput::Exited(ExitStatus::Signal(1)));
        job.release().await;
    });
}

#[test]
fn a_command_may_leave_its_terminal_and_come_back() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let script = "exec <&- >&- 2>&-; sleep 0.2; exec </dev/tty >/dev/tty 2>&1; echo back; tty";
        let (end, text) = run(&host, shell(1, script)).await;
        assert_eq!(end, OK);
        assert!(text.starts_with("back\r\n/dev/"), "{text:?}");
    });
}

#[test]
fn a_lost_session_leaves_a_terminal_alone() {
    block_on(async {
        let (guest, line) = Guest::start();
        let (host, _) = Host::dial(line, 1).await;
        let directory = tempfile::tempdir().unwrap();
        let gate = directory.path().join("gate");
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let script = format!("echo up; read x < {}; stty size; echo $x", gate.display());
        let mut job = host.exec(shell(1, &script)).await;
        expect(&mut job, &mut 0, "up\r\n").await;
        host.vanish().await;
        drop(job);
        let (host, _) = Host::dial(guest.plug().await, 2).await;
        let flags = OFlags::RDWR | OFlags::NONBLOCK;
        let gate = rustix::fs::open(&gate, flags, Mode::empty()).unwrap();
        rustix::io::write(&gate, b"still here\n").unwrap();
        let mut job = host.attach(JobId([1; 16]), 0).await;
        assert_eq!(job.finish().await, OK);
        assert_eq!(job.stdout, b"up\r\n30 100\r\nstill here\r\n");
        job.release().await;
    });
}
