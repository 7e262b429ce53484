//! Commands across the loss of sessions: cut anywhere, and continued without a lost or repeated byte.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use matchlock_model::exec::{ExecRefusalKind, ExitStatus};
use matchlock_wire::STREAM_WINDOW_BYTES;
use matchlock_wire::message::{
    ExecFailure, ExecFailureKind, ExecInput, ExecOutput, JobId, OutputStream, Request,
};
use tokio::time::timeout;

use super::codec;
use super::conformance::{SOON, command, command_with_stdin, config, finish, next, run, started};
use super::mini_guest::{MiniGuest, TestMachine, counted};
use super::mini_jobs::AttachAnswer;
use super::{
    ExecEvent, ExecSession, GuestLink, LinkConnector, LinkError, StdinInput, YamuxConnector,
};

async fn connect(machine: &TestMachine) -> Arc<dyn GuestLink> {
    YamuxConnector.connect(machine, SOON).await.expect("a link")
}

/// Cuts the session and waits until the host knows.
async fn lose(machine: &TestMachine, link: &dyn GuestLink) {
    machine.end();
    let cause = timeout(SOON, link.closed()).await.expect("the session ends");
    assert!(matches!(cause, LinkError::Lost { .. }), "{cause:?}");
}

async fn reconnect(machine: &TestMachine, link: &dyn GuestLink) {
    timeout(SOON, link.reconnect(machine, SOON)).await.expect("in time").expect("a session");
}

/// The command's last event.
async fn last(session: &mut ExecSession) -> Option<Result<ExecEvent, LinkError>> {
    let mut last = None;
    while let Some(event) = next(session).await {
        last = Some(event);
    }
    last
}

async fn start(link: &dyn GuestLink, line: &str) -> ExecSession {
    let mut session = link.exec(&command_with_stdin(line)).await.expect("a session");
    started(&mut session).await;
    session
}

async fn counts_to(sender: &tokio::sync::watch::Sender<usize>, wanted: usize) {
    let mut counts = sender.subscribe();
    let reached = timeout(SOON, counts.wait_for(|count| *count == wanted)).await;
    assert!(reached.is_ok(), "{} instead of {wanted}", *sender.borrow());
}

fn no_violations(guest: &MiniGuest) {
    assert_eq!(*guest.jobs.violations.lock().unwrap(), [""; 0]);
}

// ---- cut anywhere --------------------------------------------------------------------------

/// Numbers that are the same in each run (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit).expect("small")
    }
}

/// Begins sessions as often as they end.
async fn keep_up(machine: &TestMachine, link: &dyn GuestLink) {
    loop {
        let cause = link.closed().await;
        assert!(matches!(cause, LinkError::Lost { .. }), "{cause:?}");
        while let Err(error) = link.reconnect(machine, SOON).await {
            assert!(matches!(error, LinkError::Lost { .. }), "{error:?}");
        }
    }
}

async fn copies(link: &dyn GuestLink, total: usize) {
    let mut session = link.exec(&command_with_stdin("cat")).await.expect("a session");
    let stdin = session.stdin.clone();
    let feeding = async move {
        for start in (0..total).step_by(70_001) {
            let piece = counted(start, total.min(start + 70_001));
            stdin.send(StdinInput::Data(piece.into())).await.expect("taken");
        }
        stdin.send(StdinInput::Eof).await.expect("taken");
    };
    let reading = async {
        started(&mut session).await;
        finish(&mut session).await
    };
    let ((), (out, _, status)) = futures::join!(feeding, reading);
    assert_eq!((out.len(), status), (total, ExitStatus::Code(0)));
    assert!(out == counted(0, total), "the copy differs");
}

async fn floods(link: &dyn GuestLink, total: usize) {
    let (out, status) = run(link, &format!("flood {total}")).await;
    assert_eq!((out.len(), status), (total, ExitStatus::Code(0)));
    assert!(out == counted(0, total), "the output differs");
}

async fn drips(link: &dyn GuestLink, total: usize) {
    let mut session = link.exec(&command(&format!("drip {total}"))).await.expect("a session");
    started(&mut session).await;
    let (out, err, _) = finish(&mut session).await;
    let expected = counted(0, total);
    assert!(out.iter().eq(expected.iter().step_by(2)), "stdout differs");
    assert!(err.iter().eq(expected.iter().skip(1).step_by(2)), "stderr differs");
}

async fn exits(link: &dyn GuestLink, count: u8) {
    for code in 0..count {
        assert_eq!(run(link, &format!("exit {code}")).await, (vec![], ExitStatus::Code(code)));
    }
}

