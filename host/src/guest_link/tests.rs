//! The link against an honest guest.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use matchlock_model::exec::{ExitStatus, OutputStream};
use matchlock_wire::PROTOCOL_VERSION;
use matchlock_wire::message::Network;
use matchlock_wire::resync::{self, Hunter, NONCE_BYTES};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::conformance::{
    SOON, command, command_with_stdin, config, finish, link_conformance, next, reconnection, run,
    started,
};
use super::mini_guest::{MiniGuest, TestMachine, answer_hello, counted};
use super::{
    ExecEvent, ExecSession, FakeCommand, FakeConnector, FakeReadiness, GuestLink, LinkConnector,
    LinkError, MAX_JOBS, StdinInput, YamuxConnector,
};

async fn connect(machine: &TestMachine) -> Arc<dyn GuestLink> {
    YamuxConnector.connect(machine, SOON).await.expect("a link")
}

async fn refused(machine: &TestMachine, deadline: Duration) -> LinkError {
    match timeout(SOON, YamuxConnector.connect(machine, deadline)).await.expect("an answer") {
        Ok(_) => panic!("it was connected"),
        Err(error) => error,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_link_conforms() {
    let (machine, guest) = TestMachine::with_guest();
    link_conformance(&YamuxConnector, &machine, || machine.end()).await;
    assert_eq!(*guest.jobs.violations.lock().unwrap(), [""; 0]);
    assert_eq!(guest.shutdowns.load(Ordering::SeqCst), 1);
    let configured = guest.configured.lock().unwrap();
    assert_eq!(configured.len(), 1);
    assert_eq!(configured[0].add_hosts, [("10.0.0.7".to_owned(), "db".to_owned())]);
    assert_eq!(configured[0].dns_servers, ["9.9.9.9"]);
    let expected = Network {
        mac: [0xAA, 0xFC, 0, 0, 0, 7],
        address: [10, 64, 0, 6].into(),
        prefix: 30,
        gateway: [10, 64, 0, 5].into(),
        gateway_mac: [0xAA, 0xFD, 0, 0, 0, 7],
        mtu: 1400,
    };
    assert_eq!(configured[0].network, Some(expected));
    assert!(configured[0].clock_unix_ns > 1_700_000_000_000_000_000);
}

#[tokio::test]
async fn the_fake_link_conforms() {
    let machine = silent_machine();
    let connector = FakeConnector::default();
    let lose = || connector.lose(&LinkError::Lost { cause: "a test".to_owned() });
    link_conformance(&connector, &machine, lose).await;
    assert_eq!(connector.configured(), [config()]);
    assert_eq!(connector.shutdowns(), [Duration::from_secs(1)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_link_reconnects() {
    let (machine, guest) = TestMachine::with_guest();
    reconnection(&YamuxConnector, &machine, || machine.end()).await;
    assert_eq!(*guest.jobs.violations.lock().unwrap(), [""; 0]);
}

#[tokio::test]
async fn the_fake_link_reconnects() {
    let connector = FakeConnector::default();
    let lose = || connector.lose(&LinkError::Lost { cause: "a test".to_owned() });
    reconnection(&connector, &silent_machine(), lose).await;
}

#[tokio::test]
async fn the_fake_does_as_it_is_told() {
    let machine = silent_machine();
    let connector = FakeConnector::default();
    connector.set_readiness(FakeReadiness::Never);
    let error = connector.connect(&machine, Duration::from_millis(1)).await.err();
    assert!(matches!(error, Some(LinkError::Timeout { .. })), "{error:?}");
    connector.set_readiness(FakeReadiness::Ready);
    let link = connector.connect(&machine, SOON).await.expect("a link");
    connector.set_command("id", FakeCommand::Print("root".into(), ExitStatus::Code(3)));
    assert_eq!(run(&*link, "id").await, (b"root".to_vec(), ExitStatus::Code(3)));
    machine.end();
    assert!(matches!(link.closed().await, LinkError::Lost { .. }));
}

/// A machine that keeps its link open and never says anything.
fn silent_machine() -> TestMachine {
    TestMachine::new(|stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    })
}

/// What an old session may have left on the line: 4 MB, half an acknowledgement, one of another
/// connection.
fn stale_bytes() -> Vec<u8> {
    let mut stale = counted(0, 4 * 1024 * 1024 + 7);
    stale.extend(resync::acknowledgement(&[7; NONCE_BYTES]));
    stale.extend(&resync::acknowledgement(&[8; NONCE_BYTES])[..20]);
    stale
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stale_bytes_and_foreign_acknowledgements_are_thrown_away() {
    let guest = Arc::new(MiniGuest::default());
    let machine = TestMachine::new(move |mut stream: UnixStream| {
        let guest = guest.clone();
        async move {
            // All of it before a byte of the hello is read: neither side may wait for the other.
            stream.write_all(&stale_bytes()).await.expect("taken");
            guest.session(answer_hello(stream).await).await;
        }
    });
    let link = connect(&machine).await;
    assert_eq!(run(&*link, "echo through").await.0, b"through\n");
}

#[tokio::test]
async fn another_version_is_named() {
    let machine = TestMachine::new(|stream| async move {
        let mut stream = BufReader::new(stream);
        let mut hunter = Hunter::for_hello();
        let nonce = loop {
            let byte = stream.read_u8().await.expect("a hello");
            if let (_, Some(greeting)) = hunter.feed(&[byte]) {
                break greeting.nonce;
            }
        };
        let mut acknowledgement = resync::acknowledgement(&nonce);
        let version_at = acknowledgement.len() - NONCE_BYTES - 2;
        acknowledgement[version_at..version_at + 2].copy_from_slice(&7_u16.to_be_bytes());
        stream.write_all(&acknowledgement).await.expect("taken");
        std::future::pending::<()>().await;
    });
    let error = refused(&machine, SOON).await;
    assert!(matches!(error, LinkError::Version { guest: 7, host: PROTOCOL_VERSION }), "{error:?}");
}

#[tokio::test]
async fn a_guest_that_never_answers_is_a_timeout() {
    let error = refused(&silent_machine(), Duration::from_millis(50)).await;
    assert!(matches!(error, LinkError::Timeout { what: "the handshake", .. }), "{error:?}");
}

#[tokio::test]
async fn an_agent_that_never_answers_is_a_timeout_and_loses_the_connection() {
    let closed = Arc::new(watch::Sender::new(false));
    let seen = closed.clone();
    let machine = TestMachine::new(move |stream| {
        let closed = closed.clone();
        async move {
            let mut stream = answer_hello(stream).await;
            while let Ok(1..) = stream.read(&mut [0; 1024]).await {}
            closed.send_replace(true);
        }
    });
    let error = refused(&machine, Duration::from_millis(300)).await;
    assert!(matches!(error, LinkError::Timeout { what: "the handshake", .. }), "{error:?}");
    timeout(SOON, seen.subscribe().wait_for(|closed| *closed))
        .await
        .expect("in time")
        .expect("closed");
}

#[tokio::test]
async fn a_machine_that_ends_during_the_handshake_is_lost() {
    let machine = TestMachine::new(|mut stream: UnixStream| async move {
        stream.read_exact(&mut [0; 1000]).await.expect("the preamble");
    });
    let error = refused(&machine, SOON).await;
    assert!(matches!(error, LinkError::Lost { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_stale_bytes_are_a_violation() {
    let machine = TestMachine::new(|mut stream: UnixStream| async move {
        let zeros = vec![0; 1 << 20];
        while stream.write_all(&zeros).await.is_ok() {}
    });
    let error = refused(&machine, SOON).await;
    assert!(matches!(error, LinkError::Protocol { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_megabytes_go_through_cat_unchanged() {
    const TOTAL: usize = 100 << 20;
    const PIECE: usize = 100_000;
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = link.exec(&command_with_stdin("cat")).await.expect("a session");
    let stdin = session.stdin.clone();
    let feeder = tokio::spawn(async move {
        for start in (0..TOTAL).step_by(PIECE) {
            let piece = counted(start, TOTAL.min(start + PIECE));
            stdin.send(StdinInput::Data(piece.into())).await.expect("taken");
        }
        stdin.send(StdinInput::Eof).await.expect("taken");
    });
    started(&mut session).await;
    let mut offset = 0;
    loop {
        match next(&mut session).await {
            Some(Ok(ExecEvent::Output(OutputStream::Stdout, data))) => {
                let end = offset + data.len();
                assert!(data == counted(offset, end), "bytes {offset} to {end} differ");
                offset = end;
            }
            Some(Ok(ExecEvent::Exited(ExitStatus::Code(0)))) => break,
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(offset, TOTAL);
    feeder.await.expect("fed");
}

#[tokio::test]
async fn a_slow_reader_blocks_only_its_own_command() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut unread = Vec::new();
    for _ in 0..20 {
        unread.push(link.exec(&command("flood 50000000")).await.expect("a session"));
    }
    for _ in 0..20 {
        assert_eq!(run(&*link, "echo here").await.0, b"here\n");
    }
    // The echoes are released; none of the others can end unread.
    let mut running = guest.running.subscribe();
    timeout(SOON, running.wait_for(|running| *running == 20)).await.expect("in time").expect("20");
    let mut slow = unread.pop().expect("a session");
    started(&mut slow).await;
    let Some(Ok(ExecEvent::Output(_, data))) = next(&mut slow).await else { panic!("no output") };
    assert_eq!(data, counted(0, data.len()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forty_commands_at_once() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..40_u8 {
        let link = link.clone();
        tasks.spawn(async move {
            let (out, _) = run(&*link, &format!("flood {}", 300_000 + usize::from(number))).await;
            assert!(out == counted(0, 300_000 + usize::from(number)));
            let mut cat = link.exec(&command_with_stdin("cat")).await.expect("a session");
            cat.stdin
                .send(StdinInput::Data(Bytes::from(vec![number; 100_000])))
                .await
                .expect("taken");
            cat.stdin.send(StdinInput::Eof).await.expect("taken");
            started(&mut cat).await;
            assert!(finish(&mut cat).await.0 == vec![number; 100_000]);
            assert_eq!(run(&*link, &format!("exit {number}")).await.1, ExitStatus::Code(number));
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("a command as expected");
    }
}

#[tokio::test]
async fn the_sixty_first_command_is_refused_and_the_link_lives() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut sessions = Vec::new();
    for _ in 0..MAX_JOBS {
        let mut session = link.exec(&command("sleep")).await.expect("a session");
        started(&mut session).await;
        sessions.push(session);
    }
    let error = link.exec(&command("sleep")).await.expect_err("too many");
    assert_eq!(error.to_string(), "the guest refused the command: too many commands at once (60)");
    link.configure(&config()).await.expect("requests have their own streams");
    // Slots come back as fast as the guest ends its streams, over and over.
    for _ in 0..5 {
        sessions.clear();
        for _ in 0..MAX_JOBS {
            let mut session = link.exec(&command("sleep")).await.expect("a slot");
            started(&mut session).await;
            sessions.push(session);
        }
    }
}

#[tokio::test]
async fn signals_overtake_stdin_that_waits() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = link.exec(&command_with_stdin("deaf")).await.expect("a session");
    started(&mut session).await;
    let piece = || StdinInput::Data(Bytes::from(vec![0; 100_000]));
    let mut taken = 0;
    while timeout(Duration::from_millis(300), session.stdin.send(piece())).await.is_ok() {
        taken += 1;
    }
    assert!((3..=8).contains(&taken), "{taken} pieces of 100 kB were taken");
    session.signals.send(0).await.expect("taken, and not sent");
    session.signals.send(9).await.expect("taken");
    assert_eq!(finish(&mut session).await.2, ExitStatus::Signal(9));
}

#[tokio::test]
async fn dropping_the_events_releases_the_command() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = link.exec(&command("sleep")).await.expect("a session");
    started(&mut session).await;
    drop(session);
    let mut killed = guest.killed.subscribe();
    timeout(SOON, killed.wait_for(|killed| *killed == 1)).await.expect("in time").expect("killed");
    // Also when it never was started, and when its output fills everything on the way.
    drop(link.exec(&command("flood 50000000")).await.expect("a session"));
    timeout(SOON, killed.wait_for(|killed| *killed == 2)).await.expect("in time").expect("killed");
    assert_eq!(*guest.running.borrow(), 0);
}

#[tokio::test]
async fn a_loss_reaches_everybody() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut sessions = Vec::new();
    for line in ["sleep", "cat", "flood 1000000"] {
        let mut session = link.exec(&command_with_stdin(line)).await.expect("a session");
        started(&mut session).await;
        sessions.push(session);
    }
    machine.end();
    link.give_up();
    for mut session in sessions {
        let mut last = None;
        while let Some(event) = next(&mut session).await {
            last = Some(event);
        }
        assert!(matches!(last, Some(Err(LinkError::Lost { .. }))), "{last:?}");
    }
    let cause = timeout(SOON, link.closed()).await.expect("in time");
    assert_eq!(
        cause.to_string(),
        "the link to the guest was lost: the machine closed the connection"
    );
}

#[tokio::test]
async fn a_dropped_link_closes_the_connection_after_its_commands() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = link.exec(&command_with_stdin("cat")).await.expect("a session");
    started(&mut session).await;
    drop(link);
    session.stdin.send(StdinInput::Data(Bytes::from_static(b"x"))).await.expect("taken");
    let event = next(&mut session).await;
    assert!(matches!(event, Some(Ok(ExecEvent::Output(..)))), "{event:?}");
    drop(session);
    timeout(SOON, guest.killed.subscribe().wait_for(|killed| *killed == 1))
        .await
        .expect("in time")
        .expect("released before the end");
    // Only the guest's own Arc and ours are left once its connection has ended.
    let (_, served) = (machine, guest);
    timeout(SOON, async {
        while served.sessions.load(Ordering::SeqCst) != 0 {
            served.ended.notified().await;
        }
    })
    .await
    .expect("the guest saw the end");
}

#[tokio::test]
async fn refusals_carry_the_guests_words_in_one_line() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut bad = config();
    bad.hostname = "bad".to_owned();
    let error = link.configure(&bad).await.expect_err("refused");
    assert_eq!(error.to_string(), "the guest refused the configuration: no such host");
    let mut long = command("echo");
    long.argv.push(vec![b'x'; 2 << 20]);
    let error = link.exec(&long).await.expect_err("too long");
    assert!(error.to_string().contains("too long"), "{error}");
    assert_eq!(run(&*link, "echo fine").await.0, b"fine\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chatty_commands_are_not_cut() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let mut session = link.exec(&command("drip 20000")).await.expect("a session");
        tasks.spawn(async move {
            started(&mut session).await;
            let (out, err, status) = finish(&mut session).await;
            (out, err, status)
        });
    }
    let expected = counted(0, 20_000);
    while let Some(done) = tasks.join_next().await {
        let (out, err, status) = done.expect("a result");
        assert_eq!(status, ExitStatus::Code(0));
        assert!(out.iter().eq(expected.iter().step_by(2)));
        assert!(err.iter().eq(expected.iter().skip(1).step_by(2)));
    }
}

#[tokio::test]
async fn a_chatty_command_that_nobody_reads_is_blocked_and_not_cut() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    // More than a job's window of single bytes.
    let mut session = link.exec(&command("drip 270000")).await.expect("a session");
    assert_eq!(run(&*link, "echo here").await.0, b"here\n");
    started(&mut session).await;
    let (out, err, _) = finish(&mut session).await;
    assert_eq!(out.len() + err.len(), 270_000);
    assert_eq!(*guest.killed.borrow(), 0);
}

#[tokio::test]
async fn sessions_can_be_taken_apart() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let session = link.exec(&command("sleep")).await.expect("a session");
    let ExecSession { stdin, signals, size, mut events } = session;
    drop((stdin, signals, size));
    // Without senders the command goes on; it ends with its receiver.
    assert!(matches!(events.recv().await, Some(Ok(ExecEvent::Started))));
    assert!(timeout(Duration::from_millis(200), events.recv()).await.is_err());
}
