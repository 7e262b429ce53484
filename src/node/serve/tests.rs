//! Clients of a node whose fleet never answers: what they asked for stays undone.

use futures::FutureExt as _;
use matchlock_actors::root::Slots;
use tempfile::TempDir;

use super::*;

const VM: VmId = VmId::new(1);

struct Served {
    vms: TempDir,
    /// Whoever asks these waits for an actor.
    _slots: Slots,
    _guard: ServeGuard,
}

async fn served() -> Served {
    let vms = tempfile::tempdir().unwrap();
    let paths = VmPaths::new(vms.path(), VM);
    std::fs::create_dir_all(&paths.dir).unwrap();
    let slots = Slots::default();
    let sockets = OwnerSockets::new(NodeClient::new(slots.services()), TaskTracker::new());
    let guard = sockets.serve(VM, &paths).await.unwrap();
    Served { vms, _slots: slots, _guard: guard }
}

/// A client whose request was heard.
async fn heard(served: &Served, request: Request) -> Connection {
    let path = VmPaths::new(served.vms.path(), VM).owner_socket();
    let stream = socket::connect(&path).await.unwrap();
    let mut connection = Framed::new(stream, FrameCodec::default());
    connection.send(Frame::Request(request)).await.unwrap();
    assert_eq!(connection.next().await.unwrap().unwrap(), Frame::Heard);
    connection
}

fn command() -> Request {
    Request::Exec(ExecSpec {
        argv: vec![b"true".to_vec()],
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: false,
        terminal: None,
        stop_signal: None,
    })
}

#[tokio::test]
async fn a_kill_is_heard_however_many_commands_and_kills_there_are() {
    let served = served().await;
    let mut clients = Vec::new();
    for _ in 0..MAX_CLIENTS {
        clients.push(heard(&served, command()).await);
    }
    // These ask the guest, which takes its time.
    for _ in 0..MAX_CLIENTS {
        clients.push(heard(&served, Request::Kill { force: false }).await);
    }
    let mut refused = heard(&served, Request::Kill { force: false }).await;
    let Some(Ok(Frame::Killed(Err(failure)))) = refused.next().await else { panic!("no refusal") };
    assert_eq!(failure.kind, FailureKind::Busy, "{failure}");
    clients.push(heard(&served, Request::Kill { force: true }).await);
}

#[tokio::test]
async fn a_command_waits_for_a_place_unless_too_many_do() {
    let places = Places::new(TaskTracker::new());
    let mut running: Vec<_> =
        (0..MAX_CLIENTS).map(|_| places.command().now_or_never().unwrap().unwrap()).collect();
    let mut waiting: Vec<_> = (0..MAX_CLIENTS).map(|_| Box::pin(places.command())).collect();
    for waits in &mut waiting {
        assert!(waits.now_or_never().is_none());
    }
    let refused = places.command().now_or_never().unwrap().unwrap_err();
    assert!(refused.message.contains("64 others wait for a command's place"), "{refused}");
    // The first that asked is the next.
    running.pop();
    let mut waiting = waiting.into_iter();
    let _place = waiting.next().unwrap().now_or_never().unwrap().unwrap();
    assert!(waiting.next().unwrap().now_or_never().is_none());
}