/// Signals come in order and none twice.
async fn traps(link: &dyn GuestLink, count: i32) {
    let mut session = link.exec(&command("trap")).await.expect("a session");
    let signals = session.signals.clone();
    started(&mut session).await;
    let sending = async {
        for signal in 10..10 + count {
            signals.send(signal).await.expect("taken");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // One that is on its way may be lost with its session.
        while signals.send(9).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let ((), (out, _, status)) = futures::join!(sending, finish(&mut session));
    assert_eq!(status, ExitStatus::Signal(9));
    assert!(out.is_sorted_by(|one, next| one < next), "{out:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_survive_cuts_anywhere() {
    let mut attached = 0;
    for seed in 1..=20_u64 {
        let mut numbers = Numbers(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        // The handshake costs about 66 kB; the first session has room for it and its hello.
        let mut budgets: Vec<_> = (0..8).map(|_| 60_000 + numbers.below(500_000)).collect();
        budgets[0] += 20_000;
        let (machine, guest) = TestMachine::cutting(budgets);
        let link = connect(&machine).await;
        let commands = async {
            futures::join!(
                copies(&*link, 1_000_000 + numbers.below(1000)),
                floods(&*link, 1_500_003),
                drips(&*link, 3_000),
                exits(&*link, 20),
                traps(&*link, 30),
            )
        };
        tokio::select! {
            done = timeout(2 * SOON, commands) => { done.expect("in time"); }
            () = keep_up(&machine, &*link) => {}
        }
        no_violations(&guest);
        assert_eq!(guest.jobs.executed.load(Ordering::SeqCst), 24, "seed {seed}: each ran once");
        attached += *guest.jobs.attached.borrow();
    }
    assert!(attached > 100, "only {attached} attachments were made");
}

// ---- one case at a time --------------------------------------------------------------------

#[tokio::test]
async fn the_end_of_a_command_that_was_lost_comes_again() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = start(&*link, "sleep").await;
    lose(&machine, &*link).await;
    guest.signal_all(15);
    reconnect(&machine, &*link).await;
    assert_eq!(finish(&mut session).await.2, ExitStatus::Signal(15));
    counts_to(&guest.running, 0).await;
    assert_eq!(*guest.killed.borrow(), 0);
    no_violations(&guest);
}

#[tokio::test]
async fn an_unread_command_goes_on_without_holding_more() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = start(&*link, "flood 2000000").await;
    for round in 1..=5 {
        // Until the guest has filled the window of this session.
        tokio::time::sleep(Duration::from_millis(50)).await;
        lose(&machine, &*link).await;
        reconnect(&machine, &*link).await;
        counts_to(&guest.jobs.attached, round).await;
    }
    assert_eq!(run(&*link, "echo here").await.0, b"here\n");
    let (out, _, _) = finish(&mut session).await;
    assert!(out == counted(0, 2_000_000));
    no_violations(&guest);
}

#[tokio::test]
async fn a_request_that_was_lost_is_made_again() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    guest.jobs.lose_execs.store(1, Ordering::SeqCst);
    let mut session = link.exec(&command_with_stdin("cat")).await.expect("accepted");
    session.stdin.send(StdinInput::Data(Bytes::from_static(b"early"))).await.expect("taken");
    session.stdin.send(StdinInput::Eof).await.expect("taken");
    session.signals.send(18).await.expect("taken");
    while guest.jobs.lose_execs.load(Ordering::SeqCst) > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(timeout(Duration::from_millis(50), session.events.recv()).await.is_err());
    lose(&machine, &*link).await;
    reconnect(&machine, &*link).await;
    started(&mut session).await;
    assert_eq!(finish(&mut session).await.0, b"early");
    assert_eq!(guest.jobs.executed.load(Ordering::SeqCst), 1);
    no_violations(&guest);
}

#[tokio::test]
async fn a_signal_waits_for_the_start() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    guest.jobs.lose_execs.store(1, Ordering::SeqCst);
    let mut session = link.exec(&command("trap")).await.expect("accepted");
    session.signals.send(21).await.expect("taken");
    while guest.jobs.lose_execs.load(Ordering::SeqCst) > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    lose(&machine, &*link).await;
    reconnect(&machine, &*link).await;
    started(&mut session).await;
    session.signals.send(9).await.expect("taken");
    assert_eq!(finish(&mut session).await, (vec![21], vec![], ExitStatus::Signal(9)));
}

