//! The whole host as a case sees it, in lines that can be compared.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context as _, Result};
use matchlock_test_support::Installation;
use matchlock_test_support::netns::Namespace;
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

/// What may stay in the state directory and in a cache: the state itself, and empty directories.
const MAY_STAY: &[&str] = &[
    "",
    "state.db",
    "state.db-wal",
    "state.db-shm",
    "state.db.init.lock",
    "install-id",
    "vm.locks",
    "config.toml",
    "vms",
    "images",
    "images/blobs",
    "images/content",
    "images/content/partial",
    "images/tmp",
    "images/metadata.db",
    "images/metadata.db-wal",
    "images/metadata.db-shm",
    "images/metadata.db.init.lock",
];

/// The names of the blobs in a cache.
pub(crate) fn blobs(cache: &Path) -> Result<Vec<String>> {
    match fs::read_dir(cache.join("images/blobs")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.file_name().to_string_lossy().into())).collect(),
    }
}

/// Links, addresses, routes, tables and sockets of a network namespace. Forwarding stays on: a
/// setting of the host that is turned on once.
const LOOK: &str = "ip -o link; ip -o addr; ip route show table all; ip -6 route show table all
    ip neigh; nft list ruleset; awk 'NR > 1 { print \"socket\", $8 }' /proc/net/unix | sort";

/// What is there, one thing a line.
pub(crate) type Lines = BTreeSet<String>;

/// Processes, and everything that the kernel keeps for the network: what must go without `gc`, too.
pub(crate) fn kernel(net: &Namespace, installation: &Installation) -> Result<Lines> {
    let remains = installation.remains()?;
    let processes = remains.processes.iter().map(|(pid, line)| format!("process {pid}: {line}"));
    let network = net.sh(LOOK)?;
    Ok(processes.chain(network.lines().map(str::to_owned)).collect())
}

/// Everything.
pub(crate) fn all(net: &Namespace, installation: &Installation) -> Result<Lines> {
    let mut lines = kernel(net, installation)?;
    let home = installation.home();
    let text = home.to_string_lossy().into_owned();
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    lines.extend(mounts.lines().filter(|l| l.contains(&text)).map(|l| format!("mount {l}")));
    lines.extend(loop_devices(&text)?);
    lines.extend(files(&home, &home)?);
    let cache = home.with_file_name("cache");
    lines.extend(files(&cache, &cache)?);
    lines.extend(rows(installation)?);
    lines.extend(locks(&home)?);
    Ok(lines)
}

/// What is in one and not in the other.
pub(crate) fn difference(before: &Lines, after: &Lines) -> Vec<String> {
    let left = after.difference(before).map(|line| format!("+ {line}"));
    let lost = before.difference(after).map(|line| format!("- {line}"));
    left.chain(lost).collect()
}

fn loop_devices(home: &str) -> Result<Lines> {
    let mut found = Lines::new();
    for entry in fs::read_dir("/sys/block").context("/sys/block")? {
        let path = entry?.path().join("loop/backing_file");
        match fs::read_to_string(&path) {
            Ok(file) if file.contains(home) => {
                found.insert(format!("loop device of {file}"));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A device that is being detached.
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {}
            Err(error) => return Err(error).context(path.display().to_string()),
        }
    }
    Ok(found)
}

fn files(home: &Path, dir: &Path) -> Result<Lines> {
    let mut found = Lines::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let name = path.strip_prefix(home)?.to_string_lossy().into_owned();
        if !MAY_STAY.contains(&name.as_str()) {
            found.insert(format!("file {name}"));
        }
        if entry.file_type()?.is_dir() {
            found.extend(files(home, &path)?);
        }
    }
    Ok(found)
}

/// Rows that stand for something: VMs, subnets, histories that do not end with `cleaned`.
fn rows(installation: &Installation) -> Result<Lines> {
    if !installation.home().join("state.db").try_exists()? {
        return Ok(Lines::new());
    }
    let query = "
        select 'row vms ' || id || ' ' || status from vms;
        select 'row subnet_allocations ' || vm_id || ' ' || subnet from subnet_allocations;
        select 'history of ' || h.vm_id || ' ends with ' || l.phase from vm_lifecycle_head h
            join vm_lifecycle l on l.vm_id = h.vm_id and l.version = h.last_version
            where l.phase <> 'cleaned'";
    // A process that was killed before the tables were made leaves none.
    let tables =
        installation.sql("select count(*) from sqlite_master where name = 'vm_lifecycle_head'")?;
    if tables.trim() != "1" {
        return Ok(Lines::new());
    }
    Ok(installation.sql(query)?.lines().map(str::to_owned).collect())
}

/// A lock on the whole file excludes every lock of a VM.
fn locks(home: &Path) -> Result<Lines> {
    let file = match fs::OpenOptions::new().read(true).write(true).open(home.join("vm.locks")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Lines::new()),
        file => file?,
    };
    match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lines::new()),
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(Lines::from(["a lock is held".to_owned()])),
        Err(errno) => Err(errno.into()),
    }
}

/// What a row must not claim, whoever died: `cleaned`, while the VM holds something.
pub(crate) fn false_claims(installation: &Installation) -> Result<Vec<String>> {
    if !installation.home().join("state.db").try_exists()? {
        return Ok(Vec::new());
    }
    let tables =
        installation.sql("select count(*) from sqlite_master where name = 'vm_lifecycle_head'")?;
    if tables.trim() != "1" {
        return Ok(Vec::new());
    }
    let query = "select h.vm_id, exists (select 1 from subnet_allocations s where s.vm_id = h.vm_id)
        from vm_lifecycle_head h
        join vm_lifecycle l on l.vm_id = h.vm_id and l.version = h.last_version where l.phase = 'cleaned'";
    let mut claims = Vec::new();
    for line in installation.sql(query)?.lines() {
        let Some((vm, subnet)) = line.split_once('|') else { continue };
        if subnet == "1" {
            claims.push(format!("{vm} is cleaned and holds a subnet"));
        }
        let dir = installation.home().join("vms").join(vm);
        for name in ["rootfs.ext4", "rootfs.ext4.tmp", "owner.sock", "link.sock", "qmp.sock"] {
            if dir.join(name).try_exists()? {
                claims.push(format!("{vm} is cleaned and has {name}"));
            }
        }
    }
    Ok(claims)
}
