//! What every [`GuestLink`] does, whatever is behind it.

use std::time::Duration;

use bytes::Bytes;
use matchlock_model::exec::{
    ExecRefusalKind, ExecSpec, ExitStatus, OutputStream, Terminal, TerminalSize,
};
use matchlock_model::file::FileOp;
use matchlock_model::guest::{GuestConfig, GuestNetwork, HostEntry};
use tokio::time::timeout;

use super::{ExecEvent, ExecSession, FileEntries, GuestLink, LinkConnector, LinkError, StdinInput};
use crate::hypervisor::Machine;

/// A generous limit for anything that should happen at once.
pub(super) const SOON: Duration = Duration::from_secs(30);

/// A command line.
pub(super) fn command(line: &str) -> ExecSpec {
    ExecSpec {
        argv: line.split(' ').map(|word| word.as_bytes().to_vec()).collect(),
        env: vec![(b"NAME".to_vec(), vec![0xFF])],
        cwd: None,
        user: None,
        stdin: false,
        terminal: None,
        stop_signal: None,
    }
}

/// A command line with a terminal of 24 lines.
pub(super) fn command_on_terminal(line: &str) -> ExecSpec {
    let size = TerminalSize { rows: 24, cols: 80 };
    let terminal = Some(Terminal { size, term: Some("vt100".to_owned()) });
    ExecSpec { stdin: true, terminal, ..command(line) }
}

/// A command line with stdin.
pub(super) fn command_with_stdin(line: &str) -> ExecSpec {
    ExecSpec { stdin: true, ..command(line) }
}

pub(super) fn config() -> GuestConfig {
    GuestConfig {
        hostname: "vm".to_owned(),
        add_hosts: vec![HostEntry { host: "db".to_owned(), ip: [10, 0, 0, 7].into() }],
        dns_servers: vec![[9, 9, 9, 9].into()],
        cpu_millis: 500,
        network: Some(GuestNetwork {
            mac: [0xAA, 0xFC, 0, 0, 0, 7],
            address: [10, 64, 0, 6].into(),
            prefix: 30,
            gateway: [10, 64, 0, 5].into(),
            gateway_mac: [0xAA, 0xFD, 0, 0, 0, 7],
            mtu: 1400,
        }),
    }
}

/// The next event.
pub(super) async fn next(session: &mut ExecSession) -> Option<Result<ExecEvent, LinkError>> {
    timeout(SOON, session.events.recv()).await.expect("an event in time")
}

pub(super) async fn started(session: &mut ExecSession) {
    let event = next(session).await;
    assert!(matches!(event, Some(Ok(ExecEvent::Started))), "{event:?}");
}

