//! Boot and shutdown, in order.
//!
//! ```text
//! NodeConfig ─ open ─► Opened (home, install-id, state.db migrated) ─ supervise ─► Node
//! ```
//!
//! Each step consumes the one before. A failure in `open` leaves at most the state directory and
//! its database; nothing of a VM exists before the tree does.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use matchlock_actors::db_writer::{DbWriterArgs, OpenStore, QUEUE_WAIT, ThreadSlot, join_thread};
use matchlock_actors::deps::Deps;
use matchlock_actors::images::ImagesArgs;
use matchlock_actors::root::{Root, RootArgs, RootMsg, Slots};
use matchlock_host::guest_link::ExecSession;
use matchlock_host::image::ImageDirs;
use matchlock_host::vm_log::LogLimits;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{InstallId, VmId};
use matchlock_model::vm::StopMode;
use matchlock_store::{ReadPool, WriteConn, open_state};
use ractor::{Actor, ActorRef};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::client::NodeClient;
use super::config::NodeConfig;
use super::output_log::{self, Audience, KeptOutput};
use super::warming::Warming;
use super::wiring;
use crate::points::{HOME, injected};

/// How long the services may take to end.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);

/// How long others who asked for a VM's end may take to be told, once it has come.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// The state directory with its database, open.
#[derive(Debug)]
pub struct Opened {
    config: NodeConfig,
    install: InstallId,
    conn: WriteConn,
    reader: ReadPool,
}

/// The actor tree of this process.
#[derive(Debug)]
pub struct Node {
    client: NodeClient,
    warming: Warming,
    vm_log: LogLimits,
    deps: Deps,
    root: ActorRef<RootMsg>,
    joined: JoinHandle<()>,
    writer: ThreadSlot,
    /// Of others, which are not answered yet.
    kills: TaskTracker,
}

fn failed(error: &(dyn std::error::Error + 'static), doing: &str) -> Failure {
    Failure::from_error(FailureKind::Host, error).context(doing)
}

impl Opened {
    /// Makes the state directory if it is missing, reads the installation's id, opens and
    /// migrates the database.
    ///
    /// # Errors
    /// What is wrong with the directory or the database.
    pub fn open(config: NodeConfig) -> Result<Self, Failure> {
        let home = &config.home;
        HOME.before("open_state").map_err(injected)?;
        let conn = open_state(home).map_err(|e| failed(&e, "could not open the state"))?;
        HOME.after("open_state").map_err(injected)?;
        let install = install_id(home).map_err(|e| {
            failed(&e, &format!("could not use {}", home.join(INSTALL_ID_FILE).display()))
        })?;
        HOME.before("vms_dir").map_err(injected)?;
        make_dir(&config.vms_dir())
            .map_err(|e| failed(&e, &format!("could not make {}", config.vms_dir().display())))?;
        HOME.after("vms_dir").map_err(injected)?;
        let reader = ReadPool::open(home)
            .map_err(|e| failed(&e, "could not read the state"))?
            .ok_or_else(|| Failure::new(FailureKind::Internal, "the state has just vanished"))?;
        Ok(Self { config, install, conn, reader })
    }

    /// Starts the tree.
    ///
    /// # Errors
    /// When a service cannot be started.
    pub async fn supervise(self) -> Result<Node, Failure> {
        let Self { config, install, conn, reader } = self;
        let slots = Slots::default();
        let services = slots.services();
        let kills = TaskTracker::new();
        let deps = wiring::deps(&config, install, reader, &services, &kills)?;
        let writer = ThreadSlot::default();
        let vm_log = config.vm_log;
        let args = RootArgs {
            slots,
            db_writer: DbWriterArgs {
                open: open_again(config.home.clone(), conn),
                thread: Arc::clone(&writer),
                queue_wait: QUEUE_WAIT,
            },
            deps: deps.clone(),
            images: ImagesArgs {
                dirs: ImageDirs::new(&config.cache),
                limits: config.image_limits,
                registries: config.registries.clone(),
                now: jiff::Timestamp::now,
            },
        };
        let (root, joined) = Actor::spawn(None, Root, args)
            .await
            .map_err(|e| failed(&e, "could not start the services"))?;
        let client = NodeClient::new(services);
        let warming = Warming::new(client.clone(), config.auto_warm);
        Ok(Node { client, warming, vm_log, deps, root, joined, writer, kills })
    }
}

/// The first life of the writer gets the connection that is open already.
fn open_again(home: std::path::PathBuf, conn: WriteConn) -> OpenStore {
    let first = Mutex::new(Some(conn));
    Arc::new(move || match first.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(conn) => Ok(Box::new(conn)),
        None => Ok(Box::new(open_state(&home)?)),
    })
}

impl Node {
    /// Boots a node.
    ///
    /// # Errors
    /// As [`Opened::open`] and [`Opened::supervise`].
    pub async fn boot(config: NodeConfig) -> Result<Self, Failure> {
        Opened::open(config)?.supervise().await
    }

