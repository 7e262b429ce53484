//! The conversation about a job: flow control, stdin, signals, take-over, release.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use matchlock_wire::message::{
    ExecFailureKind, ExecInput, ExecOutput, ExecStart, ExitStatus, JOB_WINDOW_BYTES, JobId,
};

use tokio::net::unix::pipe;

use super::support::{Guest, Host, Job, block_on, in_time, start};

const OK: ExecOutput = ExecOutput::Exited(ExitStatus::Code(0));

fn shell(job: u8, script: &str) -> ExecStart {
    start(job, &["sh", "-c", script])
}

fn with_stdin(mut start: ExecStart) -> ExecStart {
    start.stdin = true;
    start
}

async fn read_until(job: &mut Job, text: &str) {
    while !job.stdout.ends_with(text.as_bytes()) {
        assert!(job.next().await.is_some(), "it ended before {text:?}");
    }
}

/// A pipe in the file system: it is at its end when every process that holds it is gone.
async fn all_gone(fifo: &Path) {
    let reader = pipe::OpenOptions::new().open_receiver(fifo).unwrap();
    loop {
        // By system call, not by readiness: an end that was there before us is no event.
        match rustix::io::read(&reader, &mut [0; 64]) {
            Ok(0) => return,
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) => {
                let wait = reader.try_io(|| Err::<(), _>(std::io::ErrorKind::WouldBlock.into()));
                assert!(wait.is_err(), "readiness is only forgotten here");
                in_time(reader.readable()).await.unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn fifo(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path
}

#[test]
fn ten_megabytes_go_through_cat_and_come_back_the_same() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let input: Vec<u8> =
            (0..2_500_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let mut cat = host.exec(with_stdin(start(1, &["cat"]))).await;
        assert_eq!(cat.feed(&input).await, OK);
        assert!(cat.stdout == input);
        assert_eq!(cat.stdin_taken, input.len() as u64);
        cat.release().await;
    });
}

#[test]
fn a_reader_that_does_not_acknowledge_blocks_the_command_and_loses_nothing() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let mut job = host.exec(shell(1, "seq 1 1000000; echo end >&2")).await;
        while job.offset < JOB_WINDOW_BYTES {
            job.next().await.unwrap();
        }
        assert_eq!(job.offset, JOB_WINDOW_BYTES);
        // A second command shows that the agent lives while nothing more comes of the first.
        let mut other = host.exec(shell(2, "echo other")).await;
        assert_eq!(other.finish().await, OK);
        other.release().await;
        let more = tokio::time::timeout(std::time::Duration::from_millis(100), job.next()).await;
        assert!(more.is_err(), "{more:?} came beyond the window");
        // Byte by byte at first, so that the guest must go on from any state.
        for offset in 0..=50 {
            job.send(ExecInput::Ack { offset }).await;
        }
        let offset = job.offset;
        job.send(ExecInput::Ack { offset }).await;
        assert_eq!(job.finish().await, OK);
        let expected: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
        assert!(job.stdout == expected.as_bytes());
        assert_eq!(job.stderr, b"end\n");
        job.release().await;
    });
}

#[test]
fn stdin_stops_at_the_window_and_is_dropped_once_nobody_reads_it() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        // It reads one line and closes its stdin, but lives on.
        let script = "read line; echo got $line; exec <&-; read x < \"$0\"; echo done";
        let directory = tempfile::tempdir().unwrap();
        let gate = fifo(directory.path());
        let mut start = shell(1, script);
        start.argv.push(gate.to_str().unwrap().into());
        let mut job = host.exec(with_stdin(start)).await;
        let data = b"one\n".to_vec();
        job.send(ExecInput::Stdin { offset: 0, data }).await;
        read_until(&mut job, "got one\n").await;
        let mut sent = 4;
        while sent < 3_000_000 {
            let data = vec![b'x'; 30_000];
            job.send(ExecInput::Stdin { offset: sent, data }).await;
            sent += 30_000;
            while job.stdin_taken + JOB_WINDOW_BYTES < sent + 30_000 {
                job.next().await.unwrap();
            }
        }
        // Open for both, so that opening waits for nobody.
        let mut gate = File::options().read(true).write(true).open(gate).unwrap();
        gate.write_all(b"go\n").unwrap();
        assert_eq!(job.finish().await, OK);
        assert_eq!(job.stdout, b"got one\ndone\n");
        job.release().await;
    });
}

