//! One node with thousands of VMs, on fakes: what supervision and records cost per VM, without any
//! hypervisor. `make bench`; leaves its section in `target/bench/fleet.md`.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on has failed")]
#![expect(clippy::disallowed_methods, reason = "it looks at itself, and leaves a file")]

#[expect(dead_code, reason = "the tests need more of it")]
#[path = "../tests/tree/world.rs"]
mod world;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use futures::future::join_all;
use matchlock_actors::fleet::VmHandle;
use matchlock_host::guest_link::GuestLink;
use matchlock_host::hypervisor::{Machine, MachineSpec};
use matchlock_host::owner_lock::HeldLock;
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::vm::StopMode;
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};

use world::{Host, World, settled};

/// How many VMs: 10,000, or as many as this process may have descriptors for. A fake guest is a pair
/// of sockets.
static VMS: LazyLock<usize> = LazyLock::new(|| {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    (most.saturating_sub(OTHER_DESCRIPTORS) / 2 / AT_ONCE * AT_ONCE).min(10_000)
});

/// The database, the runtime, and what is open for a moment.
const OTHER_DESCRIPTORS: usize = 300;

/// So many are begun, or ended, at once.
const AT_ONCE: usize = 32;

/// As in production: an idle VM is asked every third of it.
const HANG: Duration = Duration::from_secs(30);

/// How long an idle fleet is watched.
const IDLE: Duration = Duration::from_secs(30);

/// What this process has used so far.
#[derive(Clone, Copy)]
struct Used {
    at: Instant,
    cpu: Duration,
    resident_kb: u64,
}

impl Used {
    fn now() -> Self {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let resident = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let resident_kb = resident.trim().trim_end_matches(" kB").parse().unwrap();
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        let micros = |time: nix::sys::time::TimeVal| {
            Duration::from_secs(time.tv_sec().unsigned_abs())
                + Duration::from_micros(time.tv_usec().unsigned_abs())
        };
        let cpu = micros(usage.user_time()) + micros(usage.system_time());
        Self { at: Instant::now(), cpu, resident_kb }
    }

    /// Milliseconds of time and of CPU per VM since then.
    fn per_vm_since(self, before: Self) -> (f64, f64) {
        let each = |duration: Duration| duration.as_secs_f64() * 1e3 / *VMS as f64;
        (each(self.at - before.at), each(self.cpu - before.cpu))
    }
}

/// Argument of a process of this program that makes what the fakes hold, and no actors.
const FAKES_ALONE: &str = "--fakes-alone";

fn main() {
    let fakes_alone = std::env::args().any(|argument| argument == FAKES_ALONE);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    if fakes_alone {
        println!("{}", runtime.block_on(memory_of_fakes()));
        return;
    }
    let section = runtime.block_on(measure());
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let file = target.join("bench/fleet.md");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, &section).unwrap();
    println!("{section}");
}

/// What the fakes keep of one VM, in KB: what an actor makes with them, made without one.
async fn memory_of_fakes() -> f64 {
    let world = World::new().await;
    let before = Used::now();
    let mut links: Vec<Arc<dyn GuestLink>> = Vec::new();
    let mut held: Vec<(Arc<dyn Machine>, HeldLock)> = Vec::new();
    for number in 1..=u32::try_from(*VMS).unwrap() {
        let (deps, vm) = (&world.deps, VmId::new(number));
        let (mark, paths) = (deps.mark(vm), deps.paths(vm));
        let lock = deps.locks.try_acquire(vm).unwrap();
        deps.rootfs.create_dir(&paths).await.unwrap();
        deps.rootfs.create_disk(&paths, 64).await.unwrap();
        let spec = MachineSpec {
            mark,
            paths,
            kernel: "/fake/kernel".into(),
            initramfs: "/fake/initramfs".into(),
            base_disk: "/fake/base.erofs".into(),
            vcpus: 1,
            memory_mb: 256,
            nic: None,
            start: matchlock_host::hypervisor::Start::Boot,
        };
        let machine = deps.hypervisor.launch(&spec).await.unwrap();
        links.push(deps.connector.connect(&*machine, HANG).await.unwrap());
        held.push((machine, lock));
    }
    let after = Used::now();
    drop((links, held));
    (after.resident_kb - before.resident_kb) as f64 / *VMS as f64
}

/// The same in a process of its own, where no actor has used any memory before.
fn fakes_alone() -> f64 {
    let own = std::env::current_exe().unwrap();
    let output = Command::new(own).arg(FAKES_ALONE).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

async fn measure() -> String {
    let memory_mb = *VMS as u64 * 1_000;
    let host = Host { hang: HANG, no_network: true, ..Host::default() };
    let world = World::with(memory_mb, |store| store, host).await;
    let before = Used::now();
    let mut vms: Vec<VmHandle> = Vec::with_capacity(*VMS);
    while vms.len() < *VMS {
        vms.extend(join_all((0..AT_ONCE).map(|_| world.running(true))).await);
    }
    let up = Used::now();
    tokio::time::sleep(IDLE).await;
    let idle = Used::now();
    for some in vms.chunks_mut(AT_ONCE) {
        join_all(some.iter_mut().map(|vm| end(&world, vm))).await;
    }
    let down = Used::now();
    world.assert_nothing_left().await;
    let phases = world.phases(vms[*VMS - 1].id).await.len();
    world.shutdown().await;
    let (create, create_cpu) = up.per_vm_since(before);
    let (clean, clean_cpu) = down.per_vm_since(idle);
    let idle_cpu = (idle.cpu - up.cpu).as_secs_f64() / IDLE.as_secs_f64() * 100.0;
    let fakes = tokio::task::spawn_blocking(fakes_alone).await.unwrap();
    let memory = (idle.resident_kb - before.resident_kb) as f64 / *VMS as f64;
    let number = *VMS;
    format!(
        "## Many VMs on one node\n\n\
         `cargo bench --workspace --bench fleet`: {number} VMs without networks (a network namespace has room for some 500) in one process, {AT_ONCE} \
         begun or ended at once; hypervisor, files and guests are fakes, actors, \
         supervision and database ({phases} phases per VM) are real. Memory is resident memory of \
         the process while all are running and idle; what the fakes keep is measured in a process \
         without actors that makes the same with them.\n\n\
         | per VM | time | CPU |\n|---|---|---|\n\
         | create until running | {create:.2} ms | {create_cpu:.2} ms |\n\
         | stop until cleaned and removed | {clean:.2} ms | {clean_cpu:.2} ms |\n\n\
         | {number} idle VMs | |\n|---|---|\n\
         | memory per VM, all of it | {memory:.1} KB |\n\
         | of it, the fakes' own | {fakes:.1} KB |\n\
         | **memory per idle VM** | {:.1} KB |\n\
         | CPU of the process, over {} s | {idle_cpu:.1} % of one core |\n",
        memory - fakes,
        IDLE.as_secs(),
    )
}

async fn end(world: &World, vm: &mut VmHandle) {
    world.stop(vm.id, StopMode::Force).await.unwrap();
    assert_eq!(settled(vm).await.phase, Phase::Cleaned);
}