/// Everything a started command prints, and how it ended; nothing follows.
pub(super) async fn finish(session: &mut ExecSession) -> (Vec<u8>, Vec<u8>, ExitStatus) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match next(session).await {
            Some(Ok(ExecEvent::Output(OutputStream::Stdout, data))) => out.extend(data),
            Some(Ok(ExecEvent::Output(OutputStream::Stderr, data))) => err.extend(data),
            Some(Ok(ExecEvent::Exited(status))) => {
                assert!(next(session).await.is_none(), "an event after the last one");
                return (out, err, status);
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

/// Runs a command without input: what it printed and how it ended.
pub(super) async fn run(link: &dyn GuestLink, line: &str) -> (Vec<u8>, ExitStatus) {
    let mut session = link.exec(&command(line)).await.expect("a session");
    started(&mut session).await;
    let (out, _, status) = finish(&mut session).await;
    (out, status)
}

/// Runs the suite; `lose` cuts the connection.
pub(super) async fn link_conformance(
    connector: &dyn LinkConnector,
    machine: &dyn Machine,
    lose: impl FnOnce(),
) {
    let link = connector.connect(machine, SOON).await.expect("a link");
    assert!(!link.agent().agent_version.is_empty());
    assert!(!link.agent().agent_version.contains('\x1b'));
    link.configure(&config()).await.expect("configured");
    timeout(SOON, link.ping()).await.expect("in time").expect("an answer");

    assert_eq!(
        run(&*link, "echo hello world").await,
        (b"hello world\n".to_vec(), ExitStatus::Code(0))
    );
    assert_eq!(run(&*link, "exit 7").await, (vec![], ExitStatus::Code(7)));
    let (out, _) = run(&*link, "flood 1000000").await;
    assert_eq!(out.len(), 1_000_000);

    let mut session = link.exec(&command("no-such-thing")).await.expect("a session");
    match next(&mut session).await {
        Some(Ok(ExecEvent::Refused(refusal))) => {
            assert_eq!(refusal.kind, ExecRefusalKind::NotFound)
        }
        other => panic!("unexpected {other:?}"),
    }
    assert!(next(&mut session).await.is_none());

    stdin_and_signals(&*link).await;
    terminals(&*link).await;
    dropped_sessions(&*link).await;
    files(&*link).await;

    link.shutdown(Duration::from_secs(1)).await.expect("the shutdown begins");

    let mut running = link.exec(&command_with_stdin("cat")).await.expect("a session");
    started_or_ended(&mut running).await;
    lose();
    let cause = timeout(SOON, link.closed()).await.expect("the link ends");
    assert!(matches!(cause, LinkError::Lost { .. }), "{cause:?}");
    link.give_up();
    while let Some(event) = next(&mut running).await {
        if let Err(cause) = event {
            assert!(matches!(cause, LinkError::Lost { .. }), "{cause:?}");
        }
    }
    link.exec(&command("echo late")).await.expect_err("the link has ended");
    link.configure(&config()).await.expect_err("the link has ended");
}

async fn started_or_ended(session: &mut ExecSession) {
    // After a shutdown a guest may take commands or refuse them.
    assert!(next(session).await.is_some());
}

async fn stdin_and_signals(link: &dyn GuestLink) {
    let mut session = link.exec(&command_with_stdin("cat")).await.expect("a session");
    started(&mut session).await;
    session.stdin.send(StdinInput::Data(Bytes::from_static(b"abc"))).await.expect("taken");
    session.stdin.send(StdinInput::Data(Bytes::from_static(b"def"))).await.expect("taken");
    session.stdin.send(StdinInput::Eof).await.expect("taken");
    let (out, _, status) = finish(&mut session).await;
    assert_eq!((out, status), (b"abcdef".to_vec(), ExitStatus::Code(0)));

    let mut session = link.exec(&command_with_stdin("cat")).await.expect("a session");
    started(&mut session).await;
    let (spare, _) = tokio::sync::mpsc::channel(1);
    drop(std::mem::replace(&mut session.stdin, spare));
    assert_eq!(finish(&mut session).await.2, ExitStatus::Code(0), "a dropped sender is the end");

    let mut session = link.exec(&command("sleep")).await.expect("a session");
    assert!(session.stdin.is_closed(), "a command without stdin takes none");
    started(&mut session).await;
    session.signals.send(15).await.expect("taken");
    assert_eq!(finish(&mut session).await.2, ExitStatus::Signal(15));
}

/// Everything that an operation on files prints, and its end.
async fn file(link: &dyn GuestLink, op: FileOp) -> (Vec<u8>, ExitStatus) {
    let mut session = link.file(&op).await.expect("a session");
    started(&mut session).await;
    let (out, err, status) = finish(&mut session).await;
    assert_eq!(err, b"");
    (out, status)
}

async fn write_file(link: &dyn GuestLink, path: &str, offset: Option<u64>, bytes: &[u8]) {
    let op = FileOp::Write { path: path.to_owned(), offset, mode: 0o644 };
    let mut session = link.file(&op).await.expect("a session");
    started(&mut session).await;
    let piece = Bytes::copy_from_slice(bytes);
    session.stdin.send(StdinInput::Data(piece)).await.expect("taken");
    session.stdin.send(StdinInput::Eof).await.expect("taken");
    assert_eq!(finish(&mut session).await.2, ExitStatus::Code(0));
}

async fn files(link: &dyn GuestLink) {
    let read = |offset, length| FileOp::Read { path: "/d/e/f".to_owned(), offset, length };
    // More than what is in flight at once.
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 2]).collect();
    write_file(link, "/d/e/f", None, &bytes).await;
    let ok = ExitStatus::Code(0);
    assert_eq!(file(link, read(0, None)).await, (bytes.clone(), ok));
    assert_eq!(file(link, read(999_990, Some(100))).await, (bytes[999_990..].to_vec(), ok));
    assert_eq!(file(link, read(10, Some(5))).await, (bytes[10..15].to_vec(), ok));
    assert_eq!(file(link, read(2_000_000, None)).await, (vec![], ok));
    write_file(link, "/d/e/f", Some(3), b"abc").await;
    assert_eq!(file(link, read(2, Some(5))).await.0, [&bytes[2..3], b"abc", &bytes[6..7]].concat());
    write_file(link, "/d/e/f", None, b"short").await;
    assert_eq!(file(link, read(0, None)).await.0, b"short");

    let (printed, _) = file(link, FileOp::List { path: "/d".to_owned() }).await;
    let entries = FileEntries::default().take(&printed).expect("entries");
    let shown: Vec<_> =
        entries.iter().map(|entry| (&*entry.name, entry.mode & 0o170_000)).collect();
    assert_eq!(shown, [(&b"e"[..], 0o040_000)]);

    let mut session = link
        .file(&FileOp::Read { path: "/none".into(), offset: 0, length: None })
        .await
        .expect("a session");
    match next(&mut session).await {
        Some(Ok(ExecEvent::Refused(refusal))) => {
            assert_eq!(refusal.kind, ExecRefusalKind::NotFound)
        }
        other => panic!("unexpected {other:?}"),
    }
    let op = FileOp::Write { path: "/left".into(), offset: None, mode: 0o644 };
    let left = link.file(&op).await.expect("a session");
    drop(left);
    assert_eq!(run(link, "echo still here").await.0, b"still here\n");
}