#[test]
fn broken_rules_end_the_stream_but_not_the_job() {
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        let mut first = host.exec(with_stdin(start(1, &["cat"]))).await;
        assert_eq!(first.next().await, Some(ExecOutput::Started));
        let data = |len| vec![0; len];
        let wrong = [
            vec![ExecInput::Stdin { offset: 1, data: data(1) }],
            vec![ExecInput::Stdin { offset: 0, data: data(40_000) }],
            vec![ExecInput::StdinEof { offset: 5 }],
            vec![ExecInput::Ack { offset: 1_000_000 }],
            vec![ExecInput::Signal(0)],
            vec![ExecInput::Signal(65)],
            vec![ExecInput::Signal(-9)],
        ];
        for inputs in wrong {
            let text = format!("{:?}", inputs[0]).chars().take(60).collect::<String>();
            let mut job = host.attach(JobId([1; 16]), 0).await;
            assert!(matches!(job.next().await, Some(ExecOutput::Attached { .. })));
            for input in inputs {
                job.send(input).await;
            }
            assert_eq!(job.next().await, None, "{text}");
        }
        let mut job = host.attach(JobId([1; 16]), 0).await;
        assert_eq!(job.next().await, Some(ExecOutput::Attached { stdin_offset: 0 }));
        assert_eq!(job.feed(b"still here").await, OK);
        assert_eq!(job.stdout, b"still here");
        job.release().await;
        assert_eq!(guest.jobs.count(), 0);
    });
}

#[test]
fn signals_reach_the_whole_group() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let directory = tempfile::tempdir().unwrap();
        let fifo = fifo(directory.path());
        let script = format!(
            "trap 'echo told; exit 5' TERM; exec 9<>{}; (trap 'echo child; exit' TERM; echo one; \
             while :; do read x <&9; done) & echo two; wait; wait",
            fifo.display()
        );
        let mut job = host.exec(shell(1, &script)).await;
        while job.stdout.len() < 8 {
            job.next().await.unwrap();
        }
        job.send(ExecInput::Signal(libc::SIGTERM)).await;
        assert_eq!(job.finish().await, ExecOutput::Exited(ExitStatus::Code(5)));
        let text = String::from_utf8(job.stdout.clone()).unwrap();
        assert!(text.contains("told\n"), "{text}");
        job.release().await;

        for (id, signal) in [(2, libc::SIGINT), (3, libc::SIGKILL), (4, 40)] {
            let mut job = host.exec(start(id, &["sleep", "1000"])).await;
            assert_eq!(job.next().await, Some(ExecOutput::Started));
            job.send(ExecInput::Signal(signal)).await;
            let expected = ExitStatus::Signal(u8::try_from(signal).unwrap());
            assert_eq!(job.finish().await, ExecOutput::Exited(expected));
            job.release().await;
        }
        // Stopped, it does not act; continued, it does.
        let script = "trap 'echo told; exit 6' TERM; echo up; while :; do sleep 1000 & wait; done";
        let mut job = host.exec(shell(5, script)).await;
        read_until(&mut job, "up\n").await;
        for signal in [libc::SIGSTOP, libc::SIGTERM, libc::SIGCONT] {
            job.send(ExecInput::Signal(signal)).await;
        }
        assert_eq!(job.finish().await, ExecOutput::Exited(ExitStatus::Code(6)));
        job.release().await;
    });
}

