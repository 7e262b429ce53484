//! Subnets: given once, the lowest first, in one transaction whoever asks.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use matchlock_model::subnet::{Ipv4Cidr, Subnet, SubnetPool};
use matchlock_store::{WriteConn, WriteError, WriteOp, WriteOutcome, open_state};

use crate::child::{Child, await_go, task, tell};
use crate::support::{EPOCH, Home, apply_one, at, clean, insert, vm};

fn allocate_from(pool: &Arc<SubnetPool>, number: u32, avoid: &[&str]) -> WriteOp {
    let avoid: Vec<Ipv4Cidr> = avoid.iter().map(|text| text.parse().unwrap()).collect();
    WriteOp::AllocateSubnet {
        vm: vm(number),
        epoch: EPOCH,
        pool: Arc::clone(pool),
        avoid,
        at: at(9),
    }
}

fn release(number: u32) -> WriteOp {
    WriteOp::ReleaseSubnet { vm: vm(number), epoch: EPOCH }
}

fn given(conn: &mut WriteConn, op: WriteOp) -> Subnet {
    match apply_one(conn, op).unwrap() {
        WriteOutcome::Subnet(subnet) => subnet,
        other => panic!("{other:?}"),
    }
}

fn pool(text: &str) -> Arc<SubnetPool> {
    Arc::new(text.parse().unwrap())
}

#[tokio::test]
async fn a_vm_gets_one_subnet_which_its_rows_name() {
    let home = Home::new();
    let mut conn = home.writer();
    apply_one(&mut conn, insert(vm(1))).unwrap();
    let default = Arc::new(SubnetPool::default());
    let first = given(&mut conn, allocate_from(&default, 1, &[]));
    assert_eq!(first.cidr.to_string(), "192.168.100.0/24");
    // Asked again, even for another pool, it is the one it has, and no row is added.
    let history = home.reader().history(vm(1)).await.unwrap();
    let again = given(&mut conn, allocate_from(&pool("base=10.1.0.0/24,size=30"), 1, &[]));
    assert_eq!(again, first);
    assert_eq!(home.reader().history(vm(1)).await.unwrap(), history);
    let resources = &history.last().unwrap().resources;
    assert_eq!(resources.gateway_ip.as_deref(), Some("192.168.100.1"));
    assert_eq!(resources.guest_ip.as_deref(), Some("192.168.100.2"));
    assert_eq!(resources.subnet_cidr.as_deref(), Some("192.168.100.0/24"));
    assert!(resources.state_dir.is_some(), "what it held before is still named");
    let row: (String, i64, String, String, String) = home
        .plain()
        .query_row(
            "SELECT vm_id, octet, gateway_ip, guest_ip, subnet FROM subnet_allocations",
            [],
            |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?, r.get(4)?)),
        )
        .unwrap();
    let expected = ("vm-00000001", 100, "192.168.100.1", "192.168.100.2", "192.168.100.0/24");
    assert_eq!((&*row.0, row.1, &*row.2, &*row.3, &*row.4), expected);
}

#[test]
fn the_lowest_that_is_free_is_given_and_given_again_once_it_is_back() {
    let home = Home::new();
    let mut conn = home.writer();
    let pool = pool("base=10.1.0.0/28,size=30");
    for number in 1..=4 {
        apply_one(&mut conn, insert(vm(number))).unwrap();
    }
    for (number, cidr) in [(1, "10.1.0.0/30"), (2, "10.1.0.4/30"), (3, "10.1.0.8/30")] {
        assert_eq!(given(&mut conn, allocate_from(&pool, number, &[])).cidr.to_string(), cidr);
    }
    let held = WriteOutcome::Released { held: true };
    assert_eq!(apply_one(&mut conn, release(2)), Ok(held));
    assert_eq!(apply_one(&mut conn, release(2)), Ok(WriteOutcome::Released { held: false }));
    let again = given(&mut conn, allocate_from(&pool, 4, &["10.1.0.0/29"]));
    assert_eq!(again.cidr.to_string(), "10.1.0.12/30", "a route of the host is avoided");
    let lowest = given(&mut conn, allocate_from(&pool, 2, &[]));
    assert_eq!(lowest.cidr.to_string(), "10.1.0.4/30");
}

#[test]
fn when_none_is_left_the_error_says_so_and_what_to_do() {
    let home = Home::new();
    let mut conn = home.writer();
    let pool = pool("base=10.1.0.0/30,size=30");
    for number in 1..=2 {
        apply_one(&mut conn, insert(vm(number))).unwrap();
    }
    given(&mut conn, allocate_from(&pool, 1, &[]));
    let refused = apply_one(&mut conn, allocate_from(&pool, 2, &[])).unwrap_err();
    assert!(matches!(refused, WriteError::NoFreeSubnet { held: 1, count: 1, .. }), "{refused:?}");
    assert!(!refused.retryable());
    let text = refused.to_string();
    assert!(text.contains("10.1.0.0/30") && text.contains("MATCHLOCK_SUBNET_POOL"), "{text}");
    apply_one(&mut conn, release(1)).unwrap();
    given(&mut conn, allocate_from(&pool, 2, &[]));
}

