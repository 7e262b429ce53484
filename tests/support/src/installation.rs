//! An installation of a test's own.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::bundles::copy_bundle;
use crate::host::Remains;
use crate::running::{Running, wait_until};

fn variable(name: &str) -> Result<PathBuf> {
    std::env::var_os(name)
        .map(PathBuf::from)
        .with_context(|| format!("{name} is not set: run the tests with `make test`"))
}

/// The program under test.
///
/// # Errors
/// When the environment does not say which.
pub fn program() -> Result<PathBuf> {
    variable("MATCHLOCK_TEST_BIN")
}

/// The archive of the busybox image.
///
/// # Errors
/// When the environment does not say where.
pub fn busybox_archive() -> Result<PathBuf> {
    variable("MATCHLOCK_TEST_BUSYBOX")
}

/// The files of a small Debian, packed; it lies beside the busybox image.
///
/// # Errors
/// When it was not made.
pub fn debian_archive() -> Result<File> {
    let path = busybox_archive()?.with_file_name("debian.tar");
    File::open(&path)
        .with_context(|| format!("{0}: run scripts/debian-image.sh {0}", path.display()))
}

/// An installation of a test's own: its state directory, and the shared cache.
#[derive(Debug)]
pub struct Installation {
    dir: TempDir,
    cache: PathBuf,
}

impl Installation {
    /// A new one, with the `busybox` image at hand.
    ///
    /// # Errors
    /// When the environment of `make test` is missing or the image cannot be imported.
    pub fn new() -> Result<Self> {
        let cache = variable("MATCHLOCK_TEST_CACHE")?;
        let installation =
            Self { dir: tempfile::Builder::new().prefix("mltest").tempdir()?, cache };
        installation.ensure_busybox()?;
        Ok(installation)
    }

