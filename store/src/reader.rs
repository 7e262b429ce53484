//! Reading `state.db`: a pool of read-only connections, never blocked by whoever writes.
//!
//! # Invariants
//! * Looking has no side effects: no database is made, none is migrated, nothing can be written.
//!   (SQLite makes the empty `-wal` and the `-shm` beside a database that nobody has open, private
//!   like the database, and a reader cannot remove them again. They hold nothing.)
//! * Each answer is of one moment: one statement, or one transaction.
//!
//! # On error
//! A row that cannot be read is named. A future that is dropped lets its statement finish.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use deadpool_sqlite::{Config, Hook, HookError, Object, Pool, Runtime};
use jiff::Timestamp;
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::record::{LifecycleRecord, VmRecord, VmRemains, VmSummary};
use rusqlite::Connection;

use crate::busy::LOCK_WAIT;
use crate::connect::{self, Access};
use crate::error::{BadRow, OpenError, ReadError};
use crate::files::DbFiles;
use crate::migrate;
use crate::migrations;
use crate::open::STATE_DB;
use crate::rows::{lifecycle, vms};

const MOST_CONNECTIONS: usize = 4;

/// The read-only connections to `state.db`; clones share them.
///
/// To be used, and dropped, within a tokio runtime: the pool closes its connections on the
/// runtime's blocking threads, and panics where there is none.
#[derive(Debug, Clone)]
pub struct ReadPool {
    pool: Pool,
    path: Arc<Path>,
}

impl ReadPool {
    /// The readers of `state.db` in this directory; `None` if nothing was ever stored there.
    ///
    /// Looks at the database before it returns, so it may wait for a lock.
    ///
    /// # Errors
    /// When the database cannot be opened, or another version made it.
    pub fn open(home: &Path) -> Result<Option<Self>, OpenError> {
        let files = DbFiles::new(home, STATE_DB);
        if migrate::open_to_read(&files, migrations::STATE)?.is_none() {
            return Ok(None);
        }
        // deadpool opens with the default flags; the address says that nothing is to be written.
        let path = Arc::from(files.db.as_path());
        let address = PathBuf::from(connect::uri(&files.db, Access::ReadOnly));
        let pool = Config::new(address)
            .builder(Runtime::Tokio1)
            .map_err(|never| match never {})?
            .max_size(MOST_CONNECTIONS)
            .wait_timeout(Some(LOCK_WAIT))
            .post_create(Hook::async_fn(|object, _| {
                Box::pin(async move {
                    object
                        .interact(|conn| connect::prepare(conn, Access::ReadOnly))
                        .await
                        .map_err(|e| HookError::message(e.to_string()))?
                        .map_err(HookError::Backend)
                })
            }))
            .build()
            .map_err(|source| OpenError::Pool { path: files.db, source })?;
        Ok(Some(Self { pool, path }))
    }

    /// The VM's row.
    ///
    /// # Errors
    /// When it could not be read.
    pub async fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, ReadError> {
        self.read(move |conn| vms::find(conn, vm)).await
    }

    /// All VMs, newest first; those that cannot be read each with its own error, last.
    ///
    /// # Errors
    /// When none could be read.
    pub async fn vms(&self) -> Result<Vms, ReadError> {
        self.read(vms::all).await
    }

    /// As [`Self::vms`], and what tells later whether they are still so.
    ///
    /// # Errors
    /// When none could be read.
    pub async fn look_at_vms(&self) -> Result<(Vms, VmsLook), ReadError> {
        let object = self.pool.get().await.map_err(|source| ReadError::Pool { source })?;
        // The version first: a change that comes between is seen as one.
        let query = |conn: &Connection| Ok((data_version(conn)?, vms::all(conn)?));
        let (version, vms) = interact(&object, &self.path, query).await?;
        Ok((vms, VmsLook { object, path: Arc::clone(&self.path), version }))
    }

    /// The ids of all VMs; whatever else their rows say need not be readable.
    ///
    /// # Errors
    /// When none could be read.
    pub async fn vm_ids(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        self.read(vms::ids).await
    }

    /// The VMs that somebody wants removed and that are still there.
    ///
    /// # Errors
    /// When none could be read.
    pub async fn vms_to_remove(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        self.read(vms::to_remove).await
    }

