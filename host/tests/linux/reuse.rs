//! A process id that another process has by now: in a pid namespace, where ids can be chosen.

use std::process::Stdio;
use std::time::Duration;

use matchlock_host::process::{LinuxProcesses, Processes, Spawner};
use matchlock_model::identity::ProcessIdentity;
use tokio::process::{Child, Command};

use crate::common::{DEADLINE, marked_child, unique_mark};

const ROLE: &str = "MATCHLOCK_TEST_PID_NAMESPACE";
const HELPER: &str = "reuse::with_ids_of_its_own";
const DONE: &str = "the stranger lives";

/// How often the id is tried to be had: a thread of ours may take it first.
const TRIES: usize = 100;

/// A process of somebody else with this id.
async fn stranger(pid: i32) -> Child {
    for _ in 0..TRIES {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
        let mut child = Command::new("/bin/sleep").arg("1000").kill_on_drop(true).spawn().unwrap();
        if child.id().and_then(|id| i32::try_from(id).ok()) == Some(pid) {
            return child;
        }
        child.kill().await.unwrap();
    }
    panic!("pid {pid} could not be had");
}

/// Runs with a pid namespace and a /proc of its own.
#[tokio::test]
#[ignore = "a helper process"]
async fn with_ids_of_its_own() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (spawner, processes) = (Spawner::new().unwrap(), LinuxProcesses::new().unwrap());
    let child = spawner.spawn(marked_child(directory.path(), &unique_mark())).await.unwrap();
    let old: ProcessIdentity = child.identity().clone();
    assert!(processes.is_alive(&old).unwrap());
    processes.kill(&old, DEADLINE).await.unwrap();
    child.wait().await;
    // Start times are counted in ticks of 10 ms.
    tokio::time::sleep(Duration::from_millis(50)).await;

    let mut stranger = stranger(old.pid).await;
    assert!(!processes.is_alive(&old).unwrap());
    processes.kill(&old, DEADLINE).await.unwrap();
    child.send_kill().unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(stranger.try_wait().unwrap().is_none(), "a stranger was signalled");
    println!("{DONE}");
}

#[tokio::test]
async fn a_process_that_has_the_id_of_a_dead_one_is_not_signalled() {
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", HELPER, "--ignored", "--nocapture", "--test-threads=1"])
        .env(ROLE, "1")
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains(DONE), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success());
}
