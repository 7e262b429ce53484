//! Network namespaces that live as long as a thread of the test.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use matchlock_model::id::{InstallId, Mark, VmId};
use nix::sched::{CloneFlags, unshare};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with nothing but a loopback that is up. It has a thread of its own; what
/// that thread starts, programs and runtimes included, is in the namespace too.
pub(crate) struct Namespace {
    /// The thread's id: names the namespace for `ip link set ... netns`.
    tid: i32,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let (jobs, todo) = channel::<Job>();
        let (started, tid) = channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a namespace can be made: are we root?");
            started.send(nix::unistd::gettid().as_raw()).expect("the test waits");
            while let Ok(job) = todo.recv() {
                job();
            }
        });
        let tid = tid.recv().expect("the namespace's thread runs");
        let namespace = Self { tid, jobs: Some(jobs), thread: Some(thread) };
        namespace.ip("link set lo up");
        // A new one takes over what the host has, which may be on.
        namespace.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("a sysctl"));
        namespace
    }

    /// Runs something in the namespace. A panic there is a panic here.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel::<Result<T, Box<dyn Any + Send>>>();
        let job = move || done.send(catch_unwind(AssertUnwindSafe(work))).expect("the test waits");
        self.jobs.as_ref().expect("it runs").send(Box::new(job)).expect("it runs");
        result.recv().expect("it runs").unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Runs a future in the namespace, on a runtime whose threads are all in it.
    pub(crate) fn block_on<T, F>(&self, work: impl FnOnce() -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T>,
    {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(work())
        })
    }

    /// Runs a program in the namespace and returns what it prints.
    pub(crate) fn program(&self, program: &'static str, arguments: &str) -> String {
        let arguments = arguments.to_owned();
        self.run(move || {
            let output = Command::new(program)
                .args(arguments.split_whitespace())
                .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
                .output()
                .expect("the program starts");
            assert!(output.status.success(), "{program} {arguments}: {output:?}");
            String::from_utf8(output.stdout).expect("text")
        })
    }

    /// Runs `ip` in the namespace.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        self.program("ip", arguments)
    }

    /// Connects two namespaces with a pair of links, each with an address, both up.
    pub(crate) fn connect(&self, name: &str, address: &str, to: &Self, its: &str, there: &str) {
        self.ip(&format!("link add {name} type veth peer name {its} netns {}", to.tid));
        for (namespace, link, address) in [(self, name, address), (to, its, there)] {
            namespace.ip(&format!("address add {address} dev {link}"));
            namespace.ip(&format!("link set {link} up"));
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic of a job went to the test already.
            drop(thread.join());
        }
    }
}

/// The mark of a VM of an installation, both by number.
pub(crate) fn mark(install: u8, vm: u32) -> Mark {
    Mark { install: InstallId::from_bytes([install; 8]), vm: VmId::new(vm) }
}