/// Waits until a terminal has said that it has this size.
async fn shows(session: &mut ExecSession, shown: &mut String, rows: u16, cols: u16) {
    let line = format!("{rows} {cols}\n");
    while !shown.ends_with(&line) {
        match next(session).await {
            Some(Ok(ExecEvent::Output(OutputStream::Stdout, data))) => {
                shown.push_str(std::str::from_utf8(&data).expect("numbers"));
            }
            other => panic!("{other:?} after {shown:?}"),
        }
    }
}

async fn terminals(link: &dyn GuestLink) {
    let mut session = link.exec(&command_on_terminal("sizes")).await.expect("a session");
    started(&mut session).await;
    let mut shown = String::new();
    shows(&mut session, &mut shown, 24, 80).await;
    assert_eq!(shown, "24 80\n");
    for (rows, cols) in [(50, 132), (1, 65535), (0, 0), (24, 80)] {
        session.size.send_replace(TerminalSize { rows, cols });
        shows(&mut session, &mut shown, rows, cols).await;
    }
    assert_eq!(shown, "24 80\n50 132\n1 65535\n0 0\n24 80\n");
    session.signals.send(1).await.expect("taken");
    assert_eq!(finish(&mut session).await.2, ExitStatus::Signal(1));

    let mut session = link.exec(&command("cat")).await.expect("a session");
    session.size.send_replace(TerminalSize { rows: 9, cols: 9 });
    assert_eq!(session.size.receiver_count(), 0, "a command without a terminal has no size");
    started(&mut session).await;
    drop(session);
}

async fn dropped_sessions(link: &dyn GuestLink) {
    let mut sleeper = link.exec(&command("sleep")).await.expect("a session");
    started(&mut sleeper).await;
    drop(sleeper);
    let unread = link.exec(&command("flood 3000000")).await.expect("a session");
    assert_eq!(run(link, "echo still here").await.0, b"still here\n");
    drop(unread);
    assert_eq!(run(link, "echo still here").await.0, b"still here\n");
}

