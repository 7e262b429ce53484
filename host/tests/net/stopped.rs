//! An owner that stands still holds its tables, and they can be removed all the same.

use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use matchlock_host::firewall::{FakeFirewall, Firewall, FirewallError, LinuxFirewall};
use matchlock_model::identity::ProcessIdentity;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::firewall::spec;
use crate::killed::{ALONE, shown, start};
use crate::namespace::{Namespace, mark};

const TAP: &str = "fc-00000001";

/// Who a child is, from the kernel.
fn identity(child: &Child) -> ProcessIdentity {
    let pid = child.id().try_into().unwrap();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let start = stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap();
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned();
    ProcessIdentity { pid, start_ticks: start.parse().unwrap(), boot_id }
}

/// An owner that has everything, and stands still.
fn stopped(namespace: &Namespace) -> (Child, ProcessIdentity) {
    let (owner, _) = start(namespace, ALONE);
    let identity = identity(&owner);
    kill_process(Pid::from_raw(identity.pid).unwrap(), Signal::STOP).unwrap();
    let begun = Instant::now();
    let stat = format!("/proc/{}/stat", identity.pid);
    while !fs::read_to_string(&stat).unwrap().contains(") T ") {
        assert!(begun.elapsed() < Duration::from_secs(20), "it does not stop");
    }
    (owner, identity)
}

fn end(mut owner: Child) {
    owner.kill().unwrap();
    owner.wait().unwrap();
}

/// What every implementation must do with tables of VM 1 of installation 1 that this process holds.
async fn tables_are_taken_from_their_holder(firewall: &dyn Firewall, holder: &ProcessIdentity) {
    let ours = mark(1, 1);
    let plain = firewall.remove(TAP, &ours).await.unwrap_err();
    assert!(matches!(plain, FirewallError::OwnerLives { .. }), "{plain}");
    // Not out of a process that only has its pid, nor with another's mark.
    let later = ProcessIdentity { start_ticks: holder.start_ticks + 1, ..holder.clone() };
    let refused = firewall.remove_from(TAP, &ours, &later).await.unwrap_err();
    assert!(matches!(refused, FirewallError::OwnerLives { .. }), "{refused}");
    let refused = firewall.remove_from(TAP, &mark(2, 1), holder).await.unwrap_err();
    assert!(matches!(refused, FirewallError::NotOurs { .. }), "{refused}");
    assert!(!firewall.observe(TAP).await.unwrap().is_gone());

    firewall.remove_from(TAP, &ours, holder).await.unwrap();
    assert!(firewall.observe(TAP).await.unwrap().is_gone());
    firewall.remove_from(TAP, &ours, holder).await.unwrap();
}

#[test]
fn tables_are_removed_through_the_socket_of_an_owner_that_stands_still() {
    let namespace = Namespace::new();
    let (owner, holder) = stopped(&namespace);
    let pid = holder.pid;
    namespace.block_on(|| async move {
        tables_are_taken_from_their_holder(&LinuxFirewall::new(), &holder).await;
    });
    assert!(!shown(&namespace).1);
    assert!(fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") T "));
    end(owner);
}

#[tokio::test]
async fn the_fake_does_the_same() {
    let holder = ProcessIdentity { pid: 7, start_ticks: 70, boot_id: "fake".to_owned() };
    let fake = FakeFirewall::new();
    let held = fake.in_process(holder.clone()).apply(&spec(&mark(1, 1))).await.unwrap();
    tables_are_taken_from_their_holder(&fake, &holder).await;
    drop(held);
}

/// A copy of another's socket takes a right that it does not take to make tables.
#[test]
fn who_may_not_take_the_socket_is_told_whose_it_is() {
    let namespace = Namespace::new();
    let (owner, holder) = stopped(&namespace);
    let pid = holder.pid;
    let refused = namespace.run(move || {
        // Of a thread of its own: what it gives up it never has again.
        let work = move || {
            let mut few = capabilities(None).unwrap();
            few.effective = CapabilitySet::NET_ADMIN;
            few.permitted = CapabilitySet::NET_ADMIN;
            set_capabilities(None, few).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                LinuxFirewall::new().remove_from(TAP, &mark(1, 1), &holder).await.unwrap_err()
            })
        };
        std::thread::spawn(work).join().unwrap()
    });
    assert!(
        matches!(refused, FirewallError::HeldBy { pid: named, .. } if named == pid),
        "{refused}"
    );
    let told = refused.to_string();
    assert!(told.contains(&format!("process {pid}")) && !told.contains('\n'), "{told}");
    assert!(shown(&namespace).1);
    // Once that process has ended, as it was told.
    end(owner);
    namespace.block_on(|| async { LinuxFirewall::new().remove(TAP, &mark(1, 1)).await }).unwrap();
    assert!(!shown(&namespace).1);
}
