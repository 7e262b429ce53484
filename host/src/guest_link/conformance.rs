//! What every [`GuestLink`] does, whatever is behind it.

use std::time::Duration;

use bytes::Bytes;
use matchlock_model::exec::{ExecRefusalKind, ExecSpec, ExitStatus, OutputStream};
use matchlock_model::guest::{GuestConfig, GuestNetwork, HostEntry};
use tokio::time::timeout;

use super::{ExecEvent, ExecSession, GuestLink, LinkConnector, LinkError, StdinInput};
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
    }
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
    dropped_sessions(&*link).await;

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
    let ExecSession { stdin, signals, events } = session;
    drop(stdin);
    let (spare, _) = tokio::sync::mpsc::channel(1);
    let mut session = ExecSession { stdin: spare, signals, events };
    assert_eq!(finish(&mut session).await.2, ExitStatus::Code(0), "a dropped sender is the end");

    let mut session = link.exec(&command("sleep")).await.expect("a session");
    assert!(session.stdin.is_closed(), "a command without stdin takes none");
    started(&mut session).await;
    session.signals.send(15).await.expect("taken");
    assert_eq!(finish(&mut session).await.2, ExitStatus::Signal(15));
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
    for session in [&mut cat, &mut flood, &mut sleep, &mut over] {
        started(session).await;
    }
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
    // Not earlier: a signal that is on its way when its session is lost may be lost with it.
    sleep.signals.send(15).await.expect("taken");
    link.reconnect(machine, SOON).await.expect("another session");

    let (out, err, status) = finish(&mut cat).await;
    assert_eq!((&*out, &*err, status), (&b"abcdef"[..], &b""[..], ExitStatus::Code(0)));
    let (rest, _, status) = finish(&mut flood).await;
    assert_eq!((first.len() + rest.len(), status), (3_000_000, ExitStatus::Code(0)));
    assert_eq!(finish(&mut sleep).await.2, ExitStatus::Signal(15));
    assert_eq!(finish(&mut over).await.2, ExitStatus::Code(7));
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