#[tokio::test]
async fn a_start_that_was_lost_is_not_made_again() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    *guest.jobs.mute.lock().unwrap() = true;
    let mut session = link.exec(&command("trap")).await.expect("accepted");
    session.signals.send(20).await.expect("taken");
    let mut refused = link.exec(&command("no-such-thing")).await.expect("accepted");
    counts_to(&guest.running, 1).await;
    assert!(matches!(next(&mut refused).await, Some(Ok(ExecEvent::Refused(_)))));
    lose(&machine, &*link).await;
    *guest.jobs.mute.lock().unwrap() = false;
    reconnect(&machine, &*link).await;
    started(&mut session).await;
    session.signals.send(9).await.expect("taken");
    let (out, _, status) = finish(&mut session).await;
    assert_eq!((out, status), (vec![20], ExitStatus::Signal(9)));
    assert_eq!(guest.jobs.executed.load(Ordering::SeqCst), 1);
    no_violations(&guest);
}

#[tokio::test]
async fn a_receiver_dropped_without_a_session_releases_in_the_next() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let session = start(&*link, "sleep").await;
    let mut read = start(&*link, "cat").await;
    lose(&machine, &*link).await;
    drop(session);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(*guest.killed.borrow(), 0);
    reconnect(&machine, &*link).await;
    counts_to(&guest.killed, 1).await;
    counts_to(&guest.running, 1).await;
    // The other way round: everything was received, and only the release was lost.
    read.stdin.send(StdinInput::Eof).await.expect("taken");
    assert_eq!(finish(&mut read).await.2, ExitStatus::Code(0));
    counts_to(&guest.running, 0).await;
    no_violations(&guest);
}

#[tokio::test]
async fn a_release_that_was_lost_comes_again() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = start(&*link, "sleep").await;
    guest.jobs.frozen.send_replace(true);
    // The last message that the guest reads.
    session.signals.send(15).await.expect("taken");
    assert_eq!(finish(&mut session).await.2, ExitStatus::Signal(15));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(*guest.running.borrow(), 1, "the guest has not read the release");
    lose(&machine, &*link).await;
    guest.jobs.frozen.send_replace(false);
    reconnect(&machine, &*link).await;
    counts_to(&guest.running, 0).await;
    no_violations(&guest);
}

#[tokio::test]
async fn a_signal_that_has_not_left_is_sent_in_the_next_session() {
    const TOTAL: usize = 50_000;
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let spec = command("trap");
    let mut session = link.exec(&spec).await.expect("a session");
    started(&mut session).await;
    guest.jobs.frozen.send_replace(true);
    let signals: Vec<_> = (10..60_u8).cycle().take(TOTAL).collect();
    let sender = session.signals.clone();
    let sent = signals.clone();
    let sending = tokio::spawn(async move {
        for signal in sent {
            sender.send(signal.into()).await.expect("taken");
        }
        sender.send(9).await.expect("taken");
    });
    // Until the stream's credit is used up.
    tokio::time::sleep(Duration::from_millis(500)).await;
    lose(&machine, &*link).await;
    guest.jobs.frozen.send_replace(false);
    reconnect(&machine, &*link).await;
    let (out, _, _) = finish(&mut session).await;
    sending.await.expect("sent");
    let request = Request::Exec(codec::exec_start(JobId([7; 16]), &spec));
    let request = codec::encode(request).expect("a request").len();
    let each = codec::encode(ExecInput::Signal(10)).expect("a signal").len();
    // The guest has read the first; those that have left are lost, the rest comes.
    let left = (STREAM_WINDOW_BYTES - request) / each;
    assert_eq!(out.len(), 1 + TOTAL - left);
    assert!(out[0] == signals[0] && out[1..] == signals[left..]);
    no_violations(&guest);
}

#[tokio::test]
async fn a_command_that_was_dropped_is_forgotten_when_the_link_is_given_up() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let session = start(&*link, "sleep").await;
    lose(&machine, &*link).await;
    drop(session);
    link.give_up();
    let error = link.reconnect(&machine, SOON).await.expect_err("given up");
    assert!(matches!(error, LinkError::Lost { .. }), "{error:?}");
    assert_eq!((*guest.killed.borrow(), *guest.jobs.attached.borrow()), (0, 0));
}

#[tokio::test]
async fn a_dropped_link_ends_what_waits() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = start(&*link, "sleep").await;
    lose(&machine, &*link).await;
    assert!(timeout(Duration::from_millis(50), session.events.recv()).await.is_err());
    drop(link);
    let last = last(&mut session).await;
    assert!(matches!(last, Some(Err(LinkError::Lost { .. }))), "{last:?}");
}

#[tokio::test]
async fn a_link_given_up_goes_on_until_its_session_ends() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = start(&*link, "sleep").await;
    link.give_up();
    assert_eq!(run(&*link, "echo still").await.0, b"still\n");
    machine.end();
    assert!(matches!(last(&mut session).await, Some(Err(LinkError::Lost { .. }))));
}