    /// What cleaning the VM up needs to know of it.
    ///
    /// # Errors
    /// When that could not be read; what else of its rows cannot be is no error.
    pub async fn remains(&self, vm: VmId) -> Result<Option<VmRemains>, ReadError> {
        self.read(move |conn| vms::remains(conn, vm)).await
    }

    /// Of how many removed VMs a prune would drop the history, were it asked now.
    ///
    /// # Errors
    /// When that could not be read.
    pub async fn forgettable(&self, before: Timestamp) -> Result<usize, ReadError> {
        Ok(self.read(move |conn| lifecycle::forgettable(conn, before)).await?.0.len())
    }

    /// Whether any VM, removed or not, has or may have had a network, as far as history is kept.
    ///
    /// # Errors
    /// When that could not be read.
    pub async fn any_network(&self) -> Result<bool, ReadError> {
        self.read(lifecycle::any_network).await
    }

    /// Which owner the VM has; `None` when it has no row.
    ///
    /// # Errors
    /// When it could not be read.
    pub async fn owner_epoch(&self, vm: VmId) -> Result<Option<OwnerEpoch>, ReadError> {
        self.read(move |conn| vms::owner_epoch(conn, vm)).await
    }

    /// The VM's latest lifecycle row.
    ///
    /// # Errors
    /// When it could not be read.
    pub async fn lifecycle_head(&self, vm: VmId) -> Result<Option<LifecycleRecord>, ReadError> {
        self.read(move |conn| lifecycle::head(conn, vm)).await
    }

    /// All lifecycle rows of a VM, removed or not, oldest first.
    ///
    /// # Errors
    /// When they could not be read.
    pub async fn history(&self, vm: VmId) -> Result<Vec<LifecycleRecord>, ReadError> {
        self.read(move |conn| lifecycle::history(conn, vm)).await
    }

    /// The VM's row, and all its lifecycle rows, oldest first, both of the same moment.
    ///
    /// # Errors
    /// When they could not be read.
    pub async fn vm_and_history(
        &self,
        vm: VmId,
    ) -> Result<(Option<VmRecord>, Vec<LifecycleRecord>), ReadError> {
        self.read(move |conn| {
            let moment = conn.unchecked_transaction()?;
            let answer = (vms::find(&moment, vm)?, lifecycle::history(&moment, vm)?);
            moment.commit()?;
            Ok(answer)
        })
        .await
    }

    async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, ReadError> {
        let object = self.pool.get().await.map_err(|source| ReadError::Pool { source })?;
        interact(&object, &self.path, query).await
    }
}

/// All VMs, newest first; those that cannot be read each with its own error, last.
pub type Vms = Vec<Result<VmSummary, BadRow>>;

/// A look at all VMs, which can be had again.
#[derive(Debug)]
pub struct VmsLook {
    /// Only the connection that looked knows what was changed by others since.
    object: Object,
    path: Arc<Path>,
    version: i64,
}

impl VmsLook {
    /// The VMs as they are now; `None` when nothing at all has changed in the database.
    ///
    /// # Errors
    /// When none could be read.
    pub async fn again(self) -> Result<Option<Vms>, ReadError> {
        let before = self.version;
        let query = move |conn: &Connection| {
            (data_version(conn)? != before).then(|| vms::all(conn)).transpose()
        };
        interact(&self.object, &self.path, query).await
    }
}

/// A number that is another once somebody else has committed something.
fn data_version(conn: &Connection) -> rusqlite::Result<i64> {
    conn.pragma_query_value(None, "data_version", |row| row.get(0))
}

async fn interact<T: Send + 'static>(
    object: &Object,
    path: &Path,
    query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
) -> Result<T, ReadError> {
    let read = object.interact(move |conn| query(conn)).await;
    read.map_err(|source| ReadError::Interrupted { source })?.map_err(|e| ReadError::of(path, e))
}

/// One read-only connection that reads on its caller's thread: for whoever may block, and for
/// simulations, which no second thread must disturb.
#[derive(Debug)]
pub struct ReadConn {
    conn: Connection,
    path: PathBuf,
}

impl ReadConn {
    /// As [`ReadPool::open`].
    ///
    /// # Errors
    /// As [`ReadPool::open`].
    pub fn open(home: &Path) -> Result<Option<Self>, OpenError> {
        let files = DbFiles::new(home, STATE_DB);
        let conn = migrate::open_to_read(&files, migrations::STATE)?;
        Ok(conn.map(|conn| Self { conn, path: files.db }))
    }