/// Loses sessions and begins new ones; `lose` cuts the connection. Ends with the link's end.
pub(super) async fn reconnection(
    connector: &dyn LinkConnector,
    machine: &dyn Machine,
    lose: impl Fn(),
) {
    let link = connector.connect(machine, SOON).await.expect("a link");
    let mut cat = link.exec(&command_with_stdin("cat")).await.expect("a session");
    // More than a job's window and its channel: it is in the middle when the session is lost.
    let mut flood = link.exec(&command("flood 3000000")).await.expect("a session");
    let mut sleep = link.exec(&command("sleep")).await.expect("a session");
    let mut over = link.exec(&command("exit 7")).await.expect("a session");
    let mut sizes = link.exec(&command_on_terminal("sizes")).await.expect("a session");
    for session in [&mut cat, &mut flood, &mut sleep, &mut over, &mut sizes] {
        started(session).await;
    }
    let mut shown = String::new();
    shows(&mut sizes, &mut shown, 24, 80).await;
    cat.stdin.send(StdinInput::Data(Bytes::from_static(b"abc"))).await.expect("taken");
    let Some(Ok(ExecEvent::Output(_, first))) = next(&mut flood).await else { panic!("no output") };

    lose();
    assert!(matches!(timeout(SOON, link.closed()).await, Ok(LinkError::Lost { .. })));
    cat.stdin.send(StdinInput::Data(Bytes::from_static(b"def"))).await.expect("taken");
    cat.stdin.send(StdinInput::Eof).await.expect("taken");
    let dropped = sleep_of(&*link, &lose, machine).await;
    for _ in 0..3 {
        link.reconnect(machine, SOON).await.expect("another session");
        lose();
        assert!(matches!(timeout(SOON, link.closed()).await, Ok(LinkError::Lost { .. })));
    }
    drop(dropped);
    for rows in 1..=3 {
        sizes.size.send_replace(TerminalSize { rows, cols: 7 });
    }
    // Not earlier: a signal that is on its way when its session is lost may be lost with it.
    sleep.signals.send(15).await.expect("taken");
    link.reconnect(machine, SOON).await.expect("another session");

    let (out, err, status) = finish(&mut cat).await;
    assert_eq!((&*out, &*err, status), (&b"abcdef"[..], &b""[..], ExitStatus::Code(0)));
    let (rest, _, status) = finish(&mut flood).await;
    assert_eq!((first.len() + rest.len(), status), (3_000_000, ExitStatus::Code(0)));
    assert_eq!(finish(&mut sleep).await.2, ExitStatus::Signal(15));
    assert_eq!(finish(&mut over).await.2, ExitStatus::Code(7));
    shows(&mut sizes, &mut shown, 3, 7).await;
    drop(sizes);
    assert!(timeout(Duration::from_millis(50), link.closed()).await.is_err(), "it is open");
    link.configure(&config()).await.expect("configured");
    timeout(SOON, link.ping()).await.expect("in time").expect("an answer");
    assert_eq!(run(&*link, "echo again").await.0, b"again\n");

    let mut waiting = link.exec(&command("sleep")).await.expect("a session");
    started(&mut waiting).await;
    lose();
    assert!(matches!(timeout(SOON, link.closed()).await, Ok(LinkError::Lost { .. })));
    assert!(timeout(Duration::from_millis(100), waiting.events.recv()).await.is_err(), "it waits");
    link.give_up();
    let last = next(&mut waiting).await;
    assert!(matches!(last, Some(Err(LinkError::Lost { .. }))), "{last:?}");
    assert!(next(&mut waiting).await.is_none());
    let error = link.reconnect(machine, SOON).await.expect_err("it was given up");
    assert!(matches!(error, LinkError::Lost { .. }), "{error:?}");
    link.exec(&command("echo late")).await.expect_err("the link has ended");
}

/// A command that was started in a session of its own, which is lost.
async fn sleep_of(link: &dyn GuestLink, lose: &impl Fn(), machine: &dyn Machine) -> ExecSession {
    link.reconnect(machine, SOON).await.expect("another session");
    let mut session = link.exec(&command("sleep")).await.expect("a session");
    started(&mut session).await;
    lose();
    assert!(matches!(timeout(SOON, link.closed()).await, Ok(LinkError::Lost { .. })));
    session
}