#[test]
fn what_a_command_leaves_behind_does_not_delay_its_end() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let directory = tempfile::tempdir().unwrap();
        let fifo = fifo(directory.path());
        let script = format!(
            "exec 9<>{}; sleep 1000 & setsid sleep 1000 & echo bye; exit 3",
            fifo.display()
        );
        let mut job = host.exec(shell(1, &script)).await;
        assert_eq!(job.finish().await, ExecOutput::Exited(ExitStatus::Code(3)));
        assert_eq!(job.stdout, b"bye\n");
        // It was reported, so they are gone already: they all held the pipe.
        let writer = rustix::fs::open(
            &fifo,
            rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK,
            rustix::fs::Mode::empty(),
        );
        assert_eq!(writer.unwrap_err(), rustix::io::Errno::NXIO);
        job.release().await;
    });
}

#[test]
fn a_release_kills_all_of_a_command() {
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        let directory = tempfile::tempdir().unwrap();
        let fifo = fifo(directory.path());
        let script = format!(
            "trap '' TERM INT HUP; exec 9<>{}; sleep 1000 & (setsid sh -c 'sleep 1000; true') & \
             echo up; yes >&2",
            fifo.display()
        );
        let mut job = host.exec(shell(1, &script)).await;
        read_until(&mut job, "up\n").await;
        job.release().await;
        assert_eq!(guest.jobs.count(), 0);
        all_gone(&fifo).await;
        let mut late = host.attach(JobId([1; 16]), 0).await;
        match late.finish().await {
            ExecOutput::Failed(failure) => assert_eq!(failure.kind, ExecFailureKind::Request),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_new_stream_takes_over_from_the_old_one() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let mut first = host.exec(with_stdin(start(1, &["cat"]))).await;
        let data = b"hello".to_vec();
        first.send(ExecInput::Stdin { offset: 0, data }).await;
        read_until(&mut first, "hello").await;
        let mut second = host.attach(JobId([1; 16]), 2).await;
        assert_eq!(second.next().await, Some(ExecOutput::Attached { stdin_offset: 5 }));
        read_until(&mut second, "llo").await;
        while first.next().await.is_some() {}
        assert_eq!(first.stdout, b"hello");
        let data = b" world".to_vec();
        second.send(ExecInput::Stdin { offset: 5, data }).await;
        second.send(ExecInput::StdinEof { offset: 11 }).await;
        assert_eq!(second.finish().await, OK);
        assert_eq!(second.stdout, b"llo world");
        // The end is told to everyone who attaches, until the job is released.
        for offset in [11, 11] {
            let mut again = host.attach(JobId([1; 16]), offset).await;
            assert_eq!(again.finish().await, OK);
            assert_eq!(again.stdout, b"");
        }
        for (offset, word) in [(10, "11"), (12, "11")] {
            let mut wrong = host.attach(JobId([1; 16]), offset).await;
            match wrong.finish().await {
                ExecOutput::Failed(failure) => {
                    assert_eq!(failure.kind, ExecFailureKind::Request);
                    assert!(failure.message.contains(word), "{failure:?}");
                }
                other => panic!("{other:?}"),
            }
        }
        host.attach(JobId([1; 16]), 11).await.release().await;
    });
}

#[test]
fn many_commands_at_once_keep_their_bytes_apart() {
    async fn one(host: &Host, id: u8) {
        let script = format!("seq {id}000 {id}9999; seq 1 {id} >&2; exit {id}");
        let mut job = host.exec(shell(id, &script)).await;
        let end = job.finish().await;
        assert_eq!(end, ExecOutput::Exited(ExitStatus::Code(id)));
        let (from, to) = (u64::from(id) * 1000, u64::from(id) * 10_000 + 9999);
        let expected: String = (from..=to).map(|n| format!("{n}\n")).collect();
        assert!(job.stdout == expected.as_bytes());
        let expected: String = (1..=id).map(|n| format!("{n}\n")).collect();
        assert!(job.stderr == expected.as_bytes());
        job.release().await;
    }
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        futures::future::join_all((1..=24).map(|id| one(&host, id))).await;
        assert_eq!(guest.jobs.count(), 0);
    });
}
