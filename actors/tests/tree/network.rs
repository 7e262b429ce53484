//! A VM's network on fakes of links and tables: one subnet each, given back only once its TAP is gone,
//! whatever fails on the way.

use std::net::Ipv4Addr;

use matchlock_actors::reconciler::{Outcome, Target};
use matchlock_host::fault::Fault;
use matchlock_host::firewall::FirewallOp;
use matchlock_host::process::{NamespaceSighting, Processes as _};
use matchlock_host::tap::{TapOp, Taps as _, tap_name};
use matchlock_model::id::{InstallId, Mark, VmId};
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::record::Resources;
use matchlock_model::vm::StopMode;
use matchlock_store::{NewVm, WriteOp};

use super::world::{World, reaches, settled};

async fn subnet(world: &World, vm: VmId) -> Option<String> {
    let head = world.deps.reader.lifecycle_head(vm).await.unwrap().unwrap();
    head.resources.subnet_cidr
}

#[tokio::test]
async fn a_vm_has_its_network_as_asked_and_gives_it_back_in_order() {
    let world = World::new().await;
    let mut vm = world.running(false).await;
    let name = tap_name(vm.id);
    let tap = world.taps.observe(&name).await.unwrap().unwrap();
    assert_eq!(tap.addresses, [(Ipv4Addr::new(192, 168, 100, 1), 24)]);
    assert_eq!(tap.mark, Some(world.deps.mark(vm.id)));
    let rules = world.firewall.applied(&name).unwrap();
    assert_eq!(rules.guest, Ipv4Addr::new(192, 168, 100, 2));
    assert!(!rules.allow_private && !rules.allow_host_access);
    let nic = world.hypervisor.machine(vm.id).unwrap().nic().unwrap();
    assert_eq!((nic.mac, nic.mtu), (vm.id.mac(), 1500));
    drop(nic);
    let told = world.connector.configured().pop().unwrap().network.unwrap();
    assert_eq!((told.address, told.gateway), (rules.guest, Ipv4Addr::new(192, 168, 100, 1)));
    assert_eq!(told.mac, vm.id.mac());
    let head = world.deps.reader.lifecycle_head(vm.id).await.unwrap().unwrap().resources;
    assert_eq!(head.tap_name, Some(name.clone()));
    assert_eq!(head.firewall_table, Some(format!("matchlock_{name}")));
    assert_eq!(head.nat_table, Some(format!("matchlock_nat_{name}")));
    world.stop(vm.id, StopMode::Force).await.unwrap();
    assert_eq!(settled(&mut vm).await.phase, Phase::Cleaned);
    let head = world.deps.reader.lifecycle_head(vm.id).await.unwrap().unwrap();
    for step in ["tap_delete", "nftables_cleanup", "subnet_release"] {
        assert!(head.cleanup.contains_key(step), "{:?}", head.cleanup);
    }
    assert!(!world.deps.reader.vm(vm.id).await.unwrap().unwrap().holds_subnet);
    world.reconcile(Target::One(vm.id), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn what_cannot_be_made_is_told_and_leaves_nothing() {
    type Spoil = fn(&World);
    let cases: [Spoil; 6] = [
        |world| world.taps.set_fault(TapOp::Create, Some(Fault::Fails)),
        |world| world.taps.set_fault(TapOp::Create, Some(Fault::FailsAfterwards)),
        |world| world.taps.set_fault(TapOp::HostSubnets, Some(Fault::Fails)),
        |world| world.firewall.set_fault(FirewallOp::Apply, Some(Fault::Fails)),
        |world| world.firewall.set_fault(FirewallOp::Apply, Some(Fault::FailsAfterwards)),
        |world| world.firewall.set_fault(FirewallOp::Obstacles, Some(Fault::Fails)),
    ];
    for (index, spoil) in cases.into_iter().enumerate() {
        let world = World::new().await;
        spoil(&world);
        let mut vm = world.create(true).await.unwrap();
        let view = settled(&mut vm).await;
        assert!(view.cause.is_some() && view.cleaned_up, "{index}: {view:?}");
        assert!(world.phases(vm.id).await.contains(&Phase::CreateFailed), "{index}");
        world.assert_nothing_left().await;
        world.shutdown().await;
    }
}

#[tokio::test]
async fn a_stop_beats_a_network_that_hangs() {
    type Spoil = fn(&World);
    let cases: [Spoil; 3] = [
        |world| world.taps.set_fault(TapOp::HostSubnets, Some(Fault::Never)),
        |world| world.taps.set_fault(TapOp::Create, Some(Fault::Never)),
        |world| world.firewall.set_fault(FirewallOp::Apply, Some(Fault::Never)),
    ];
    for spoil in cases {
        let world = World::new().await;
        spoil(&world);
        let mut vm = world.create(true).await.unwrap();
        world.stop(vm.id, StopMode::Force).await.unwrap();
        assert!(settled(&mut vm).await.cleaned_up);
        world.taps.set_fault(TapOp::HostSubnets, None);
        world.assert_nothing_left().await;
        world.shutdown().await;
    }
}

#[tokio::test]
async fn a_subnet_stays_taken_while_its_tap_is_there() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    // It is there because the removal fails, and because somebody else holds its descriptor.
    let held = world.hypervisor.machine(vm.id).unwrap().nic().unwrap();
    world.taps.set_fault(TapOp::Remove, Some(Fault::Fails));
    world.stop(vm.id, StopMode::Force).await.unwrap();
    let view = settled(&mut vm).await;
    assert_eq!(view.phase, Phase::CleanupFailed);
    assert!(world.deps.reader.vm(vm.id).await.unwrap().unwrap().holds_subnet);
    let head = world.deps.reader.lifecycle_head(vm.id).await.unwrap().unwrap();
    assert!(head.cleanup["tap_delete"].error.is_some() && !head.last_error.is_empty(), "{head:?}");
    // The next VM gets another.
    let mut next = world.running(true).await;
    assert_eq!(subnet(&world, next.id).await.as_deref(), Some("192.168.101.0/24"));
    world.taps.set_fault(TapOp::Remove, None);
    world.stop(next.id, StopMode::Force).await.unwrap();
    settled(&mut next).await;
    drop(held);
    world.lock_is_free(vm.id).await;
    let reports = world.reconcile(Target::One(vm.id), Goal::Clean).await;
    assert!(matches!(reports[0].outcome, Outcome::Cleaned { .. }), "{reports:?}");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn what_this_host_uses_is_avoided_and_what_we_left_on_it_is_reaped() {
    let world = World::new().await;
    world.taps.add_link("eth0", None, &[(Ipv4Addr::new(192, 168, 100, 77), 24)]);
    world.taps.add_route(Ipv4Addr::new(192, 168, 102, 0), 23, "eth0");
    // A TAP of a VM of ours that nobody owns and that has no row, on the subnet that is free.
    let stale = VmId::new(0xbad);
    let mark = world.deps.mark(stale).to_string();
    let address = (Ipv4Addr::new(192, 168, 101, 1), 24);
    world.taps.add_link(&tap_name(stale), Some(&mark), &[address]);
    let first = world.running(true).await;
    assert_eq!(subnet(&world, first.id).await.as_deref(), Some("192.168.101.0/24"));
    assert_eq!(world.taps.observe(&tap_name(stale)).await.unwrap(), None);
    let second = world.running(true).await;
    assert_eq!(subnet(&world, second.id).await.as_deref(), Some("192.168.104.0/24"));
    for mut vm in [first, second] {
        world.stop(vm.id, StopMode::Force).await.unwrap();
        settled(&mut vm).await;
    }
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// Somebody who does not take the lock addresses the same subnet while the TAP is being made.
#[tokio::test]
async fn a_subnet_that_somebody_takes_meanwhile_is_given_back_and_the_next_one_taken() {
    let world = World::new().await;
    let late = std::time::Duration::from_millis(200);
    world.taps.set_fault(TapOp::Create, Some(Fault::Late(late)));
    let mut vm = world.create(true).await.unwrap();
    while !world.taps.calls().contains(&TapOp::Create) {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    world.taps.add_link("lan0", None, &[(Ipv4Addr::new(192, 168, 100, 9), 24)]);
    let view = reaches(&mut vm, |view| view.phase == Phase::Running || view.settled).await;
    assert_eq!(view.cause, None);
    assert_eq!(subnet(&world, vm.id).await.as_deref(), Some("192.168.101.0/24"));
    let tap = world.taps.observe(&tap_name(vm.id)).await.unwrap().unwrap();
    assert_eq!(tap.addresses, [(Ipv4Addr::new(192, 168, 101, 1), 24)]);
    world.stop(vm.id, StopMode::Force).await.unwrap();
    settled(&mut vm).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_network_in_another_namespace_could_not_be_looked_at_until_that_is_gone() {
    for sighting in [NamespaceSighting::Gone, NamespaceSighting::Unseen] {
        elsewhere_until(sighting).await;
    }
}

async fn elsewhere_until(sighting: NamespaceSighting) {
    let world = World::new().await;
    let mut vm = world.running(false).await;
    let ours = world.processes.own_namespaces().unwrap();
    let held = world.hypervisor.machine(vm.id).unwrap().nic().unwrap();
    world.taps.set_fault(TapOp::Remove, Some(Fault::Fails));
    world.stop(vm.id, StopMode::Force).await.unwrap();
    settled(&mut vm).await;
    world.taps.set_fault(TapOp::Remove, None);
    drop(held);
    world.lock_is_free(vm.id).await;
    world.processes.set_namespaces(Namespaces { net: "4:999".into(), ..ours.clone() });
    let reports = world.reconcile(Target::One(vm.id), Goal::Remove).await;
    let Outcome::Failed { step, error, .. } = &reports[0].outcome else { panic!("{reports:?}") };
    assert_eq!(step, "observe");
    assert!(error.contains("another network namespace"), "{error}");
    assert!(world.deps.reader.vm(vm.id).await.unwrap().unwrap().holds_subnet);
    world.processes.set_sighting(&ours.net, sighting);
    let reports = world.reconcile(Target::One(vm.id), Goal::Remove).await;
    assert!(matches!(reports[0].outcome, Outcome::Cleaned { .. }), "{reports:?}");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// After a reboot an interrupted `gc` has taken the VM over: what it had is of the boot before all the
/// same.
#[tokio::test]
async fn a_network_of_an_earlier_boot_is_gone_whoever_owns_the_vm_now() {
    let world = World::new().await;
    let vm = VmId::new(7);
    let now = world.processes.own_identity().unwrap();
    let maker = ProcessIdentity { boot_id: "an earlier boot".into(), ..now.clone() };
    let ours = world.processes.own_namespaces().unwrap();
    let namespaces = Namespaces { net: "4:999".into(), ..ours };
    let record = NewVm {
        id: vm,
        image: "fake".into(),
        config_json: "{}".into(),
        owner: maker.clone(),
        namespaces,
        ephemeral: false,
        backend: "fake".into(),
        resources: Resources {
            owner: Some(maker),
            tap_name: Some(tap_name(vm)),
            ..Resources::default()
        },
        created_at: jiff::Timestamp::now(),
    };
    let at = jiff::Timestamp::now();
    for op in [
        WriteOp::InsertVm { record: Box::new(record) },
        // Somebody's namespace has that number now.
        WriteOp::RaiseEpoch { vm, pid: now.pid, at },
    ] {
        world.deps.db.write(op).await.unwrap();
    }
    let reports = world.reconcile(Target::One(vm), Goal::Remove).await;
    assert!(matches!(reports[0].outcome, Outcome::Cleaned { .. }), "{reports:?}");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// A database that was lost: what was made is known by its marks alone.
#[tokio::test]
async fn a_tap_and_tables_without_a_row_are_swept_and_a_strangers_are_not() {
    let world = World::new().await;
    let address = [(Ipv4Addr::new(192, 168, 100, 1), 24)];
    let add_tap = |mark: Mark| {
        world.taps.add_link(&tap_name(mark.vm), Some(&mark.to_string()), &address);
    };
    let add_tables = |mark: Mark| {
        let tap = tap_name(mark.vm);
        for table in [format!("inet matchlock_{tap}"), format!("ip matchlock_nat_{tap}")] {
            world.firewall.add_table(&table, Some(&mark.to_string()));
        }
    };
    let stranger = InstallId::from_bytes([9; 8]);
    // Of one VM the TAP is left, of another the tables.
    add_tap(world.deps.mark(VmId::new(0xbad)));
    add_tables(world.deps.mark(VmId::new(0xbae)));
    add_tap(Mark { install: stranger.clone(), vm: VmId::new(0xbaf) });
    add_tables(Mark { install: stranger, vm: VmId::new(0xbaf) });
    let reports = world.reconcile(Target::All, Goal::Clean).await;
    let removed: Vec<_> = reports
        .iter()
        .map(|report| match &report.outcome {
            Outcome::Cleaned { removed } => (report.vm.number(), removed.join(" ")),
            other => panic!("{other:?}"),
        })
        .collect();
    let expected = [(0xbad, "tap_delete"), (0xbae, "nftables_cleanup")];
    assert_eq!(removed, expected.map(|(vm, step)| (vm, step.to_owned())));
    world.assert_nothing_left().await;
    assert_eq!(world.taps.existing(), [tap_name(VmId::new(0xbaf))]);
    assert_eq!(world.firewall.existing().len(), 2);
    world.shutdown().await;
}

/// Whatever carries the name of our TAP and is not ours, it does not keep a subnet taken for ever.
#[tokio::test]
async fn a_link_of_others_with_our_name_keeps_nothing_of_ours() {
    let world = World::new().await;
    let foreign = Mark { install: InstallId::from_bytes([9; 8]), vm: VmId::new(1) }.to_string();
    world.taps.add_link(&tap_name(VmId::new(1)), Some(&foreign), &[]);
    let mut vm = world.create(true).await.unwrap();
    let view = settled(&mut vm).await;
    assert!(view.cause.unwrap().message.contains("left alone"));
    world.lock_is_free(vm.id).await;
    world.reconcile(Target::All, Goal::Remove).await;
    assert!(world.deps.reader.vms().await.unwrap().is_empty());
    assert_eq!(world.taps.existing(), [tap_name(VmId::new(1))]);
    world.shutdown().await;
}