#[test]
fn only_the_owner_of_a_vm_that_is_there_gets_or_gives_back() {
    let home = Home::new();
    let mut conn = home.writer();
    let default = Arc::new(SubnetPool::default());
    let unknown = apply_one(&mut conn, allocate_from(&default, 1, &[]));
    assert_eq!(unknown, Err(WriteError::NotFound { vm: vm(1) }));
    apply_one(&mut conn, insert(vm(1))).unwrap();
    given(&mut conn, allocate_from(&default, 1, &[]));
    apply_one(&mut conn, WriteOp::RaiseEpoch { vm: vm(1), pid: 9, at: at(10) }).unwrap();
    for op in [allocate_from(&default, 1, &[]), release(1)] {
        assert!(matches!(apply_one(&mut conn, op), Err(WriteError::Fenced { .. })));
    }
}

#[test]
fn a_vm_is_not_removed_before_its_subnet_is_back() {
    let home = Home::new();
    let mut conn = home.writer();
    apply_one(&mut conn, insert(vm(1))).unwrap();
    given(&mut conn, allocate_from(&Arc::new(SubnetPool::default()), 1, &[]));
    clean(&mut conn, vm(1));
    let remove = || WriteOp::RemoveVm { vm: vm(1), epoch: EPOCH };
    assert_eq!(apply_one(&mut conn, remove()), Err(WriteError::SubnetHeld { vm: vm(1) }));
    apply_one(&mut conn, release(1)).unwrap();
    assert_eq!(apply_one(&mut conn, remove()), Ok(WriteOutcome::Removed));
}

const PROCESSES: u32 = 8;
const EACH: u32 = 125;

/// Makes VMs and takes a subnet for each; every third is given back.
#[test]
#[ignore = "a helper process of the test below"]
fn takes_subnets() {
    let Some(task) = task() else { return };
    let (number, home) = task.split_once(' ').unwrap();
    let number: u32 = number.parse().unwrap();
    let mut conn = open_state(Path::new(home)).unwrap();
    let pool = Arc::new(SubnetPool::default());
    tell("ready");
    await_go();
    for vm_number in (0..EACH).map(|n| number * EACH + n) {
        apply_one(&mut conn, insert(vm(vm_number))).unwrap();
        let subnet = given(&mut conn, allocate_from(&pool, vm_number, &[]));
        if vm_number % 3 == 0 {
            apply_one(&mut conn, release(vm_number)).unwrap();
        } else {
            tell(&format!("{} {}", subnet.octet, subnet.cidr));
        }
    }
}

#[test]
fn eight_processes_that_take_a_thousand_subnets_share_none() {
    let home = Home::new();
    drop(home.writer());
    let mut children: Vec<Child> = (0..PROCESSES)
        .map(|n| Child::start("subnets::takes_subnets", &format!("{n} {}", home.path.display())))
        .collect();
    for child in &mut children {
        assert_eq!(child.hear().unwrap(), "ready");
    }
    for child in &mut children {
        child.go();
    }
    let mut held = BTreeSet::new();
    for mut child in children {
        while let Some(told) = child.hear() {
            assert!(held.insert(told.clone()), "{told} was given twice");
        }
        assert!(child.end(), "a process failed");
    }
    let kept = (0..PROCESSES * EACH).filter(|number| number % 3 != 0).count();
    assert_eq!(held.len(), kept);
    let conn = home.plain();
    let mut query = conn.prepare("SELECT octet || ' ' || subnet FROM subnet_allocations").unwrap();
    let stored: BTreeSet<String> =
        query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    assert_eq!(stored, held);
}

#[test]
fn a_row_that_cannot_be_read_keeps_its_subnet_and_stops_nobody() {
    for bad in ["rubbish", "255.255.255.255/32"] {
        let home = Home::new();
        let mut conn = home.writer();
        for number in [1, 2] {
            apply_one(&mut conn, insert(vm(number))).unwrap();
        }
        let default = Arc::new(SubnetPool::default());
        given(&mut conn, allocate_from(&default, 1, &[]));
        home.plain().execute("UPDATE subnet_allocations SET subnet = ?1", [bad]).unwrap();
        let next = given(&mut conn, allocate_from(&default, 2, &[]));
        assert_eq!((next.octet, &*next.cidr.to_string()), (101, "192.168.101.0/24"));
        let own = apply_one(&mut conn, allocate_from(&default, 1, &[])).unwrap_err().to_string();
        assert!(
            own.starts_with("subnet_allocations.subnet of vm-00000001 cannot be read"),
            "{own}"
        );
    }
}
