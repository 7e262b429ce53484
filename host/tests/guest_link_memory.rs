//! What a guest can make the host allocate through its link: measured, in a process of its own.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use matchlock_host::guest_link::{LinkConnector, YamuxConnector};
use matchlock_host::hypervisor::{ExitReason, HypervisorError, Machine, MachineExit, Saved};
use matchlock_model::exec::ExecSpec;
use matchlock_model::identity::ProcessIdentity;
use matchlock_wire::frame::{Codec, MAX_CHUNK_BYTES};
use matchlock_wire::message::{AgentInfo, ExecOutput, OutputStream, Reply};
use matchlock_wire::resync::{Hunter, acknowledgement};
use serde::Serialize;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio_util::codec::Encoder;

const SOON: Duration = Duration::from_secs(120);
const JOBS: u32 = 8;

/// Output that nobody reads, in frames of one byte. Kept as yamux keeps it, each would cost about
/// 65 bytes: 8 jobs × 7 messages × 32 KiB would be 119 MB.
const MESSAGES: u32 = 7;

/// The most that may be in use beyond what was before: the jobs' windows (2 MiB), yamux's
/// (2 MiB), the ledger's limit of unread frames (1 MiB), and room for an allocator's habits.
const MOST_KB: u64 = 24 * 1024;

struct Attacker {
    link: Mutex<Option<UnixStream>>,
}

#[async_trait]
impl Machine for Attacker {
    fn identity(&self) -> ProcessIdentity {
        ProcessIdentity { pid: 1, start_ticks: 1, boot_id: "test".to_owned() }
    }

    async fn open_link(&self) -> Result<UnixStream, HypervisorError> {
        Ok(self.link.lock().await.take().expect("one connection"))
    }

    async fn wait_exit(&self) -> MachineExit {
        MachineExit { reason: ExitReason::Killed, status: String::new() }
    }

    async fn kill(&self, _deadline: Duration) -> Result<(), HypervisorError> {
        Ok(())
    }

    async fn save(&self, _to: std::fs::File) -> Result<Saved, HypervisorError> {
        Err(HypervisorError::Control { what: "nobody saves it".to_owned() })
    }

    fn console_tail(&self, _max_lines: usize) -> Result<Vec<String>, HypervisorError> {
        Ok(Vec::new())
    }
}

fn frame(stream: u32, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0];
    bytes.extend(flags.to_be_bytes());
    bytes.extend(stream.to_be_bytes());
    bytes.extend(u32::try_from(body.len()).expect("a length").to_be_bytes());
    bytes.extend(body);
    bytes
}

fn message<T: Serialize>(item: T) -> BytesMut {
    let mut bytes = BytesMut::new();
    Codec::<(), T>::default().encode(item, &mut bytes).expect("a message");
    bytes
}

/// Reads the host's frames until the first data on this stream.
fn wait_for_stream(link: &mut StdStream, wanted: u32) {
    loop {
        let mut header = [0; 12];
        link.read_exact(&mut header).expect("a header");
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four"));
        if header[1] == 0 {
            let mut body = vec![0; usize::try_from(number(8)).expect("a length")];
            link.read_exact(&mut body).expect("a body");
            if number(4) == wanted {
                return;
            }
        }
    }
}

/// The guest: honest until all jobs are there, then tiny frames on all of them. Returns the link,
/// still open, when everything was taken.
fn attack(mut link: StdStream) -> StdStream {
    let mut hunter = Hunter::for_hello();
    let nonce = loop {
        let mut byte = [0];
        link.read_exact(&mut byte).expect("a hello");
        if let (_, Some(greeting)) = hunter.feed(&byte) {
            break greeting.nonce;
        }
    };
    link.write_all(&acknowledgement(&nonce)).expect("taken");
    wait_for_stream(&mut link, 1);
    let hello = Reply::Hello(AgentInfo {
        agent_version: "evil".to_owned(),
        kernel_release: String::new(),
        init_started_us: 0,
        agent_ready_us: 0,
    });
    link.write_all(&frame(1, 0, &message(hello))).expect("taken");
    link.write_all(&frame(1, 4, b"")).expect("taken");
    let streams = (0..JOBS).map(|job| 3 + 2 * job);
    for stream in streams.clone() {
        wait_for_stream(&mut link, stream);
        link.write_all(&frame(stream, 0, &message(ExecOutput::Started))).expect("taken");
    }
    // The host's window updates must not fill the socket.
    let mut reader = link.try_clone().expect("another handle");
    let reading = std::thread::spawn(move || {
        let mut scrap = [0; 4096];
        while let Ok(1..) = reader.read(&mut scrap) {}
    });
    for index in 0..MESSAGES {
        let data = vec![b'x'; MAX_CHUNK_BYTES];
        let offset = u64::from(index) * MAX_CHUNK_BYTES as u64;
        let output = message(ExecOutput::Output { stream: OutputStream::Stdout, offset, data });
        for stream in streams.clone() {
            let tiny: Vec<u8> = output.iter().flat_map(|byte| frame(stream, 0, &[*byte])).collect();
            link.write_all(&tiny).expect("taken");
        }
    }
    drop(reading);
    link
}

/// A line of `/proc/self/status`, in kB.
fn status_kb(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the status");
    let line = status.lines().find(|line| line.starts_with(name)).expect("the line");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

fn start_attack() -> (Attacker, JoinHandle<StdStream>) {
    let (host, guest) = StdStream::pair().expect("a socket pair");
    host.set_nonblocking(true).expect("non-blocking");
    let host = UnixStream::from_std(host).expect("a tokio socket");
    (Attacker { link: Mutex::new(Some(host)) }, std::thread::spawn(move || attack(guest)))
}

#[tokio::test]
async fn tiny_frames_that_nobody_reads_cost_little() {
    let (machine, attack) = start_attack();
    let link = YamuxConnector.connect(&machine, SOON).await.expect("a link");
    let spec = ExecSpec {
        argv: vec![b"yes".to_vec()],
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: false,
        terminal: None,
        stop_signal: None,
    };
    let before = status_kb("VmRSS");
    let mut sessions = Vec::new();
    for _ in 0..JOBS {
        sessions.push(link.exec(&spec).await.expect("a session"));
    }
    let attack = tokio::task::spawn_blocking(move || attack.join().expect("an attack"));
    let guest = tokio::time::timeout(SOON, attack).await.expect("in time").expect("an attack");
    let peak = status_kb("VmHWM");
    assert!(peak - before < MOST_KB, "{} kB more than before", peak - before);

    // The link lives, and what was sent is there.
    let mut events = sessions.pop().expect("a session").events;
    let mut received = 0;
    while received < usize::try_from(MESSAGES).expect("a count") * MAX_CHUNK_BYTES {
        use matchlock_host::guest_link::ExecEvent;
        match tokio::time::timeout(SOON, events.recv()).await.expect("in time") {
            Some(Ok(ExecEvent::Output(_, data))) => received += data.len(),
            Some(Ok(ExecEvent::Started)) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
    drop((guest, Arc::clone(&link)));
}
