//! Broken on purpose: each mutation must be seen by at least one of its checks.

use std::sync::Mutex;

use anyhow::Result;
use matchlock_test_support::netns::Namespace;

use super::case::{Case, Fault, play};
use super::frozen::{self, Where};

/// Who should see a mutation.
enum Check {
    /// A case of the suite.
    Case(&'static str, Fault),
    /// [`frozen::beside_gc`].
    BesideGc,
    /// [`frozen::overtaken`].
    Overtaken,
    /// [`frozen::overruled`] of an owner that stands still at this point.
    Overruled(&'static str),
}

use Check::{BesideGc, Overruled, Overtaken};

const fn case(point: &'static str, fault: Fault) -> Check {
    Check::Case(point, fault)
}

/// Each mutation, what it breaks, and who should see it.
const MUTANTS: &[(&str, &str, Check)] = &[
    ("skip:gc.close_machine", "gc leaves the hypervisor", case("gc.take_over.before", Fault::Kill)),
    ("skip:gc.remove_tap", "gc leaves the TAP", case("gc.take_over.before", Fault::Kill)),
    ("skip:gc.remove_firewall", "gc leaves the tables", case("gc.take_over.before", Fault::Kill)),
    // Of a VM that is kept: elsewhere they go with the directory.
    ("skip:gc.remove_sockets", "gc leaves the sockets", case("owner.kill.before", Fault::Kill)),
    ("skip:gc.remove_disk", "gc leaves the disk", case("owner.kill.before", Fault::Kill)),
    ("skip:gc.release_subnet", "gc leaves the subnet", case("gc.take_over.before", Fault::Kill)),
    ("skip:gc.remove_dir", "gc leaves the directory", case("gc.take_over.before", Fault::Kill)),
    ("skip:gc.remove_row", "gc leaves the row", case("gc.take_over.before", Fault::Kill)),
    (
        "skip:gc.record_cleaned",
        "gc does not say that it cleaned",
        case("rm.remove.before", Fault::Kill),
    ),
    (
        "skip:vm.close_machine",
        "the owner leaves the hypervisor",
        case("vm.remove_tap.before", Fault::Both),
    ),
    (
        "skip:vm.remove_disk",
        "the owner leaves the disk",
        case("vm.record_cleaned.after", Fault::Kill),
    ),
    (
        "skip:vm.remove_sockets",
        "the owner leaves the sockets",
        case("vm.record_cleaned.after", Fault::Kill),
    ),
    (
        "skip:vm.release_subnet",
        "the owner leaves the subnet",
        case("vm.record_cleaned.after", Fault::Kill),
    ),
    ("release_subnet_first", "the subnet before its TAP", case("gc.take_over.before", Fault::Kill)),
    (
        "record_cleaned_first",
        "the outcome before the effect",
        case("gc.remove_disk.before", Fault::Kill),
    ),
    (
        "blind_to_taps",
        "gone, without looking for the TAP",
        case("gc.take_over.before", Fault::Kill),
    ),
    ("tap_remove_lies", "gone, without removing the TAP", case("gc.take_over.before", Fault::Kill)),
    (
        "firewall_remove_lies",
        "gone, without removing the tables",
        case("gc.take_over.before", Fault::Kill),
    ),
    (
        "anybodys_processes",
        "another installation's hypervisor is taken for ours",
        case("gc.take_over.before", Fault::Kill),
    ),
    ("ignore_owner_lock", "a held lock is no lock", BesideGc),
    ("ignore_epoch", "an overtaken owner may write", Overtaken),
    (
        "leave_tables_of_others",
        "a frozen owner's tables are called removed",
        Overruled("vm.launch.before"),
    ),
    (
        "leave_half_imports",
        "what a killed import left is called swept",
        case("image.build.after", Fault::Kill),
    ),
    (
        "leave_unnamed_blobs",
        "a blob without a row is wanted",
        case("image.name_blob.after", Fault::Kill),
    ),
    (
        "leave_downloads",
        "what a killed pull has downloaded is called swept",
        case("content.name.after", Fault::Kill),
    ),
    (
        "remove_blob_first",
        "the blob before the row that names it",
        case("images_db.remove_image.before", Fault::Kill),
    ),
];

/// What a check sees; `None` when it sees nothing.
fn seen(check: &Check, mutation: Option<&str>) -> Option<String> {
    let net = Namespace::new().unwrap();
    net.sh("ip link set lo up").unwrap();
    let wrong: Result<Vec<String>> = match check {
        Check::Case(point, fault) => {
            let case = Case::new(*point, *fault);
            play(&net, &case, mutation).map(|report| report.leaks)
        }
        BesideGc => frozen::beside_gc(&net, mutation),
        Overtaken => frozen::overtaken(&net, mutation),
        Overruled(point) => frozen::overruled(&net, Where::At(point), mutation),
    };
    match wrong {
        Ok(wrong) if wrong.is_empty() => None,
        Ok(wrong) => Some(wrong.join("; ")),
        Err(error) => Some(format!("{error:#}")),
    }
}

#[test]
#[ignore = "`make mutants`"]
fn every_mutation_is_seen() {
    let survivors = Mutex::new(Vec::new());
    let only = std::env::var("MATCHLOCK_MUTANTS_ONLY").unwrap_or_default();
    let chosen: Vec<_> = MUTANTS.iter().filter(|(name, ..)| name.contains(&only)).collect();
    for (mutation, what, check) in &chosen {
        // Without it the check sees nothing: what it sees is the mutation.
        assert_eq!(seen(check, None), None, "the check of {mutation} fails without it");
        match seen(check, Some(mutation)) {
            Some(wrong) => println!("caught    {mutation} ({what}): {wrong:.150}"),
            None => {
                println!("SURVIVES  {mutation} ({what})");
                survivors.lock().unwrap().push(*mutation);
            }
        }
    }
    let survivors = survivors.into_inner().unwrap();
    assert!(survivors.is_empty(), "{} of {}: {survivors:?}", survivors.len(), chosen.len());
    println!("{} mutations, all caught", chosen.len());
}
