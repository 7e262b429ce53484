//! What commands get when their guest is shut down.

use matchlock_guest::descent;
use matchlock_wire::message::{
    ExecFailure, ExecFailureKind, ExecOutput, ExecStart, ExitStatus, Reply, Request, Shutdown,
};

use super::support::{Guest, Job, block_on, start};

/// A shell that waits for signals, with a child in a group of its own; it names the child first.
const WAITING: &str = "setsid sleep 1000 & echo $!; \
     trap 'echo usr1; exit 5' USR1; trap 'echo term; exit 6' TERM; \
     echo ready; while :; do sleep 0.05; done";

fn waiting(job: u8, stop_signal: Option<u8>) -> ExecStart {
    ExecStart { stop_signal, ..start(job, &["sh", "-c", WAITING]) }
}

async fn until_ready(job: &mut Job) {
    while !job.stdout.ends_with(b"ready\n") {
        job.next().await.unwrap();
    }
}

fn refused(message: &str) -> ExecOutput {
    let kind = ExecFailureKind::Request;
    ExecOutput::Failed(ExecFailure { kind, message: message.to_owned() })
}

#[test]
fn a_command_that_wants_a_signal_of_its_own_gets_it_and_nothing_else() {
    block_on(async {
        let (mut guest, host) = Guest::with_host().await;
        let mut own = host.exec(waiting(1, Some(10))).await;
        let mut plain = host.exec(waiting(2, None)).await;
        // What everybody gets is nothing of its own.
        let mut same = host.exec(waiting(3, Some(15))).await;
        for job in [&mut own, &mut plain, &mut same] {
            until_ready(job).await;
        }
        let parents = descent::parents().unwrap();
        assert_eq!(host.ask(Request::Shutdown(Shutdown { grace_ms: 1 })).await, Reply::Done);
        let order = guest.orders.recv().await.unwrap();
        let [init] = order.told[..] else { panic!("{:?}", order.told) };
        // Who descends from it, also in a group of its own, is not among the others: the small init, the
        // shell, what it started, and the sleep that it waits for.
        let others = descent::others(&parents, &[init.as_raw_pid()]);
        let spared = parents.keys().filter(|pid| **pid != 1 && !others.contains(pid)).count();
        assert!((3..=4).contains(&spared), "{spared}");
        assert_eq!(own.finish().await, ExecOutput::Exited(ExitStatus::Code(5)));
        assert!(own.stdout.ends_with(b"ready\nusr1\n"));
        assert_eq!(plain.stdout.iter().filter(|byte| **byte == b'\n').count(), 2);
        // A second order changes nothing.
        assert_eq!(host.ask(Request::Shutdown(Shutdown { grace_ms: 1 })).await, Reply::Done);
        assert!(guest.orders.try_recv().is_err());
        for job in [own, plain, same] {
            job.release().await;
        }
    });
}

#[test]
fn a_signal_that_is_none_is_refused() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        for (job, number) in [(1, 0), (2, 65)] {
            let mut refusal = host.exec(waiting(job, Some(number))).await;
            let expected = refused("the signal that stops the command is none");
            assert_eq!(refusal.next().await, Some(expected));
        }
    });
}