#[tokio::test]
async fn requests_wait_for_the_next_session() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    lose(&machine, &*link).await;
    let spec = command("echo late");
    let requests = futures::future::join(
        async {
            let config = config();
            let (exec, configured) = futures::join!(link.exec(&spec), link.configure(&config));
            configured.expect("configured");
            let mut session = exec.expect("a session");
            started(&mut session).await;
            finish(&mut session).await.0
        },
        async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            reconnect(&machine, &*link).await;
        },
    );
    assert_eq!(requests.await.0, b"late\n");
    assert_eq!(*guest.jobs.attached.borrow(), 0, "what was never sent is not asked for");
    lose(&machine, &*link).await;
    let spec = command("sleep");
    let (exec, ()) = futures::join!(link.exec(&spec), async { link.give_up() });
    assert!(matches!(exec, Err(LinkError::Lost { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_request_without_a_session_is_a_timeout() {
    let (machine, _guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    machine.end();
    link.closed().await;
    for error in [
        link.configure(&config()).await.expect_err("no session"),
        link.exec(&command("echo")).await.expect_err("no session"),
    ] {
        assert!(matches!(error, LinkError::Timeout { .. }), "{error:?}");
    }
}

// ---- guests that lie -----------------------------------------------------------------------

async fn attach_ends_with(answer: ExecOutput, expected: &str) {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = start(&*link, "cat").await;
    session.stdin.send(StdinInput::Data(Bytes::from_static(b"abc"))).await.expect("taken");
    let Some(Ok(ExecEvent::Output(..))) = next(&mut session).await else { panic!("no output") };
    lose(&machine, &*link).await;
    *guest.jobs.attach_answer.lock().unwrap() = AttachAnswer::Lie(answer);
    reconnect(&machine, &*link).await;
    let last = last(&mut session).await;
    let Some(Err(LinkError::Protocol { what })) = &last else { panic!("{last:?}") };
    assert!(what.contains(expected), "{what}");
    let of_link = timeout(SOON, link.closed()).await.expect("the link ends");
    assert!(matches!(of_link, LinkError::Protocol { .. }), "{of_link:?}");
    let refused = link.reconnect(&machine, SOON).await.expect_err("it broke the protocol");
    assert_eq!(refused.to_string(), of_link.to_string());
    link.exec(&command("echo")).await.expect_err("no session will come");
}

#[tokio::test]
async fn wrong_answers_to_an_attachment_end_the_link() {
    let unknown =
        ExecFailure { kind: ExecFailureKind::Request, message: "there is no\nsuch job".to_owned() };
    let output = ExecOutput::Output { stream: OutputStream::Stdout, offset: 3, data: vec![0] };
    attach_ends_with(ExecOutput::Attached { stdin_offset: 4 }, "acknowledged 4 bytes").await;
    attach_ends_with(ExecOutput::Attached { stdin_offset: u64::MAX }, "bytes of stdin").await;
    attach_ends_with(ExecOutput::Failed(unknown), "there is no such job").await;
    attach_ends_with(ExecOutput::Started, "with the start of a command").await;
    attach_ends_with(output, "with output").await;
}

#[tokio::test(start_paused = true)]
async fn an_attachment_without_an_answer_ends_the_session_and_not_the_command() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    let mut session = start(&*link, "sleep").await;
    machine.end();
    link.closed().await;
    *guest.jobs.attach_answer.lock().unwrap() = AttachAnswer::Silence;
    link.reconnect(&machine, SOON).await.expect("a session");
    let cause = link.closed().await;
    assert!(cause.to_string().contains("did not answer an attachment"), "{cause}");
    *guest.jobs.attach_answer.lock().unwrap() = AttachAnswer::Honest;
    link.reconnect(&machine, SOON).await.expect("a session");
    session.signals.send(15).await.expect("taken");
    assert_eq!(finish(&mut session).await.2, ExitStatus::Signal(15));
}

#[tokio::test]
async fn a_job_refused_twice_is_refused_with_both_reasons() {
    let (machine, guest) = TestMachine::with_guest();
    let link = connect(&machine).await;
    *guest.jobs.mute.lock().unwrap() = true;
    let mut session = link.exec(&command("sleep")).await.expect("accepted");
    counts_to(&guest.running, 1).await;
    lose(&machine, &*link).await;
    // A guest that has forgotten the job, but not its id.
    guest.jobs.forget();
    reconnect(&machine, &*link).await;
    let Some(Ok(ExecEvent::Refused(refusal))) = next(&mut session).await else {
        panic!("not refused")
    };
    assert_eq!(refusal.kind, ExecRefusalKind::Request);
    assert_eq!(refusal.message, "this job id was used before (there is no such job)");
    assert_eq!(guest.jobs.executed.load(Ordering::SeqCst), 1);
}
