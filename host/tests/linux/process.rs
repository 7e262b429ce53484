//! Processes and children on the real kernel.

use std::fs;
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use matchlock_host::process::{
    ChildExit, FakeProcesses, LinuxProcesses, ProcessError, Processes, SpawnError, Spawner,
};
use matchlock_model::identity::ProcessIdentity;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tempfile::TempDir;

use crate::common::{
    DEADLINE, Helper, Orphan, gone, helper_directory, marked_child, shell, soon, unique_mark,
    until_stdin_ends,
};

fn world() -> (TempDir, Spawner, LinuxProcesses) {
    let directory = tempfile::tempdir().expect("a directory");
    let spawner = Spawner::new().expect("a spawner");
    (directory, spawner, LinuxProcesses::new().expect("/proc"))
}

/// What every implementation must do with one running process that carries `mark`.
async fn processes_conform(
    processes: &impl Processes,
    running: &ProcessIdentity,
    mark: &matchlock_model::id::Mark,
    cwd: &std::path::Path,
) {
    let own = processes.own_identity().unwrap();
    assert!(processes.is_alive(&own).unwrap());
    assert!(processes.is_alive(running).unwrap());

    let found = processes.find_marked().unwrap();
    let ours: Vec<_> = found.iter().filter(|found| found.mark == *mark).collect();
    assert_eq!(ours.len(), 1);
    assert_eq!((&ours[0].identity, ours[0].cwd.as_deref()), (running, Some(cwd)));

    assert!(processes.cpu_share(running).unwrap().is_some());

    // Another start time, another boot: another process, and the one that runs is not touched.
    let later = ProcessIdentity { start_ticks: running.start_ticks + 1, ..running.clone() };
    let other_boot = ProcessIdentity { boot_id: "other".to_owned(), ..running.clone() };
    for stranger in [later, other_boot] {
        assert!(!processes.is_alive(&stranger).unwrap());
        assert_eq!(processes.cpu_share(&stranger).unwrap(), None);
        processes.kill(&stranger, DEADLINE).await.unwrap();
    }
    assert!(processes.is_alive(running).unwrap());

    processes.kill(running, DEADLINE).await.unwrap();
    assert!(!processes.is_alive(running).unwrap());
    assert_eq!(processes.cpu_share(running).unwrap(), None);
    assert!(processes.find_marked().unwrap().iter().all(|found| found.mark != *mark));
    // Gone already is success.
    processes.kill(running, DEADLINE).await.unwrap();
}

#[tokio::test]
async fn the_real_processes_conform() {
    let (directory, spawner, processes) = world();
    let mark = unique_mark();
    let child = spawner.spawn(marked_child(directory.path(), &mark)).await.unwrap();
    let cwd = directory.path().canonicalize().unwrap();
    soon("conformance", processes_conform(&processes, child.identity(), &mark, &cwd)).await;
    let ChildExit::Status(status) = soon("its status", child.wait()).await else { panic!() };
    assert_eq!(status.to_string(), "signal: 9 (SIGKILL)");
}

#[test]
fn the_cpu_time_of_all_threads_is_counted() {
    let processes = LinuxProcesses::new().unwrap();
    let own = processes.own_identity().unwrap();
    let had = || processes.cpu_share(&own).unwrap().unwrap().had;
    // The thread that works is not the process's first one.
    let before = had();
    assert!(before > Duration::ZERO);
    let (mut number, mut now) = (1_u64, before);
    while now < before + Duration::from_millis(20) {
        number = std::hint::black_box(number.wrapping_mul(3));
        now = had();
    }
}

#[test]
fn the_time_that_threads_wait_for_a_cpu_is_counted() {
    let processes = LinuxProcesses::new().unwrap();
    let own = processes.own_identity().unwrap();
    let share = || processes.cpu_share(&own).unwrap().unwrap();
    let (before, seen) = (share(), AtomicBool::new(false));
    // Two that both want the first CPU of those we may use. A share leaves out threads that have ended.
    let wants_it = || {
        let allowed = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap();
        let mut one = CpuSet::new();
        one.set(first);
        sched_setaffinity(None, &one).unwrap();
        while !seen.load(Ordering::Relaxed) {
            let now = share();
            if now.waited > before.waited + Duration::from_millis(20) {
                seen.store(true, Ordering::Relaxed);
            }
            assert!(now.had < before.had + Duration::from_secs(5), "{before:?}, {now:?}");
        }
    };
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(wants_it);
        }
    });
}

