//! Choosing subnets: beside other installations, behind what crashed VMs left, and for callers that
//! go away.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use matchlock_actors::db_writer::Store;
use matchlock_actors::subnet_allocator::Grant;
use matchlock_host::fault::Fault;
use matchlock_host::tap::{TapOp, tap_name};
use matchlock_model::failure::Failure;
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::phase::Phase;
use matchlock_model::record::Resources;
use matchlock_model::vm::StopMode;
use matchlock_store::{NewVm, WriteError, WriteOp, WriteOutcome};
use tokio::task::JoinHandle;

use super::world::{PATIENCE, World, reaches, settled};

async fn subnet(world: &World, vm: VmId) -> Option<String> {
    let head = world.deps.reader.lifecycle_head(vm).await.unwrap().unwrap();
    head.resources.subnet_cidr
}

async fn until(what: impl Fn() -> bool) {
    let waited = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.unwrap();
}

/// TAPs of VMs of ours that nobody owns, on the first subnets of the pool.
fn leave_taps(world: &World, count: u8) {
    for number in 0..count {
        let vm = VmId::new(0xbad_000 + u32::from(number));
        let address = [(Ipv4Addr::new(192, 168, 100 + number, 1), 24)];
        let mark = world.deps.mark(vm).to_string();
        world.taps.add_link(&tap_name(vm), Some(&mark), &address);
    }
}

#[tokio::test]
async fn stale_taps_that_stay_cost_their_subnets_and_no_more_time_than_one() {
    const COUNT: u8 = 30;
    for fault in [Fault::Fails, Fault::Never] {
        let world = World::new().await;
        leave_taps(&world, COUNT);
        world.taps.set_fault(TapOp::Remove, Some(fault));
        let begun = Instant::now();
        let mut vm = world.running(true).await;
        let took = begun.elapsed();
        // One after the other they would take half a minute.
        assert!(took < world.deps.limits.reap * 10, "{fault:?}: {took:?}");
        assert_eq!(subnet(&world, vm.id).await.as_deref(), Some("192.168.130.0/24"));
        assert_eq!(world.taps.existing().len(), usize::from(COUNT) + 1);
        world.taps.set_fault(TapOp::Remove, None);
        world.stop(vm.id, StopMode::Force).await.unwrap();
        assert!(settled(&mut vm).await.cleaned_up);
        if fault == Fault::Fails {
            // The next one has them all removed.
            let mut next = world.running(true).await;
            assert_eq!(subnet(&world, next.id).await.as_deref(), Some("192.168.100.0/24"));
            world.stop(next.id, StopMode::Force).await.unwrap();
            settled(&mut next).await;
            world.assert_nothing_left().await;
        }
        world.shutdown().await;
    }
}

/// While one installation makes its TAP, the other waits: it would find the same subnet free.
#[tokio::test]
async fn two_installations_of_one_host_choose_one_after_the_other() {
    let one = World::new().await;
    let other = one.beside().await;
    one.taps.set_fault(TapOp::Create, Some(Fault::Late(Duration::from_secs(1))));
    let mut first = one.create(true).await.unwrap();
    until(|| one.taps.calls().contains(&TapOp::Create)).await;
    let mut second = other.create(true).await.unwrap();
    for (world, vm, expected) in
        [(&one, &mut first, "192.168.100.0/24"), (&other, &mut second, "192.168.101.0/24")]
    {
        let view = reaches(vm, |view| view.phase == Phase::Running || view.settled).await;
        assert_eq!(view.cause, None);
        assert_eq!(subnet(world, vm.id).await.as_deref(), Some(expected));
    }
    // Neither took a subnet that the other had, gave it back and tried again.
    let made = one.taps.calls().into_iter().filter(|op| *op == TapOp::Create).count();
    assert_eq!(made, 2);
    for (world, vm) in [(one, &mut first), (other, &mut second)] {
        world.stop(vm.id, StopMode::Force).await.unwrap();
        settled(vm).await;
        world.assert_nothing_left().await;
        world.shutdown().await;
    }
}

async fn insert(world: &World, number: u32) -> VmId {
    let record = NewVm {
        id: VmId::new(number),
        image: "fake".into(),
        config_json: "{}".into(),
        owner: matchlock_host::process::Processes::own_identity(&world.processes).unwrap(),
        namespaces: matchlock_host::process::Processes::own_namespaces(&world.processes).unwrap(),
        ephemeral: false,
        backend: "fake".into(),
        resources: Resources::default(),
        created_at: jiff::Timestamp::now(),
    };
    let id = record.id;
    world.deps.db.write(WriteOp::InsertVm { record: Box::new(record) }).await.unwrap();
    id
}

/// Asks for a subnet in a task that can be ended.
fn ask(world: &World, vm: VmId) -> JoinHandle<Result<Grant, Failure>> {
    let subnets = world.deps.subnets.clone();
    tokio::spawn(async move { subnets.allocate(vm, OwnerEpoch::FIRST, Vec::new()).await })
}

async fn holds_subnet(world: &World, vm: VmId) -> bool {
    world.deps.reader.vm(vm).await.unwrap().unwrap().holds_subnet
}

#[tokio::test]
async fn a_caller_that_is_gone_gets_no_subnet() {
    let world = World::new().await;
    let (gone, next) = (insert(&world, 7).await, insert(&world, 8).await);
    world.taps.set_fault(TapOp::HostSubnets, Some(Fault::Late(Duration::from_millis(500))));
    let asking = ask(&world, gone);
    until(|| world.taps.calls().contains(&TapOp::HostSubnets)).await;
    asking.abort();
    // The lock comes free when the first task has ended.
    let granted = ask(&world, next).await.unwrap().unwrap();
    assert_eq!(granted.subnet.cidr.to_string(), "192.168.100.0/24");
    assert!(!holds_subnet(&world, gone).await);
    world.shutdown().await;
}

static HELD_UP: AtomicBool = AtomicBool::new(false);
static ARRIVED: AtomicUsize = AtomicUsize::new(0);
static RELEASES: AtomicUsize = AtomicUsize::new(0);

/// A database in which taking a subnet takes long, while it is told so.
struct Slow(Box<dyn Store>);

impl Store for Slow {
    fn apply(&mut self, ops: Vec<WriteOp>) -> Vec<Result<WriteOutcome, WriteError>> {
        let releases = ops.iter().filter(|op| matches!(op, WriteOp::ReleaseSubnet { .. })).count();
        if ops.iter().any(|op| matches!(op, WriteOp::AllocateSubnet { .. })) {
            ARRIVED.fetch_add(1, Ordering::SeqCst);
            while HELD_UP.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        let done = self.0.apply(ops);
        RELEASES.fetch_add(releases, Ordering::SeqCst);
        done
    }
}

#[tokio::test]
async fn a_caller_that_goes_during_the_write_has_its_subnet_given_back() {
    let world = World::with_store(|store| Box::new(Slow(store))).await;
    let (gone, next) = (insert(&world, 7).await, insert(&world, 8).await);
    HELD_UP.store(true, Ordering::SeqCst);
    let asking = ask(&world, gone);
    until(|| ARRIVED.load(Ordering::SeqCst) > 0).await;
    asking.abort();
    assert!(asking.await.is_err_and(|error| error.is_cancelled()));
    HELD_UP.store(false, Ordering::SeqCst);
    until(|| RELEASES.load(Ordering::SeqCst) > 0).await;
    assert!(!holds_subnet(&world, gone).await);
    let granted = ask(&world, next).await.unwrap().unwrap();
    assert_eq!(granted.subnet.cidr.to_string(), "192.168.100.0/24");
    world.shutdown().await;
}
