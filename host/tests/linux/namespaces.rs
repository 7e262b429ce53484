//! Whether a network namespace is still there, whatever keeps it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use matchlock_host::process::{LinuxProcesses, NamespaceSighting, Processes};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const OWN: &str = "/proc/thread-self/ns/net";

/// A thread that makes a network namespace, does something with it, and stays until it is told.
struct Keeper {
    namespace: String,
    end: Sender<()>,
    thread: JoinHandle<()>,
}

impl Keeper {
    fn new<T: 'static>(keep: impl FnOnce() -> T + Send + 'static) -> Self {
        let (tell, told) = channel();
        let (end, ended) = channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let found = fs::metadata(OWN).unwrap();
            let kept = keep();
            tell.send(format!("{}:{}", found.dev(), found.ino())).unwrap();
            // It ends with an error: nobody sends.
            assert!(ended.recv().is_err());
            drop(kept);
        });
        Self { namespace: told.recv().unwrap(), end, thread }
    }

    fn end(self) -> String {
        drop(self.end);
        self.thread.join().unwrap();
        self.namespace
    }
}

/// Into another one, so that the thread itself does not keep the first.
fn leave() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
}

/// A file that keeps it, in a mount namespace of this thread's own.
fn mount_it(file: &Path) {
    let nowhere = None::<&Path>;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(nowhere, "/", nowhere, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nowhere).unwrap();
    mount(Some(OWN), file, nowhere, MsFlags::MS_BIND, nowhere).unwrap();
}

#[test]
fn a_network_namespace_is_there_as_long_as_anything_keeps_it() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: a network namespace needs root");
        return;
    }
    let processes = LinuxProcesses::new().unwrap();
    if !processes.sees_all_processes().unwrap() {
        eprintln!("skipped: it takes the first pid namespace");
        return;
    }
    let look = |namespace: &str| processes.look_for_network_namespace(namespace).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_owned();
    let keepers = [
        ("a thread", Keeper::new(|| ())),
        ("a mount that we do not see", Keeper::new(move || (mount_it(&path), leave()))),
        ("a descriptor", Keeper::new(|| (File::open(OWN).unwrap(), leave()))),
    ];
    for (kept_by, keeper) in keepers {
        assert_eq!(look(&keeper.namespace), NamespaceSighting::There, "{kept_by}");
        let namespace = keeper.end();
        // Its number may have been given to a namespace of another test, which ends some time.
        let begun = Instant::now();
        // Where a process hides from us, `Unseen` is all that can be said.
        while look(&namespace) == NamespaceSighting::There {
            assert!(begun.elapsed() < Duration::from_secs(60), "{kept_by}");
            std::thread::yield_now();
        }
    }
}
