//! The link against guests that break the rules on purpose: raw bytes below yamux, lies above it.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use matchlock_wire::frame::{Codec, MAX_CHUNK_BYTES};
use matchlock_wire::message::{AgentInfo, ExecOutput, ExitStatus, OutputStream, Reply};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_util::codec::Encoder;

use super::conformance::{SOON, command_with_stdin, next};
use super::mini_guest::{TestMachine, answer_hello};
use super::scanner::{DATA, GO_AWAY, HEADER_BYTES, SYN, WINDOW_UPDATE};
use super::{ExecEvent, LinkConnector, LinkError, YamuxConnector};

const PING: u8 = 2;
const ACK: u16 = 2;
const FIN: u16 = 4;

/// The streams that a host opens: the first for its hello, the next for the first command.
const HELLO_STREAM: u32 = 1;
const JOB_STREAM: u32 = 3;

fn frame(kind: u8, flags: u16, stream: u32, length: u32) -> Vec<u8> {
    let mut bytes = vec![0, kind];
    bytes.extend(flags.to_be_bytes());
    bytes.extend(stream.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

fn data(stream: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = frame(DATA, 0, stream, u32::try_from(body.len()).expect("a length"));
    bytes.extend(body);
    bytes
}

fn message<T: Serialize>(item: T) -> Vec<u8> {
    let mut bytes = bytes::BytesMut::new();
    Codec::<(), T>::default().encode(item, &mut bytes).expect("a message");
    bytes.to_vec()
}

/// Messages on the job's stream, each in one data frame.
fn outputs(items: impl IntoIterator<Item = ExecOutput>) -> Vec<u8> {
    items.into_iter().flat_map(|item| data(JOB_STREAM, &message(item))).collect()
}

fn output(offset: u64, len: usize) -> ExecOutput {
    ExecOutput::Output { stream: OutputStream::Stdout, offset, data: vec![b'x'; len] }
}

/// Reads what the host sends until a stream's first data frame.
async fn wait_for_stream(stream: &mut BufReader<UnixStream>, wanted: u32) {
    loop {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header).await.expect("a header");
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four"));
        if header[1] == DATA {
            let mut body = vec![0; usize::try_from(number(8)).expect("a length")];
            stream.read_exact(&mut body).await.expect("a body");
            if number(4) == wanted {
                return;
            }
        }
    }
}

/// An agent that says hello honestly, waits for the first command, then sends these bytes, over
/// and over if asked to, and reads everything.
fn attacker(bytes: Vec<u8>, times: usize) -> TestMachine {
    let bytes = Arc::new(bytes);
    TestMachine::new(move |stream| attack(stream, bytes.clone(), times))
}

fn attack(stream: UnixStream, bytes: Arc<Vec<u8>>, times: usize) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let mut stream = answer_hello(stream).await;
        wait_for_stream(&mut stream, HELLO_STREAM).await;
        let hello = Reply::Hello(AgentInfo {
            agent_version: "evil".to_owned(),
            kernel_release: String::new(),
            init_started_us: 0,
            agent_ready_us: 0,
        });
        let mut reply = data(HELLO_STREAM, &message(hello));
        reply.extend(frame(DATA, FIN, HELLO_STREAM, 0));
        stream.write_all(&reply).await.expect("taken");
        wait_for_stream(&mut stream, JOB_STREAM).await;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let reading = async { while let Ok(1..) = reader.read(&mut [0; 4096]).await {} };
        let writing = async {
            for _ in 0..times {
                if writer.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        };
        futures::join!(reading, writing);
    })
}

/// Runs a command against the attacker: the cause that the job and the link end with.
async fn outcome(machine: &TestMachine) -> LinkError {
    let link = YamuxConnector.connect(machine, SOON).await.expect("a link");
    let mut session = link.exec(&command_with_stdin("cat")).await.expect("a session");
    // Otherwise a command waits when the cause is a loss.
    link.give_up();
    let mut last = None;
    while let Some(event) = next(&mut session).await {
        last = Some(event);
    }
    let Some(Err(of_job)) = last else { panic!("the job ended with {last:?}") };
    let of_link = timeout(SOON, link.closed()).await.expect("the link ends");
    assert_eq!(of_job.to_string(), of_link.to_string(), "one cause for all");
    of_link
}

async fn is_cut(name: &str, bytes: Vec<u8>, times: usize, expected: &str) {
    let cause = outcome(&attacker(bytes, times)).await;
    match &cause {
        LinkError::Protocol { what } => assert!(what.contains(expected), "{name}: {what}"),
        other => panic!("{name}: {other:?}"),
    }
}

#[tokio::test]
async fn frames_that_no_guest_sends_cut_the_link() {
    is_cut("a stream", frame(DATA, SYN, 2, 0), 1, "opened the stream 2").await;
    is_cut("a stream", frame(WINDOW_UPDATE, SYN, 2, 0), 1, "opened the stream 2").await;
    is_cut("our stream", frame(DATA, SYN, JOB_STREAM, 0), 1, "opened the stream 3").await;
    is_cut("2 GB", frame(DATA, 0, JOB_STREAM, 2_000_000_000), 1, "2000000000 bytes").await;
    is_cut("unknown stream", data(99, b"x"), 1, "the stream 99, which is not open").await;
    is_cut("no stream", data(0, b"x"), 1, "the stream 0, which is not open").await;
    is_cut("garbage", vec![0xA5; 4096], 1, "unknown version 165").await;
    is_cut("text", b"\0hello, this is not yamux".to_vec(), 1, "unknown kind 104").await;
    is_cut("credit", frame(WINDOW_UPDATE, 0, JOB_STREAM, u32::MAX), 2, "refused a frame").await;
    is_cut("a pong", frame(PING, ACK, 0, 77), 1, "refused a frame").await;
}

