//! `matchlock gc` on many dead VMs: rows and directories as owners leave them that were killed while
//! their VMs ran; processes, links and tables went with the owners.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use matchlock_model::phase::Phase;
use matchlock_model::record::Started;
use matchlock_model::subnet::SubnetPool;
use matchlock_store::{WriteOp, open_state};
use tempfile::TempDir;

use crate::common;

const VMS: u32 = 1_000;
const ROUNDS: usize = 7;
const GOAL: &str = "2 s";

/// The section of the report.
pub(crate) fn section() -> Result<String> {
    let mut lines = String::from(
        "\n`matchlock gc` on 1,000 dead VMs with a subnet, a disk and sockets each, the whole process \
         (`cargo bench --bench scenarios`, 7 rounds, each with a state directory of its own; median, \
         median absolute deviation, least and most):\n\n\
         | VMs | time | least … most | goal |\n|---|---|---|---|\n",
    );
    for (ephemeral, what) in [
        (true, "to go with their command (`--rm`): directory and row are removed too"),
        (false, "to be kept (`--rm=false`): directory and row stay"),
    ] {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            times.push(round(ephemeral)?.as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let median = times[ROUNDS / 2];
        let mut off: Vec<f64> = times.iter().map(|time| (time - median).abs()).collect();
        off.sort_by(f64::total_cmp);
        lines.push_str(&format!(
            "| {what} | {median:.2} s ± {:.2} | {:.2} … {:.2} | {GOAL} |\n",
            off[ROUNDS / 2],
            times[0],
            times[ROUNDS - 1]
        ));
    }
    Ok(lines)
}

fn round(ephemeral: bool) -> Result<Duration> {
    let home = TempDir::new()?;
    leave(home.path(), ephemeral)?;
    let program = std::env::var_os("MATCHLOCK_TEST_BIN").context("MATCHLOCK_TEST_BIN")?;
    let began = Instant::now();
    let output = Command::new(program)
        .arg("gc")
        .env("MATCHLOCK_HOME", home.path())
        .env_remove("MATCHLOCK_LOG")
        .output()?;
    let took = began.elapsed();
    let said = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "gc: {}", String::from_utf8_lossy(&output.stderr));
    ensure!(said.ends_with(&format!("Reconciled {VMS} VMs\n")), "gc said {said}");
    let left = fs::read_dir(home.path().join("vms"))?.count();
    ensure!(left == if ephemeral { 0 } else { 1_000 }, "{left} directories are left");
    Ok(took)
}

fn namespace(name: &str) -> Result<String> {
    let found = fs::metadata(format!("/proc/self/ns/{name}"))?;
    Ok(format!("{}:{}", found.dev(), found.ino()))
}

fn leave(home: &Path, ephemeral: bool) -> Result<()> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    // Beyond the largest pid: nobody's.
    let dead = ProcessIdentity { pid: 4_194_305, start_ticks: 1, boot_id };
    let namespaces = Namespaces { net: namespace("net")?, pid: namespace("pid")? };
    let pool = Arc::new(SubnetPool::default());
    let mut conn = open_state(home)?;
    for number in 1..=VMS {
        let WriteOp::InsertVm { mut record } = common::insert(number, home) else {
            unreachable!("an insert");
        };
        record.owner = dead.clone();
        record.namespaces = namespaces.clone();
        record.ephemeral = ephemeral;
        record.resources.owner = Some(dead.clone());
        record.resources.namespaces = Some(namespaces.clone());
        let (vm, epoch, at) = (VmId::new(number), OwnerEpoch::FIRST, Timestamp::now());
        record.resources.tap_name = Some(format!("fc-{}", vm.suffix()));
        let (pool, hypervisor) = (Arc::clone(&pool), dead.clone());
        common::write(
            &mut conn,
            vec![
                WriteOp::InsertVm { record },
                WriteOp::AllocateSubnet { vm, epoch, pool, avoid: Vec::new(), at },
                common::change(number, Phase::Created, 0),
                common::change(number, Phase::Starting, 0),
                WriteOp::SetHypervisor { vm, epoch, hypervisor, started: Started::Booted, at },
                common::change(number, Phase::Running, 0),
            ],
        );
        let dir = home.join("vms").join(vm.to_string());
        DirBuilder::new().recursive(true).mode(0o700).create(dir.join("logs"))?;
        for name in ["rootfs.ext4", "hypervisor.json", "logs/console.log", "logs/hypervisor.log"] {
            File::create(dir.join(name))?;
        }
        File::options().write(true).open(dir.join("rootfs.ext4"))?.set_len(5 << 30)?;
        for name in ["link.sock", "qmp.sock", "owner.sock"] {
            drop(UnixListener::bind(dir.join(name))?);
        }
    }
    Ok(())
}