    /// As [`ReadPool::vm`].
    ///
    /// # Errors
    /// When it could not be read.
    pub fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, ReadError> {
        self.answer(vms::find(&self.conn, vm))
    }

    /// As [`ReadPool::vms`].
    ///
    /// # Errors
    /// When none could be read.
    pub fn vms(&self) -> Result<Vms, ReadError> {
        self.answer(vms::all(&self.conn))
    }

    /// As [`ReadPool::vm_ids`].
    ///
    /// # Errors
    /// When none could be read.
    pub fn vm_ids(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        self.answer(vms::ids(&self.conn))
    }

    /// As [`ReadPool::vms_to_remove`].
    ///
    /// # Errors
    /// When none could be read.
    pub fn vms_to_remove(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        self.answer(vms::to_remove(&self.conn))
    }

    /// As [`ReadPool::remains`].
    ///
    /// # Errors
    /// When that could not be read.
    pub fn remains(&self, vm: VmId) -> Result<Option<VmRemains>, ReadError> {
        self.answer(vms::remains(&self.conn, vm))
    }

    /// As [`ReadPool::any_network`].
    ///
    /// # Errors
    /// When that could not be read.
    pub fn any_network(&self) -> Result<bool, ReadError> {
        self.answer(lifecycle::any_network(&self.conn))
    }

    /// As [`ReadPool::owner_epoch`].
    ///
    /// # Errors
    /// When it could not be read.
    pub fn owner_epoch(&self, vm: VmId) -> Result<Option<OwnerEpoch>, ReadError> {
        self.answer(vms::owner_epoch(&self.conn, vm))
    }

    /// As [`ReadPool::lifecycle_head`].
    ///
    /// # Errors
    /// When it could not be read.
    pub fn lifecycle_head(&self, vm: VmId) -> Result<Option<LifecycleRecord>, ReadError> {
        self.answer(lifecycle::head(&self.conn, vm))
    }

    /// As [`ReadPool::history`].
    ///
    /// # Errors
    /// When they could not be read.
    pub fn history(&self, vm: VmId) -> Result<Vec<LifecycleRecord>, ReadError> {
        self.answer(lifecycle::history(&self.conn, vm))
    }

    fn answer<T>(&self, read: rusqlite::Result<T>) -> Result<T, ReadError> {
        read.map_err(|e| ReadError::of(&self.path, e))
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::error::DbFault;
    use crate::open_state;

    #[tokio::test]
    async fn readers_cannot_write_whatever_they_try() {
        let home = TempDir::new().unwrap();
        let _writer = open_state(home.path()).unwrap();
        let pool = ReadPool::open(home.path()).unwrap().unwrap();
        let attempts = [
            "DELETE FROM vms",
            "PRAGMA query_only = OFF; DELETE FROM vms",
            "CREATE TABLE x (y)",
            "PRAGMA query_only = OFF; DROP TABLE vms",
        ];
        for sql in attempts {
            let refused = pool.read(move |conn| conn.execute_batch(sql)).await;
            let Err(ReadError::Database { fault, path, .. }) = refused else {
                panic!("{sql}: {refused:?}");
            };
            assert_eq!(path, home.path().join(STATE_DB));
            assert_eq!(fault, DbFault::ReadOnly, "{sql}");
        }
    }

    #[tokio::test]
    async fn each_connection_is_prepared() {
        let home = TempDir::new().unwrap();
        let _writer = open_state(home.path()).unwrap();
        let pool = ReadPool::open(home.path()).unwrap().unwrap();
        let query_only: bool = pool
            .read(|conn| conn.pragma_query_value(None, "query_only", |row| row.get(0)))
            .await
            .unwrap();
        assert!(query_only);
    }

    #[tokio::test]
    async fn a_panic_while_reading_is_an_error_and_the_pool_goes_on() {
        let home = TempDir::new().unwrap();
        let _writer = open_state(home.path()).unwrap();
        let pool = ReadPool::open(home.path()).unwrap().unwrap();
        for _ in 0..2 * MOST_CONNECTIONS {
            let read = pool.read::<()>(|_| panic!("on purpose")).await;
            assert!(matches!(read, Err(ReadError::Interrupted { .. })), "{read:?}");
        }
        assert!(pool.vms().await.unwrap().is_empty());
    }
}