#[tokio::test]
async fn the_fake_processes_conform() {
    let processes = FakeProcesses::new();
    let mark = unique_mark();
    let cwd = std::path::PathBuf::from("/vms/x");
    let running = processes.add(Some(mark.clone()), Some(cwd.clone()));
    processes_conform(&processes, &running, &mark, &cwd).await;
    assert_eq!(processes.kills(), [running]);
}

#[tokio::test(start_paused = true)]
async fn the_fake_does_what_a_test_asks_of_it() {
    let processes = FakeProcesses::new();
    let one = processes.add(None, None);
    let short = Duration::from_secs(3);

    processes.set_immortal(one.pid, true);
    let error = processes.kill(&one, short).await.unwrap_err();
    assert!(matches!(error, ProcessError::WillNotDie { waited, .. } if waited == short));
    processes.set_refused(one.pid, true);
    let error = processes.kill(&one, short).await.unwrap_err();
    assert!(matches!(error, ProcessError::Signal { .. }));
    processes.set_hidden(one.pid, true);
    assert!(matches!(processes.is_alive(&one), Err(ProcessError::Look { .. })));
    processes.set_list_fails(true);
    assert!(matches!(processes.find_marked(), Err(ProcessError::List(_))));

    // The pid's next process is another.
    processes.set_hidden(one.pid, false);
    processes.end(&one);
    let next = processes.add_as(one.pid, None, None);
    assert!(!processes.is_alive(&one).unwrap());
    assert!(processes.is_alive(&next).unwrap());
}

