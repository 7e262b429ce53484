//! QEMU without Matchlock: the machine that a VM's `hypervisor.json` describes, booted or restored,
//! until its agent has answered and a first command has ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use async_trait::async_trait;
use matchlock_host::guest_link::{ExecEvent, LinkConnector as _, YamuxConnector};
use matchlock_host::hypervisor::{HypervisorError, Machine, MachineExit, Saved};
use matchlock_model::exec::{ExecSpec, ExitStatus};
use matchlock_model::guest::GuestConfig;
use matchlock_model::identity::ProcessIdentity;
use matchlock_test_support::Installation;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(60);

/// What a VM's QEMU was started with, and a writable layer as it was made.
pub(crate) struct Description {
    argv: Vec<String>,
    disk_bytes: u64,
    /// What it goes on from, unless it boots.
    snapshot: Option<PathBuf>,
}

impl Description {
    /// That of a VM as `run` makes them: one that goes on from a snapshot where there is one.
    pub(crate) fn of_a_vm(installation: &Installation) -> Result<Self> {
        let vm = installation.start_run(&[], &["sleep", "1000"])?;
        let id = installation.wait_for_status("running")?;
        let dir = installation.home().join("vms").join(id);
        let text = fs::read(dir.join("hypervisor.json"))?;
        let description: Value = serde_json::from_slice(&text)?;
        let argv = description["argv"].as_array().context("no argv")?;
        let argv: Vec<String> = argv.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        let disk_bytes = fs::metadata(dir.join("rootfs.ext4"))?.len();
        vm.signal(rustix::process::Signal::TERM)?;
        vm.wait(PATIENCE)?;
        let snapshot = match &*installation.snapshots()? {
            [] => None,
            [name] => Some(installation.cache().join("snapshots").join(name).join("memory")),
            more => bail!("one of {} snapshots", more.len()),
        };
        let is_restored = argv.iter().any(|arg| arg == "-incoming");
        ensure!(is_restored == snapshot.is_some(), "it began in another way: {argv:?}");
        Ok(Self { argv, disk_bytes, snapshot })
    }

    /// The same arguments, but for what belongs to the VM: its name, its sockets and what it goes on from.
    fn arguments(&self) -> Result<Vec<String>> {
        let mut own = Vec::new();
        let mut before = "";
        for arg in self.argv.iter().skip(1) {
            let is_socket = before == "-chardev" && arg.starts_with("socket,");
            own.push(match (before, is_socket) {
                ("-name", _) => "bare".to_owned(),
                ("-incoming", _) => "fd:0".to_owned(),
                (_, true) if arg.contains("id=link") => {
                    "socket,id=link,path=link.sock,server=on,wait=off".to_owned()
                }
                (_, true) if arg.contains("id=qmp") => {
                    "socket,id=qmp,path=qmp.sock,server=on,wait=off".to_owned()
                }
                (_, true) => bail!("a socket that nobody knows: {arg}"),
                _ => arg.clone(),
            });
            before = arg;
        }
        Ok(own)
    }
}

/// When things had happened since the spawn.
pub(crate) struct Started {
    pub(crate) ready: Duration,
    pub(crate) first_command: Duration,
}

/// A QEMU that runs; dropping it ends it.
struct Bare {
    qemu: Child,
    dir: TempDir,
}

impl Drop for Bare {
    fn drop(&mut self) {
        if let Err(error) = self.qemu.kill().and_then(|()| self.qemu.wait().map(drop)) {
            eprintln!("could not end the bare QEMU: {error}");
        }
    }
}

/// Starts it, with a fresh disk, and ends it.
pub(crate) fn start(description: &Description) -> Result<Started> {
    let dir = TempDir::new()?;
    fs::create_dir(dir.path().join("logs"))?;
    make_disk(&dir.path().join("rootfs.ext4"), description.disk_bytes)?;
    let log = fs::File::create(dir.path().join("logs/qemu.log"))?;
    let program = description.argv.first().context("an empty argv")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let began = Instant::now();
    let stdin = match &description.snapshot {
        Some(memory) => fs::File::open(memory)?.into(),
        None => Stdio::null(),
    };
    let qemu = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", program])
        .args(description.arguments()?)
        .current_dir(dir.path())
        .stdin(stdin)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("setpriv")?;
    let bare = Bare { qemu, dir };
    let log = bare.dir.path().join("logs/qemu.log");
    let is_restored = description.snapshot.is_some();
    runtime.block_on(first_command(&bare, began, is_restored)).with_context(|| read(&log))
}

async fn first_command(bare: &Bare, began: Instant, is_restored: bool) -> Result<Started> {
    if is_restored {
        YamuxConnector.resume(bare, PATIENCE).await?;
    }
    let link = YamuxConnector.connect(bare, PATIENCE).await?;
    let ready = began.elapsed();
    link.configure(&GuestConfig {
        hostname: "bare".to_owned(),
        add_hosts: Vec::new(),
        dns_servers: Vec::new(),
        cpu_millis: 0,
        network: None,
    })
    .await?;
    let command = ExecSpec {
        argv: vec![b"true".to_vec()],
        env: vec![(b"PATH".to_vec(), b"/usr/bin:/bin".to_vec())],
        cwd: None,
        user: None,
        stdin: false,
        terminal: None,
        stop_signal: None,
    };
    let mut session = link.exec(&command).await?;
    while let Some(event) = session.events.recv().await {
        if let ExecEvent::Exited(status) = event? {
            ensure!(status == ExitStatus::Code(0), "`true` ended with {status:?}");
            return Ok(Started { ready, first_command: began.elapsed() });
        }
    }
    bail!("the command has no end")
}

#[async_trait]
impl Machine for Bare {
    /// Nobody identifies it.
    fn identity(&self) -> ProcessIdentity {
        ProcessIdentity { pid: 0, start_ticks: 0, boot_id: String::new() }
    }

    async fn open_link(&self) -> Result<UnixStream, HypervisorError> {
        let path = self.dir.path().join("link.sock");
        let began = Instant::now();
        loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => return Ok(stream),
                // QEMU has not made it yet.
                Err(_) if began.elapsed() < PATIENCE => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Err(source) => {
                    let doing = "connect to the bare QEMU".to_owned();
                    return Err(HypervisorError::Io { doing, source });
                }
            }
        }
    }

    async fn save(&self, _to: fs::File) -> Result<Saved, HypervisorError> {
        Err(HypervisorError::Control { what: "a bare QEMU is not saved".to_owned() })
    }

    async fn wait_exit(&self) -> MachineExit {
        std::future::pending().await
    }

    async fn kill(&self, _deadline: Duration) -> Result<(), HypervisorError> {
        // Dropping it does.
        Ok(())
    }

    fn console_tail(&self, _max_lines: usize) -> Result<Vec<String>, HypervisorError> {
        Ok(Vec::new())
    }
}

/// As the host crate makes them (`matchlock_host::rootfs`); it is not measured.
fn make_disk(path: &Path, bytes: u64) -> Result<()> {
    fs::File::create(path)?.set_len(bytes)?;
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1"])
        .arg(path)
        .output()
        .context("mke2fs")?;
    ensure!(output.status.success(), "mke2fs: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn read(path: &PathBuf) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| format!("{}: {error}", path.display()))
}
