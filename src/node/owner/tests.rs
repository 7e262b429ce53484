//! Owners that are none: each says what an owner could say, in an order that is hard to meet with one.

use bytes::Bytes;
use matchlock_model::exec::ExitStatus;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use super::*;

const VM: VmId = VmId::new(1);

/// An owner that reads one request, says all this, and closes.
fn owner(words: Vec<Frame>) -> (TempDir, JoinHandle<Request>) {
    let vms = tempfile::tempdir().unwrap();
    let path = VmPaths::new(vms.path(), VM).owner_socket();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let said = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = Framed::new(stream, FrameCodec::default());
        let Some(Ok(Frame::Request(request))) = connection.next().await else {
            panic!("no request")
        };
        for word in words {
            connection.send(word).await.unwrap();
        }
        request
    });
    (vms, said)
}

fn spec() -> ExecSpec {
    ExecSpec {
        argv: vec![b"cat".to_vec()],
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: true,
        terminal: None,
        stop_signal: None,
    }
}

async fn all(session: ExecSession) -> Vec<ExecEvent> {
    let ExecSession { mut events, .. } = session;
    let mut seen = Vec::new();
    while let Some(event) = events.recv().await {
        seen.push(event.unwrap());
    }
    seen
}

const SEVEN: Frame = Frame::Ended(Ended::Exited(ExitStatus::Code(7)));

/// More than waits between the socket and us: what comes last is read long after the owner has closed.
#[tokio::test]
async fn a_last_word_counts_though_the_owner_takes_no_more() {
    let line = || Frame::Stdout(Bytes::from_static(b"x"));
    let mut words = vec![Frame::Heard, Frame::Started];
    words.extend((0..3 * QUEUE).map(|_| line()));
    words.push(SEVEN);
    let (vms, said) = owner(words);
    let session = exec(vms.path(), VM, spec()).await.unwrap();
    assert_eq!(said.await.unwrap(), Request::Exec(spec()));
    // It has closed: the first that is sent fails, and nobody takes another.
    while session.stdin.send(StdinInput::Data(Bytes::from_static(b"y"))).await.is_ok() {}
    let seen = all(session).await;
    assert_eq!(seen.len(), 1 + 3 * QUEUE + 1);
    assert_eq!(seen.last(), Some(&ExecEvent::Exited(ExitStatus::Code(7))));
}

#[tokio::test]
async fn an_owner_that_ends_without_a_last_word_is_lost() {
    let (vms, said) = owner(vec![Frame::Heard, Frame::Started]);
    let mut session = exec(vms.path(), VM, spec()).await.unwrap();
    said.await.unwrap();
    assert_eq!(session.events.recv().await.unwrap().unwrap(), ExecEvent::Started);
    let lost = session.events.recv().await.unwrap().unwrap_err();
    assert!(lost.to_string().contains("the VM's owner ended"), "{lost}");
    assert!(session.events.recv().await.is_none());
}

/// Owners of older versions answer, and do not say before that they have heard.
#[tokio::test]
async fn an_answer_says_as_well_that_it_was_heard() {
    let (vms, _said) = owner(vec![Frame::Started, Frame::Stdout(Bytes::from_static(b"x")), SEVEN]);
    let seen = all(exec(vms.path(), VM, spec()).await.unwrap()).await;
    let output = ExecEvent::Output(OutputStream::Stdout, Bytes::from_static(b"x"));
    let end = ExecEvent::Exited(ExitStatus::Code(7));
    assert_eq!(seen, [ExecEvent::Started, output, end]);

    let limit = Some(Duration::from_secs(60));
    for done in [None, limit] {
        for heard in [None, limit] {
            let how = KillRequest { force: true, heard, done };
            for first in [vec![], vec![Frame::Heard]] {
                let last = Frame::Killed(Ok(()));
                let words = [first.clone(), vec![last]].concat();
                let (vms, said) = owner(words);
                kill(vms.path(), VM, how).await.unwrap();
                assert_eq!(said.await.unwrap(), Request::Kill { force: true });

                let refusal = Failure::new(FailureKind::Host, "it could not");
                let (vms, _said) =
                    owner([first.clone(), vec![Frame::Killed(Err(refusal))]].concat());
                let answer = kill(vms.path(), VM, how).await;
                // Who only wants to be heard does not wait for an answer that comes later.
                let waits = done.is_some() || first.is_empty();
                assert_eq!(answer.is_err(), waits, "{how:?}: {answer:?}");
            }
        }
    }
}