#[tokio::test]
async fn floods_cut_the_link() {
    is_cut("streams", frame(DATA, SYN, 2, 0).repeat(1000), 200, "opened the stream").await;
    is_cut("pings", frame(PING, SYN, 0, 1).repeat(1000), 500, "control frames").await;
    let credit = frame(WINDOW_UPDATE, 0, JOB_STREAM, 0).repeat(1000);
    is_cut("credit", credit, 500, "control frames").await;
    is_cut("nothing", frame(DATA, 0, JOB_STREAM, 0).repeat(1000), 500, "control frames").await;
}

#[tokio::test]
async fn a_go_away_is_a_loss() {
    let cause = outcome(&attacker(frame(GO_AWAY, 0, 0, 0), 1)).await;
    assert!(matches!(cause, LinkError::Lost { .. }), "{cause:?}");
}

#[tokio::test]
async fn malformed_conversations_cut_the_link() {
    use ExecOutput::{Attached, Exited, Started, StdinAck};
    let exited = || Exited(ExitStatus::Code(0));
    let cases: [(&str, Vec<ExecOutput>, &str); 11] = [
        ("output first", vec![output(0, 1)], "output before"),
        ("end first", vec![exited()], "the end of a command before"),
        ("attached", vec![Attached { stdin_offset: 0 }], "an attachment before"),
        ("two starts", vec![Started, Started], "the start of a command after"),
        ("attached late", vec![Started, Attached { stdin_offset: 0 }], "an attachment after"),
        ("a gap", vec![Started, output(0, 1), output(2, 1)], "from 2, expected 1"),
        ("an overlap", vec![Started, output(0, 2), output(1, 1)], "from 1, expected 2"),
        ("a huge offset", vec![Started, output(u64::MAX, 1)], "expected 0"),
        ("a long chunk", vec![Started, output(0, MAX_CHUNK_BYTES + 1)], "bytes of output"),
        ("a very long one", vec![Started, output(0, 2 * MAX_CHUNK_BYTES)], "a message of"),
        ("an ack", vec![Started, StdinAck { offset: 1 }], "acknowledged 1 bytes of stdin"),
    ];
    for (name, items, expected) in cases {
        is_cut(name, outputs(items), 1, expected).await;
    }
    let mut closing = outputs([Started]);
    closing.extend(frame(DATA, FIN, JOB_STREAM, 0));
    is_cut("an early end", closing, 1, "closed a command's stream too early").await;
    let mut unknown = outputs([Started]);
    unknown.extend(data(JOB_STREAM, &[0, 0, 0, 1, 99]));
    is_cut("an unknown message", unknown, 1, "not a known message").await;
    let mut trailing = outputs([Started]);
    trailing.extend(data(JOB_STREAM, &[0, 0, 0, 2, 0, 0]));
    is_cut("trailing bytes", trailing, 1, "after its message").await;
}

#[tokio::test]
async fn more_than_the_window_is_cut_when_nobody_reads() {
    let chunks = (0..60).map(|index| output(index * 32_000, 32_000));
    let bytes = outputs(std::iter::once(ExecOutput::Started).chain(chunks));
    let machine = attacker(bytes, 1);
    let link = YamuxConnector.connect(&machine, SOON).await.expect("a link");
    let session = link.exec(&command_with_stdin("cat")).await.expect("a session");
    let cause = timeout(SOON, link.closed()).await.expect("the link ends");
    // Either the job's window or yamux's own is overrun first.
    assert!(matches!(cause, LinkError::Protocol { .. }), "{cause:?}");
    drop(session);
}

#[tokio::test]
async fn the_events_before_a_violation_are_delivered() {
    let bytes = outputs([ExecOutput::Started, output(0, 5), output(0, 5)]);
    let machine = attacker(bytes, 1);
    let link = YamuxConnector.connect(&machine, SOON).await.expect("a link");
    let mut session = link.exec(&command_with_stdin("cat")).await.expect("a session");
    assert!(matches!(next(&mut session).await, Some(Ok(ExecEvent::Started))));
    assert!(matches!(next(&mut session).await, Some(Ok(ExecEvent::Output(..)))));
    assert!(matches!(next(&mut session).await, Some(Err(LinkError::Protocol { .. }))));
    assert!(next(&mut session).await.is_none());
}

#[tokio::test]
async fn a_hostile_link_does_not_hold_up_others() {
    // One-byte frames without end that are legal one by one: an unfinished message.
    let mut bytes = outputs([ExecOutput::Started]);
    bytes.extend(data(JOB_STREAM, &[0]).repeat(1000));
    let evil = attacker(bytes, 1);
    let evil_link = YamuxConnector.connect(&evil, SOON).await.expect("a link");
    let _evil_session = evil_link.exec(&command_with_stdin("cat")).await.expect("a session");
    let (machine, _guest) = TestMachine::with_guest();
    let link = YamuxConnector.connect(&machine, SOON).await.expect("a link");
    for _ in 0..20 {
        let echo = super::conformance::run(&*link, "echo fine");
        let (out, _) = timeout(Duration::from_secs(5), echo).await.expect("in time");
        assert_eq!(out, b"fine\n");
    }
}
