//! Saves a machine: QEMU writes its state into a pipe, and we into the file, and hash it.
//!
//! ```text
//!   getfd (the pipe) ─► migrate ─► bytes … end of the pipe ─► query-migrate: completed?
//! ```
//!
//! # Invariants
//! 1. The file is ours alone: QEMU never has it, and its limit on file sizes does not count.
//! 2. What is written is bounded: a machine that says more than it can have is given up.
//!
//! # Failure
//! The file then holds a part; whoever made it throws it away. The thread that copies ends with the
//! pipe, thus with the machine at the latest.

use std::fs::{self, File};
use std::io::{self, PipeReader, Read, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::task::spawn_blocking;

use super::super::{HypervisorError, MachineSpec, Saved, Start};
use super::command::{Acceleration, Wiring, arguments};
use super::failed;
use super::qmp::Control;
use crate::rootfs::VmPaths;

/// No machine that is saved has so much in use: it is a fresh one.
const MAX_BYTES: u64 = 4 << 30;

/// The most that QEMU takes.
const MAX_DOWNTIME_MS: u64 = 2_000_000;

/// How often QEMU is asked whether it is done, after the end of the pipe, and how long between.
const ASKED_AGAIN: u32 = 100;
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// Saves the machine behind this channel.
pub(super) async fn save(control: &Control, to: File) -> Result<Saved, HypervisorError> {
    let (reader, writer) = io::pipe().map_err(failed("make a pipe"))?;
    let name = json!({ "fdname": "memory" });
    control.ask("getfd", name, Some(writer.into())).await?;
    // Nobody waits for its guest: it may stand still for as long as it takes, after one look at its
    // memory. A machine that was stopped before would be restored as a stopped one.
    let speed = json!({ "max-bandwidth": MAX_BYTES, "downtime-limit": MAX_DOWNTIME_MS });
    control.ask("migrate-set-parameters", speed, None).await?;
    let copied = spawn_blocking(move || copy(reader, to));
    control.ask("migrate", json!({ "uri": "fd:memory" }), None).await?;
    let copied = copied.await.map_err(io::Error::other).map_err(failed("save the machine"))?;
    let saved = copied.map_err(failed("save the machine"))?;
    for _ in 0..ASKED_AGAIN {
        let state = control.ask("query-migrate", json!({}), None).await?;
        match state.get("status").and_then(serde_json::Value::as_str) {
            Some("completed") => return Ok(saved),
            Some("setup" | "active" | "device") => tokio::time::sleep(ASK_AGAIN).await,
            _ => break,
        }
    }
    Err(HypervisorError::Control { what: "the machine was not saved as a whole".to_owned() })
}

fn copy(mut from: PipeReader, mut to: File) -> io::Result<Saved> {
    let mut hash = Sha256::new();
    let mut bytes = 0;
    let mut buffer = vec![0; 1 << 18];
    loop {
        let part = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => buffer.get(..read).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        bytes += part.len() as u64;
        if bytes > MAX_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        hash.update(part);
        to.write_all(part)?;
    }
    Ok(Saved { bytes, sha256: hex::encode(hash.finalize()) })
}

/// All that two QEMUs must have in common, in one word: the program's file, and its arguments but
/// for what belongs to a VM.
pub(super) fn fingerprint(
    program: &Path,
    spec: &MachineSpec,
    acceleration: Acceleration,
    tsc_khz: Option<u64>,
) -> Result<String, HypervisorError> {
    let found = fs::metadata(program).map_err(failed(format!("look at {}", program.display())))?;
    let vm = matchlock_model::id::VmId::new(0);
    let same = MachineSpec {
        mark: matchlock_model::id::Mark { vm, ..spec.mark.clone() },
        paths: VmPaths::new(Path::new("/"), vm),
        kernel: "/kernel".into(),
        initramfs: "/initramfs".into(),
        base_disk: "/base".into(),
        nic: spec.nic.clone().map(|nic| super::super::Nic { mac: [0; 6], mtu: 0, ..nic }),
        start: Start::Hold,
        ..spec.clone()
    };
    let tap = same.nic.as_ref().map(|_| 0);
    let wiring = Wiring { acceleration, tsc_khz, link: 0, qmp: 0, tap, memory: None };
    let mut hash = Sha256::new();
    for argument in arguments(&same, &same.base_disk, &wiring) {
        // The installation is no part of a machine.
        if argument != *same.mark.to_string() {
            hash.update(argument.as_encoded_bytes());
            hash.update([0]);
        }
    }
    let digest = hex::encode(hash.finalize());
    Ok(format!(
        "{} {} {} {} {}",
        program.display(),
        found.ino(),
        found.size(),
        found.mtime_nsec().wrapping_add(found.mtime().wrapping_mul(1_000_000_000)),
        digest
    ))
}