    /// The way to it.
    #[must_use]
    pub const fn client(&self) -> &NodeClient {
        &self.client
    }

    /// What makes snapshots beside its VMs.
    #[must_use]
    pub const fn warming(&self) -> &Warming {
        &self.warming
    }

    /// What its actors have of this host.
    #[must_use]
    pub const fn deps(&self) -> &Deps {
        &self.deps
    }

    /// The same session of a VM's own command, of which the output is also written to the VM's log.
    #[must_use]
    pub fn keep_output(
        &self,
        session: ExecSession,
        vm: VmId,
        audience: Audience,
    ) -> (ExecSession, KeptOutput) {
        output_log::keep(session, vm, self.deps.paths(vm), self.vm_log, audience)
    }

    /// Takes all VMs down and ends the services; the last write is on disk when it returns.
    ///
    /// # Errors
    /// When something did not end in time.
    pub async fn shutdown(self, mode: StopMode) -> Result<(), Failure> {
        self.warming.end();
        self.client.stop_all(mode).await?;
        self.warming.ended().await;
        self.kills.close();
        if timeout(ANSWER_LIMIT, self.kills.wait()).await.is_err() {
            tracing::warn!("somebody who asked for a VM's end was not told of it");
        }
        let message = |reply| RootMsg::Shutdown { reply };
        let answered = self.root.call(message, Some(SHUTDOWN_LIMIT)).await;
        if !matches!(answered, Ok(ractor::rpc::CallResult::Success(()))) {
            return Err(Failure::new(FailureKind::Internal, "the services did not end in time"));
        }
        self.joined.await.map_err(|e| Failure::from_error(FailureKind::Internal, &e))?;
        Ok(join_thread(&self.writer).await?)
    }
}

/// The id of the installation in this directory; `None` if it has none yet. Makes none.
///
/// # Errors
/// When it cannot be read, or is none.
pub fn existing_install_id(home: &Path) -> Result<Option<InstallId>, Failure> {
    let path = home.join(INSTALL_ID_FILE);
    match read_install_id(&path) {
        Ok(id) => Ok(Some(id)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(&error, &format!("could not use {}", path.display()))),
    }
}

const INSTALL_ID_FILE: &str = "install-id";

fn make_dir(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result,
    }
}

/// Reads the installation's id, or makes it: written aside and linked into place, so that of two
/// processes that make it at once one wins and both read the same. What a killed one left aside is
/// removed by the next.
fn install_id(home: &Path) -> io::Result<InstallId> {
    let path = home.join(INSTALL_ID_FILE);
    let id = match read_install_id(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => make_install_id(home, &path)?,
        id => id?,
    };
    for entry in std::fs::read_dir(home)? {
        let name = entry?.file_name();
        let aside = name.to_str().and_then(|name| name.strip_prefix(INSTALL_ID_FILE));
        if aside.is_some_and(|aside| aside.starts_with('.')) {
            remove(&home.join(name))?;
        }
    }
    Ok(id)
}

fn make_install_id(home: &Path, path: &Path) -> io::Result<InstallId> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let id = InstallId::from_bytes(random);
    let aside = home.join(format!("{INSTALL_ID_FILE}.{id}"));
    HOME.before("write_id")?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
    HOME.after("write_id")?;
    HOME.before("link_id")?;
    let linked = file
        .write_all(format!("{id}\n").as_bytes())
        .and_then(|()| std::fs::hard_link(&aside, path));
    HOME.after("link_id")?;
    HOME.before("unlink_id")?;
    remove(&aside)?;
    HOME.after("unlink_id")?;
    match linked {
        // Another process was first. If it is `NotFound`, that one has removed ours already.
        Err(error)
            if !matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) =>
        {
            Err(error)
        }
        _ => read_install_id(path),
    }
}

/// Removes a file; one that is gone already is fine.
fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn read_install_id(path: &Path) -> io::Result<InstallId> {
    let mut text = String::new();
    OpenOptions::new().read(true).open(path)?.take(64).read_to_string(&mut text)?;
    text.trim_end().parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installation_keeps_its_id() {
        let home = tempfile::tempdir().unwrap();
        let first = install_id(home.path()).unwrap();
        assert_eq!(install_id(home.path()).unwrap(), first);
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_process_left_aside_is_removed_by_the_next() {
        let home = tempfile::tempdir().unwrap();
        let aside = home.path().join(format!("{INSTALL_ID_FILE}.0011223344556677"));
        for _ in 0..2 {
            std::fs::write(&aside, "half").unwrap();
            install_id(home.path()).unwrap();
            assert!(!aside.try_exists().unwrap());
        }
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn many_processes_that_make_it_agree() {
        let home = tempfile::tempdir().unwrap();
        let made: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| install_id(home.path()).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(made.windows(2).all(|pair| pair[0] == pair[1]), "{made:?}");
    }

    #[test]
    fn a_damaged_id_is_refused_not_replaced() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join(INSTALL_ID_FILE), "nonsense\n").unwrap();
        assert_eq!(install_id(home.path()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
