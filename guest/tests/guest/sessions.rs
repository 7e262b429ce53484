//! Sessions that break, lines full of stale bytes, hosts that come back.

use matchlock_wire::message::{
    Configure, ExecFailureKind, ExecOutput, ExitStatus, JobId, Reply, Request, Shutdown,
};
use matchlock_wire::resync::{PREAMBLE_BYTES, hello};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::support::{Guest, Host, block_on, greet, in_time, start};

const OK: ExecOutput = ExecOutput::Exited(ExitStatus::Code(0));

/// The same numbers for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn configure(hostname: &str) -> Request {
    Request::Configure(Configure {
        hostname: hostname.into(),
        add_hosts: vec![],
        dns_servers: vec![],
        clock_unix_ns: 0,
        cpu_millis: 0,
        network: None,
    })
}

#[test]
fn requests_have_their_answers() {
    block_on(async {
        let (mut guest, host) = Guest::with_host().await;
        let Reply::Hello(info) = host.ask(Request::Hello).await else {
            panic!("no hello");
        };
        assert_eq!((info.init_started_us, info.agent_ready_us), (1, 2));
        assert_eq!(host.ask(configure("box")).await, Reply::Done);
        assert_eq!(
            host.ask(configure("refused")).await,
            Reply::Failed("cannot set the hostname to \"refused\": not today".into())
        );
        let order = Request::Shutdown(Shutdown { grace_ms: 1234 });
        assert_eq!(host.ask(order.clone()).await, Reply::Done);
        let taken = in_time(guest.orders.recv()).await.unwrap();
        assert_eq!(taken.grace, std::time::Duration::from_millis(1234));
        // The stream was dropped after the answer, so it is known to have arrived.
        assert!(in_time(taken.answered).await.is_err());
        let mut late = host.exec(start(1, &["true"])).await;
        match late.finish().await {
            ExecOutput::Failed(failure) => assert_eq!(failure.kind, ExecFailureKind::Unavailable),
            other => panic!("{other:?}"),
        }
        assert_eq!(host.ask(order).await, Reply::Done);
    });
}

#[test]
fn a_hello_is_found_in_any_rubbish() {
    block_on(async {
        let (_guest, mut line) = Guest::start();
        let mut dice = Dice(7);
        for nonce in 1..20 {
            // Rubbish of any length, and sometimes a hello that was cut off.
            let count = usize::try_from(dice.below(5000)).unwrap();
            let mut rubbish: Vec<u8> =
                (0..count).map(|_| dice.below(256).to_le_bytes()[0]).collect();
            let whole = hello(&[99; 16]);
            let cut = PREAMBLE_BYTES + usize::try_from(dice.below(32)).unwrap();
            if dice.below(2) == 0 {
                rubbish.extend_from_slice(&whole[PREAMBLE_BYTES..cut]);
            }
            in_time(line.write_all(&rubbish)).await.unwrap();
            let (host, _) = Host::dial(line.clone(), nonce).await;
            assert!(matches!(host.ask(Request::Hello).await, Reply::Hello(_)));
            host.vanish().await;
        }
    });
}

#[test]
fn a_host_of_another_version_learns_ours_and_the_next_one_is_served() {
    block_on(async {
        let (_guest, mut line) = Guest::start();
        let mut other = hello(&[5; 16]);
        let version = other.len() - 18;
        other[version..version + 2].copy_from_slice(&999_u16.to_be_bytes());
        in_time(line.write_all(&other)).await.unwrap();
        let mut answer = [0; matchlock_wire::resync::GREETING_BYTES];
        let read = tokio::io::AsyncReadExt::read_exact(&mut line, &mut answer);
        in_time(read).await.unwrap();
        let mut hunter = matchlock_wire::resync::Hunter::for_acknowledgement();
        let (_, greeting) = hunter.feed(&answer);
        let greeting = greeting.unwrap();
        assert_eq!(greeting.version, matchlock_wire::PROTOCOL_VERSION);
        assert_eq!(greeting.nonce, [5; 16]);
        let (greeting, stale, _) = in_time(greet(&mut line, [6; 16])).await.unwrap();
        assert_eq!(greeting.nonce, [6; 16]);
        assert_eq!(stale, 0);
    });
}

