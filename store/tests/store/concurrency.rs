//! Many connections at once: nobody is refused, nothing is lost, numbers have no gaps.

use std::sync::Barrier;

use matchlock_model::phase::Phase;
use matchlock_store::{WriteOp, WriteOutcome};

use crate::support::{EPOCH, Home, apply_one, at, insert, vm};

const THREADS: i64 = 4;
const WRITES: i64 = 150;

#[tokio::test]
async fn writers_in_parallel_see_no_busy_database_and_leave_no_gaps() {
    let home = Home::new();
    let mut first = home.writer();
    for number in [1, 2] {
        apply_one(&mut first, insert(vm(number))).unwrap();
    }
    let start = Barrier::new(usize::try_from(THREADS).unwrap());
    let mut answered: Vec<(u32, i64)> = std::thread::scope(|scope| {
        let (home, start) = (&home, &start);
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || write_many(home, start, thread)))
            .collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    answered.sort_unstable();
    let per_vm = THREADS * WRITES;
    let expected: Vec<_> = [1, 2]
        .into_iter()
        .flat_map(|number| (2..per_vm + 2).map(move |version| (number, version)))
        .collect();
    assert_eq!(answered, expected, "each write has its own number");
    let reader = home.reader();
    for number in [1, 2] {
        let history = reader.history(vm(number)).await.unwrap();
        let versions: Vec<_> = history.iter().map(|r| r.version).collect();
        assert_eq!(versions, (1..per_vm + 2).collect::<Vec<_>>());
    }
    let report: String =
        home.plain().query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(report, "ok");
}

/// Writes to both VMs in turn, a batch of two at a time; answers the numbers given.
fn write_many(home: &Home, start: &Barrier, thread: i64) -> Vec<(u32, i64)> {
    let mut writer = home.writer();
    start.wait();
    let mut numbers = Vec::new();
    for count in 0..WRITES {
        let batch = [1, 2].map(|number| WriteOp::SetPhase {
            vm: vm(number),
            epoch: EPOCH,
            phase: Phase::Creating,
            last_error: Some(format!("thread {thread}, write {count}")),
            backend: None,
            resources: None,
            cleanup: Vec::new(),
            at: at(count),
        });
        for (number, answer) in [1, 2].into_iter().zip(writer.apply(batch.into())) {
            match answer {
                Ok(WriteOutcome::Version(version)) => numbers.push((number, version)),
                other => panic!("{other:?}"),
            }
        }
    }
    numbers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_are_not_blocked_by_a_writer_and_do_not_block_it() {
    let home = Home::new();
    let mut writer = home.writer();
    apply_one(&mut writer, insert(vm(1))).unwrap();
    let reader = home.reader();
    // Another process is in the middle of a write.
    let other = home.plain();
    other.execute_batch("BEGIN IMMEDIATE; UPDATE vms SET status = 'half written'").unwrap();
    let seen = reader.vm(vm(1)).await.unwrap().unwrap();
    assert_eq!(seen.status, "creating");
    other.execute_batch("COMMIT").unwrap();
    let seen = reader.vm(vm(1)).await.unwrap().unwrap();
    assert_eq!(seen.status, "half written");
    // And more readers than connections.
    let all = (0..32).map(|_| {
        let reader = reader.clone();
        tokio::spawn(async move { reader.vms().await.unwrap().len() })
    });
    for answer in all.collect::<Vec<_>>() {
        assert_eq!(answer.await.unwrap(), 1);
    }
}

#[tokio::test]
async fn a_second_look_reads_again_only_what_somebody_has_changed() {
    let home = Home::new();
    let mut writer = home.writer();
    apply_one(&mut writer, insert(vm(1))).unwrap();
    let reader = home.reader();
    let ids = |vms: matchlock_store::Vms| -> Vec<_> {
        let mut ids: Vec<_> = vms.into_iter().map(|row| row.unwrap().id).collect();
        ids.sort_unstable();
        ids
    };
    let (vms, look) = reader.look_at_vms().await.unwrap();
    assert_eq!(ids(vms), [vm(1)]);
    // What is not committed is no change.
    let other = home.plain();
    other.execute_batch("BEGIN IMMEDIATE; DELETE FROM vms").unwrap();
    assert!(look.again().await.unwrap().is_none());
    other.execute_batch("ROLLBACK").unwrap();

    let (_, look) = reader.look_at_vms().await.unwrap();
    // Two who look at once have a connection each.
    let (_, other_look) = reader.look_at_vms().await.unwrap();
    apply_one(&mut writer, insert(vm(2))).unwrap();
    for look in [look, other_look] {
        assert_eq!(look.again().await.unwrap().map(ids), Some(vec![vm(1), vm(2)]));
    }
    // So it is when all changes were moved from the log into the file.
    let (_, look) = reader.look_at_vms().await.unwrap();
    apply_one(&mut writer, insert(vm(3))).unwrap();
    other.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    assert_eq!(look.again().await.unwrap().map(ids), Some(vec![vm(1), vm(2), vm(3)]));
}