    /// A new one with an empty cache of its own: no guest, no images.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn bare() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("mltest").tempdir()?;
        let cache = dir.path().join("cache");
        Ok(Self { dir, cache })
    }

    /// A new one with a cache of its own that has the guest bundle, and no images.
    ///
    /// # Errors
    /// When the environment of `make test` is missing.
    pub fn without_images() -> Result<Self> {
        let bare = Self::bare()?;
        let shared = variable("MATCHLOCK_TEST_CACHE")?;
        std::fs::create_dir_all(&bare.cache)?;
        std::os::unix::fs::symlink(shared.join("guest"), bare.cache.join("guest"))?;
        Ok(bare)
    }

    /// A new one with a cache of its own that has a copy of this guest bundle of the shared one as the
    /// default, and the `busybox` image.
    ///
    /// # Errors
    /// When the environment of `make test` is missing, or there is no such bundle.
    pub fn with_own_bundle(version: &str) -> Result<Self> {
        let bare = Self::bare()?;
        copy_bundle(&variable("MATCHLOCK_TEST_CACHE")?, &bare.cache, version)?;
        bare.ensure_busybox()?;
        Ok(bare)
    }

    /// A new one with a cache of its own that has a copy of the default guest bundle, and the `busybox`
    /// image: what is made in it is nobody else's.
    ///
    /// # Errors
    /// When the environment of `make test` is missing.
    pub fn with_own_cache() -> Result<Self> {
        let bundles = Self::new()?.bundles()?;
        let default = bundles.into_iter().find(|(_, _, is_default)| *is_default);
        Self::with_own_bundle(&default.context("no default bundle")?.0)
    }

    /// The names of all that is in the directory of snapshots, also of what is half-made.
    ///
    /// # Errors
    /// When it could not be looked at.
    pub fn snapshots(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let dir = match std::fs::read_dir(self.cache.join("snapshots")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(names),
            dir => dir?,
        };
        for entry in dir {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    /// Waits until a snapshot is shown, and nothing half-made is there any more.
    ///
    /// # Errors
    /// When none is in time.
    pub fn wait_for_snapshot(&self) -> Result<()> {
        wait_until(Duration::from_secs(180), "a snapshot", || {
            let names = self.snapshots()?;
            Ok(!names.is_empty() && names.iter().all(|name| !name.starts_with('.')))
        })
    }

    /// Waits until somebody has begun to make a snapshot.
    ///
    /// # Errors
    /// When nobody has in time.
    pub fn wait_for_template(&self) -> Result<()> {
        wait_until(Duration::from_secs(180), "a template", || {
            Ok(self.snapshots()?.iter().any(|name| name == ".new"))
        })
    }

    /// The guest bundles that `guest ls --json` shows: version, kernel release, whether it is the default.
    ///
    /// # Errors
    /// When the list is no list, or one is damaged.
    pub fn bundles(&self) -> Result<Vec<(String, String, bool)>> {
        let output = self.output(&["guest", "ls", "--json"])?;
        ensure!(output.status.success(), "guest ls failed: {}", stderr(&output));
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let bundles = shown.as_array().context("guest ls --json printed no array")?;
        let mut found = Vec::new();
        for bundle in bundles {
            ensure!(bundle["status"] == "ok", "{bundle}");
            let text = |key: &str| bundle[key].as_str().unwrap_or("?").to_owned();
            found.push((text("version"), text("kernel_release"), bundle["default"] == true));
        }
        Ok(found)
    }

    /// The state directory.
    #[must_use]
    pub fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    /// The cache directory.
    #[must_use]
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Once for all tests: whoever comes first imports, the others wait for the lock.
    fn ensure_busybox(&self) -> Result<()> {
        let lock = File::create(self.cache.join("test-import.lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let listed = self.output(&["image", "ls"])?;
        if String::from_utf8_lossy(&listed.stdout).lines().any(|l| l.starts_with("busybox ")) {
            return Ok(());
        }
        let archive = File::open(busybox_archive()?)?;
        let imported = self.command(&["image", "import", "busybox"])?.stdin(archive).output()?;
        ensure!(imported.status.success(), "import failed: {}", stderr(&imported));
        Ok(())
    }

    /// The program with these arguments and this installation's environment, and no stdin.
    ///
    /// # Errors
    /// When the environment does not name the program.
    pub fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(program()?);
        self.prepare(command.args(args));
        Ok(command)
    }

    /// Gives a command that starts the program this installation's environment, and no stdin. It makes no
    /// snapshots by itself: most tests are about boots.
    pub fn prepare<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("MATCHLOCK_HOME", self.home())
            .env("MATCHLOCK_CACHE", &self.cache)
            .env_remove("MATCHLOCK_KERNEL")
            .env_remove("MATCHLOCK_INITRAMFS")
            .env_remove("MATCHLOCK_QEMU")
            .env_remove("MATCHLOCK_HYPERVISOR")
            .env_remove("MATCHLOCK_LOG")
            .env_remove("MATCHLOCK_SUBNET_POOL")
            .env("MATCHLOCK_AUTO_WARM", "0")
            .stdin(Stdio::null())
    }

    /// Runs the program to its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        Ok(self.command(args)?.output()?)
    }

    /// Starts the program.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, args: &[&str]) -> Result<Running> {
        let mut command = self.command(args)?;
        Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    /// `run` of the busybox image, quietly without network.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, flags: &[&str], command: &[&str]) -> Result<Output> {
        self.output(&run_args(flags, command))
    }

    /// Starts `run` of the busybox image.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_run(&self, flags: &[&str], command: &[&str]) -> Result<Running> {
        self.start(&run_args(flags, command))
    }

    /// The VMs that `list --json` shows: id and status.
    ///
    /// # Errors
    /// When the list is no list.
    pub fn list(&self) -> Result<Vec<(String, String)>> {
        let output = self.output(&["list", "--json"])?;
        ensure!(output.status.success(), "list failed: {}", stderr(&output));
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let text = |vm: &serde_json::Value, key: &str| vm[key].as_str().unwrap_or("?").to_owned();
        let vms = shown.as_array().context("list --json printed no array")?;
        Ok(vms.iter().map(|vm| (text(vm, "id"), text(vm, "status"))).collect())
    }

    /// Waits until exactly one VM has this status, and returns its id.
    ///
    /// # Errors
    /// When there is none in time.
    pub fn wait_for_status(&self, status: &str) -> Result<String> {
        let mut found = None;
        wait_until(Duration::from_secs(120), &format!("a VM that is {status}"), || {
            found = self.list()?.into_iter().find(|(_, shown)| shown == status).map(|(id, _)| id);
            Ok(found.is_some())
        })?;
        found.context("it was just there")
    }

    /// The phases in a VM's history, in order.
    ///
    /// # Errors
    /// When sqlite3 is missing or fails.
    pub fn phases(&self, vm: &str) -> Result<Vec<String>> {
        let query = format!("select phase from vm_lifecycle where vm_id='{vm}' order by version");
        let mut phases: Vec<String> = self.sql(&query)?.lines().map(str::to_owned).collect();
        phases.dedup();
        Ok(phases)
    }

    /// Asks the state database as the runbook does: with `sqlite3`.
    ///
    /// # Errors
    /// When sqlite3 is missing or fails.
    pub fn sql(&self, query: &str) -> Result<String> {
        let db = self.home().join("state.db");
        // After a space: a comment at the start would be taken for an option.
        let query = format!(" {query}");
        // Whoever closes the database last holds a lock for a moment.
        let mut command = Command::new("sqlite3");
        command.args(["-cmd", ".timeout 10000"]).arg(db).arg(query);
        let output = command.output().context("sqlite3")?;
        if !output.status.success() {
            bail!("sqlite3: {}", stderr(&output));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// What this installation still has on the host.
    ///
    /// # Errors
    /// When it could not be looked at.
    pub fn remains(&self) -> Result<Remains> {
        Remains::of(&self.home())
    }

    /// Fails if anything of a VM is left: processes, files, rows.
    ///
    /// # Errors
    /// What is left.
    pub fn assert_nothing_left(&self) -> Result<()> {
        let remains = self.remains()?;
        ensure!(remains.is_empty(), "left behind: {remains:#?}");
        let rows = self.sql("select id from vms")?;
        ensure!(rows.is_empty(), "left in the table vms: {rows}");
        Ok(())
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        // A test that failed half-way must not leave its VMs to the next.
        if let Ok(remains) = self.remains() {
            remains.kill_processes();
        }
    }
}

fn run_args<'a>(flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["run", "--no-network", "--image", "busybox"];
    args.extend(flags);
    args.push("--");
    args.extend(command);
    args
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