#[test]
fn a_session_that_breaks_off_is_followed_by_another() {
    block_on(async {
        let (guest, line) = Guest::start();
        let (host, _) = Host::dial(line, 1).await;
        let mut job = host.exec(start(1, &["sleep", "1000"])).await;
        assert_eq!(job.next().await, Some(ExecOutput::Started));
        drop(job);
        host.vanish().await;
        // Now the line itself is at its end: the guest waits for the next.
        for nonce in 2..6 {
            let line = guest.plug().await;
            let (host, stale) = Host::dial(line, nonce).await;
            assert_eq!(stale, 0);
            assert!(matches!(host.ask(Request::Hello).await, Reply::Hello(_)));
            host.vanish().await;
        }
        assert_eq!(guest.jobs.count(), 1, "the command has outlived them all");
        let (host, _) = Host::dial(guest.plug().await, 9).await;
        host.attach(JobId([1; 16]), 0).await.release().await;
    });
}

#[test]
fn nonsense_ends_the_session_and_nothing_else() {
    block_on(async {
        let (guest, mut line) = Guest::start();
        let (host, _) = Host::dial(line.clone(), 1).await;
        let mut job = host.exec(start(1, &["sleep", "1000"])).await;
        assert_eq!(job.next().await, Some(ExecOutput::Started));
        drop(job);
        host.vanish().await;
        let data_frame = |length: u32| {
            let mut frame = vec![0, 0, 0, 1, 0, 0, 0, 1];
            frame.extend_from_slice(&length.to_be_bytes());
            frame
        };
        let nonsense = [
            vec![0xFF; 64],
            vec![0; 5],
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            data_frame(u32::MAX),
            // The preamble must fill up whatever these announce.
            data_frame(65_535),
            data_frame(1),
            data_frame(65_535)[..11].to_vec(),
        ];
        for (nonce, bytes) in (2..).zip(nonsense) {
            in_time(line.write_all(&bytes)).await.unwrap();
            let (host, _) = Host::dial(line.clone(), nonce).await;
            assert!(matches!(host.ask(Request::Hello).await, Reply::Hello(_)));
            host.vanish().await;
        }
        let (host, _) = Host::dial(line, 20).await;
        host.attach(JobId([1; 16]), 0).await.release().await;
        assert_eq!(guest.jobs.count(), 0);
    });
}

/// Vanishes again and again while a command reads and writes; every byte must arrive once.
pub(crate) async fn torn<T>(seed: u64, next_line: impl AsyncFn() -> T)
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let mut dice = Dice(seed);
    let input: Vec<u8> =
        (0..700_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let (mut host, _) = Host::dial(next_line().await, 1).await;
    let id = seed.to_le_bytes()[0];
    let mut request = start(id, &["cat"]);
    request.stdin = true;
    let mut job = host.exec(request).await;
    // Others keep the line busy; they block once their window is full.
    for other in 1..=3 {
        let id = id.wrapping_add(100 + other * 10);
        let mut noise = host.exec(start(id, &["yes"])).await;
        assert_eq!(noise.next().await, Some(ExecOutput::Started));
    }
    let mut stdout: Vec<u8> = Vec::new();
    let mut tears = 0_u8;
    let end = loop {
        let limit = 1 + dice.below(600_000);
        let fed = job.feed_until(&input, limit).await;
        stdout.append(&mut job.stdout);
        if let Some(end) = fed {
            break end;
        }
        drop(job);
        host.vanish().await;
        tears += 1;
        (host, _) = Host::dial(next_line().await, 1 + tears).await;
        let noise = id.wrapping_add(100 + (tears % 3 + 1) * 10);
        let mut noise = host.attach(JobId([noise; 16]), 0).await;
        assert!(matches!(noise.next().await, Some(ExecOutput::Attached { .. })));
        job = host.attach(JobId([id; 16]), stdout.len() as u64).await;
        assert!(matches!(job.next().await, Some(ExecOutput::Attached { .. })));
    };
    assert_eq!(end, OK);
    assert!(tears > 2, "only {tears} tears");
    assert!(stdout == input, "not the same after {tears} tears");
    job.release().await;
    for other in 1..=3 {
        let noise = id.wrapping_add(100 + other * 10);
        host.attach(JobId([noise; 16]), 0).await.release().await;
    }
    host.vanish().await;
}

#[test]
fn every_byte_arrives_once_over_a_line_that_hides_the_change_of_hosts() {
    for seed in 1..=6 {
        block_on(async {
            let (_guest, line) = Guest::start();
            torn(seed, async || line.clone()).await;
        });
    }
}

#[test]
fn every_byte_arrives_once_over_a_line_that_breaks() {
    for seed in 11..=16 {
        block_on(async {
            let (guest, first) = Guest::start();
            let first = std::cell::RefCell::new(Some(first));
            torn(seed, async || {
                let taken = first.borrow_mut().take();
                match taken {
                    Some(line) => line,
                    None => guest.plug().await,
                }
            })
            .await;
        });
    }
}