#[tokio::test]
async fn a_zombie_counts_as_gone() {
    // A parent that does not collect its child; the child says its pid and ends.
    let (directory, spawner, processes) = world();
    let script = "sh -c 'echo $$ > zombie' & kill -STOP $$";
    let parent = spawner.spawn(shell(directory.path(), script, &[])).await.unwrap();
    let pid: i32 = soon("a zombie", async {
        loop {
            let text = fs::read_to_string(directory.path().join("zombie")).unwrap_or_default();
            if let Some(pid) = text.strip_suffix('\n') {
                let pid = pid.parse().unwrap();
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
                if stat.contains(") Z ") {
                    break pid;
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let start_ticks =
        stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap().parse().unwrap();
    let boot_id = processes.own_identity().unwrap().boot_id;
    let zombie = ProcessIdentity { pid, start_ticks, boot_id };
    assert!(!processes.is_alive(&zombie).unwrap());
    processes.kill(&zombie, DEADLINE).await.unwrap();
    soon("the parent's end", parent.kill(DEADLINE)).await.unwrap();
}

#[tokio::test]
async fn a_process_of_no_pid_cannot_be_looked_at() {
    let (_directory, _spawner, processes) = world();
    let own = processes.own_identity().unwrap();
    for pid in [0, -1] {
        let nobody = ProcessIdentity { pid, ..own.clone() };
        assert!(processes.is_alive(&nobody).is_err());
        assert!(processes.kill(&nobody, DEADLINE).await.is_err());
    }
}

#[tokio::test]
async fn children_are_reaped_even_if_nobody_waits() {
    let (directory, spawner, processes) = world();
    let child = spawner.spawn(shell(directory.path(), "exit 7", &[])).await.unwrap();
    let identity = child.identity().clone();
    let waiting = child.clone();
    drop(child);
    // Many may wait, and each gets the status.
    let (one, two) = soon("its end", async { tokio::join!(waiting.wait(), waiting.wait()) }).await;
    assert_eq!((one.to_string(), one), ("exit status: 7".to_owned(), two));
    drop(waiting);

    let forgotten = spawner.spawn(shell(directory.path(), "exit 0", &[])).await.unwrap();
    let second = forgotten.identity().pid;
    drop(forgotten);
    soon("both pids to be free", async {
        for pid in [identity.pid, second] {
            while std::path::Path::new(&format!("/proc/{pid}")).try_exists().unwrap() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    })
    .await;
    assert!(!processes.is_alive(&identity).unwrap());
}

#[tokio::test]
async fn what_a_child_has_started_is_gone_when_the_child_is() {
    let (directory, spawner, _) = world();
    let is_there = |pid: &str| std::path::Path::new("/proc").join(pid).try_exists().unwrap();
    for (end, is_killed) in [("wait", true), ("exit 7", false)] {
        // Two that take no notice of anything that can be ignored.
        let script = format!(
            "trap '' HUP INT TERM; for _ in 1 2; do sleep 1000 & echo $! >>pids; done; touch ready; {end}"
        );
        let child = spawner.spawn(shell(directory.path(), &script, &[])).await.unwrap();
        soon("the child's children", async {
            while !directory.path().join("ready").try_exists().unwrap() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        let exit = if is_killed {
            child.kill(DEADLINE).await.unwrap()
        } else {
            soon("its end", child.wait()).await
        };
        let said = if is_killed { "signal: 9 (SIGKILL)" } else { "exit status: 7" };
        assert_eq!(exit.to_string(), said);
        let pids = std::fs::read_to_string(directory.path().join("pids")).unwrap();
        assert_eq!(pids.lines().count(), 2);
        assert_eq!(pids.lines().find(|pid| is_there(pid)), None, "of {pids:?}");
        for file in ["pids", "ready"] {
            std::fs::remove_file(directory.path().join(file)).unwrap();
        }
    }
}

#[tokio::test]
async fn a_child_gets_only_what_it_is_given() {
    let (directory, spawner, _) = world();
    // Opened without close-on-exec: it would be inherited by anything that is not careful.
    let open = || -> OwnedFd {
        let flags = rustix::fs::OFlags::RDONLY;
        rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty()).unwrap()
    };
    let (given, kept) = (open(), open());
    let (given_number, kept_number) = (given.as_raw_fd(), kept.as_raw_fd());
    // The shell blocks signals while it waits, so it is not the shell that is asked for them.
    let script = "ls /proc/$$/fd > fds; echo env $(env | cut -d= -f1 | sort); umask; \
                  echo pid $$ pgid $(cut -d' ' -f5 /proc/$$/stat); \
                  exec cat /proc/self/status /proc/self/limits";
    let mut spec = shell(directory.path(), script, &[]);
    spec.inherit.push(given);
    spec.max_file_bytes = Some(1_000_000);
    let child = spawner.spawn(spec).await.unwrap();
    let pid = child.identity().pid;
    assert_eq!(soon("its end", child.wait()).await.to_string(), "exit status: 0");

    let log = fs::read_to_string(directory.path().join("log")).unwrap();
    let line = |start: &str| log.lines().find(|line| line.starts_with(start)).unwrap().to_owned();
    // 255 or 10 may be the shell's own; nothing else but the standard ones and the given one.
    let fds = fs::read_to_string(directory.path().join("fds")).unwrap();
    let fds: Vec<i32> = fds.lines().map(|number| number.parse().unwrap()).collect();
    assert!(fds.contains(&given_number) && !fds.contains(&kept_number), "{fds:?}");
    assert!(fds.iter().all(|fd| [0, 1, 2, 10, 255, given_number].contains(fd)), "{fds:?}");
    for name in line("env ").split(' ').skip(1) {
        assert!(["PATH", "PWD", "OLDPWD", "SHLVL", "_"].contains(&name), "{name} was inherited");
    }
    assert_eq!(line("pid "), format!("pid {pid} pgid {pid}"));
    assert_eq!(line("SigBlk:"), "SigBlk:\t0000000000000000");
    // Only SIGXFSZ (25) is ignored.
    assert_eq!(line("SigIgn:"), "SigIgn:\t0000000001000000");
    // Not 0: a limit of 1 also keeps the kernel from piping a dump to a program.
    assert!(line("Max core file size").contains(" 1 "), "{log}");
    assert!(line("Max file size").contains(" 1000000 "), "{log}");
    assert!(log.lines().any(|line| line == "0077"), "{log}");
    assert!(kept.as_raw_fd() == kept_number);
}

#[tokio::test]
async fn a_child_cannot_fill_the_disk_and_lives_on() {
    let (directory, spawner, _) = world();
    let script = "head -c 100000 /dev/zero > big; wc -c < big; echo more >> big || echo refused";
    let mut spec = shell(directory.path(), script, &[]);
    spec.max_file_bytes = Some(50_000);
    let child = spawner.spawn(spec).await.unwrap();
    assert_eq!(soon("its end", child.wait()).await.to_string(), "exit status: 0");
    let log = fs::read_to_string(directory.path().join("log")).unwrap();
    assert!(log.contains("50000\n") && log.ends_with("refused\n"), "{log}");
}

#[tokio::test]
async fn a_missing_program_is_told_from_a_missing_directory() {
    let (directory, spawner, _) = world();
    let mut spec = shell(directory.path(), "", &[]);
    spec.program = "/no/such/program".into();
    let error = spawner.spawn(spec).await.unwrap_err();
    assert!(matches!(error, SpawnError::NotFound { .. }), "{error:?}");

    let mut spec = shell(directory.path(), "", &[]);
    spec.cwd = directory.path().join("missing");
    let error = spawner.spawn(spec).await.unwrap_err();
    assert!(matches!(error, SpawnError::WorkingDirectory { .. }), "{error:?}");

    let mut spec = shell(directory.path(), "", &[]);
    spec.program = directory.path().join("log");
    let error = spawner.spawn(spec).await.unwrap_err();
    assert!(matches!(error, SpawnError::Failed { .. }), "{error:?}");
}

#[tokio::test]
async fn a_cancelled_spawn_leaves_no_child() {
    let (directory, spawner, processes) = world();
    let mark = unique_mark();
    {
        let spawn = std::pin::pin!(spawner.spawn(marked_child(directory.path(), &mark)));
        // Asked once, then given up.
        let polled = spawn.poll(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(polled, Poll::Pending | Poll::Ready(Ok(_))));
        if let Poll::Ready(Ok(child)) = polled {
            child.send_kill().unwrap();
        }
    }
    // Jobs are served in turn: after this one, the other was.
    let next = spawner.spawn(shell(directory.path(), "exit 0", &[])).await.unwrap();
    soon("its end", next.wait()).await;
    soon("the end of the other", async {
        while processes.find_marked().unwrap().iter().any(|found| found.mark == mark) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn children_end_with_their_spawner() {
    let (directory, spawner, processes) = world();
    let child = spawner.spawn(marked_child(directory.path(), &unique_mark())).await.unwrap();
    let clone = spawner.clone();
    drop(spawner);
    assert!(processes.is_alive(child.identity()).unwrap());
    drop(clone);
    assert_eq!(soon("its end", child.wait()).await.to_string(), "signal: 9 (SIGKILL)");
}

#[tokio::test]
async fn children_die_with_a_process_that_is_killed() {
    let directory = tempfile::tempdir().unwrap();
    let processes = LinuxProcesses::new().unwrap();
    let mut helper = Helper::start("process::helper_with_a_child", directory.path());
    let said = helper.says("child=").await;
    let (pid, start_ticks) = said.split_once(' ').unwrap();
    let orphan = Orphan(ProcessIdentity {
        pid: pid.parse().unwrap(),
        start_ticks: start_ticks.parse().unwrap(),
        boot_id: processes.own_identity().unwrap().boot_id,
    });
    assert!(processes.is_alive(&orphan.0).unwrap());
    helper.kill().await;
    gone(&processes, &orphan.0).await;
}

#[tokio::test]
#[ignore = "the main function of a helper process"]
async fn helper_with_a_child() {
    let Some(directory) = helper_directory("process::helper_with_a_child") else { return };
    let spawner = Spawner::new().unwrap();
    let child = spawner.spawn(marked_child(&directory, &unique_mark())).await.unwrap();
    println!("child={} {}", child.identity().pid, child.identity().start_ticks);
    until_stdin_ends().await;
}

#[test]
fn namespaces_are_device_and_inode() {
    let (_directory, _spawner, processes) = world();
    let namespaces = processes.own_namespaces().unwrap();
    let inode = |link: &str| {
        let target = fs::read_link(link).unwrap().to_string_lossy().into_owned();
        target.trim_end_matches(']').rsplit_once('[').unwrap().1.to_owned()
    };
    assert!(namespaces.net.ends_with(&format!(":{}", inode("/proc/self/ns/net"))));
    assert!(namespaces.pid.ends_with(&format!(":{}", inode("/proc/self/ns/pid"))));
}
