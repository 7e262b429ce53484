//! The lock for choosing subnets: one suite for the real one and the fake, and what only processes
//! and namespaces show.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use matchlock_host::netlock::{
    FakeNetworkLocks, LinuxNetworkLocks, NetworkLockError, NetworkLocks,
};

use crate::namespace::Namespace;

const NOW: Duration = Duration::ZERO;
const LONG: Duration = Duration::from_secs(60);

/// What every implementation must do.
async fn locks_conform(locks: Arc<dyn NetworkLocks>) {
    let held = locks.acquire(NOW).await.unwrap();
    for patience in [NOW, Duration::from_millis(30)] {
        let Err(refused) = locks.acquire(patience).await else { panic!("held twice") };
        assert!(
            matches!(refused, NetworkLockError::Held { waited, .. } if waited >= patience),
            "{refused}"
        );
    }

    // A waiter gets it when it is released; one that was dropped holds nothing.
    let mut given_up = Box::pin(locks.acquire(LONG));
    tokio::select! {
        biased;
        _ = &mut given_up => panic!("held twice"),
        () = tokio::task::yield_now() => {}
    }
    let waiter = tokio::spawn({
        let locks = Arc::clone(&locks);
        async move { locks.acquire(LONG).await }
    });
    tokio::task::yield_now().await;
    drop(given_up);
    drop(held);
    drop(waiter.await.unwrap().unwrap());

    // Many at once: never two.
    let inside = Arc::new(AtomicU32::new(0));
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let (locks, inside) = (Arc::clone(&locks), Arc::clone(&inside));
            tokio::spawn(async move {
                for _ in 0..5 {
                    let _held = locks.acquire(LONG).await.unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    tokio::task::yield_now().await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    drop(locks.acquire(LONG).await.unwrap());
}

#[test]
fn the_real_lock_conforms() {
    Namespace::new().block_on(|| async { locks_conform(Arc::new(LinuxNetworkLocks::new())).await });
}

#[tokio::test]
async fn the_fake_lock_conforms() {
    locks_conform(Arc::new(FakeNetworkLocks::default())).await;
}

#[test]
fn two_namespaces_do_not_wait_for_each_other() {
    let (one, other) = (Namespace::new(), Namespace::new());
    let acquire = || async { LinuxNetworkLocks::new().acquire(NOW).await };
    let held = one.block_on(acquire).unwrap();
    let also_held = other.block_on(acquire).unwrap();
    assert!(one.block_on(acquire).is_err());
    drop((held, also_held));
}

#[test]
fn a_waiter_is_woken_at_once_and_told_who_holds_it() {
    let namespace = Namespace::new();
    namespace.block_on(|| async {
        let name = SocketAddr::from_abstract_name("matchlock-subnets").unwrap();
        let held = UnixListener::bind_addr(&name).unwrap();
        let refused = LinuxNetworkLocks::new().acquire(NOW).await.map(drop).unwrap_err();
        let text = refused.to_string();
        assert!(text.contains(&format!("process {} of user 0", std::process::id())), "{text}");
        let released = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            drop(held);
            Instant::now()
        });
        let lock = LinuxNetworkLocks::new().acquire(LONG).await.unwrap();
        let late = released.await.unwrap().elapsed();
        assert!(late < Duration::from_secs(1), "{late:?}");
        drop(lock);
    });
}

#[test]
fn a_killed_process_holds_nothing() {
    Namespace::new().block_on(|| async {
        let lock = LinuxNetworkLocks::new();
        let name = SocketAddr::from_abstract_name("matchlock-subnets").unwrap();
        let held = UnixListener::bind_addr(&name).unwrap();
        rustix::io::fcntl_setfd(&held, rustix::io::FdFlags::empty()).unwrap();
        let mut holder =
            Command::new("/bin/cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        drop(held);
        assert!(lock.acquire(Duration::from_millis(100)).await.is_err());
        holder.kill().unwrap();
        drop(lock.acquire(LONG).await.unwrap());
        holder.wait().unwrap();
    });
}

/// `cargo test -p matchlock-host --test net -- --ignored --nocapture measure`
#[test]
#[ignore = "a measurement"]
fn measure_locks() {
    const ROUNDS: u32 = 250;
    let namespace = Namespace::new();
    namespace.block_on(|| async {
        let begun = Instant::now();
        for _ in 0..1000 {
            drop(LinuxNetworkLocks::new().acquire(NOW).await.unwrap());
        }
        println!("free lock: {:?} each", begun.elapsed() / 1000);
    });
    let begun = Instant::now();
    // Threads of the namespace's thread are in the namespace too.
    let longest = namespace.run(|| {
        let contend = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let mut longest = Duration::ZERO;
                for _ in 0..ROUNDS {
                    let begun = Instant::now();
                    let _held = LinuxNetworkLocks::new().acquire(LONG).await.unwrap();
                    longest = longest.max(begun.elapsed());
                }
                longest
            })
        };
        let threads: Vec<_> = (0..8).map(|_| std::thread::spawn(contend)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
    });
    println!("8 contenders: {:?} each, longest {longest:?}", begun.elapsed() / (8 * ROUNDS));
}
