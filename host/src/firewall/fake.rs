//! A firewall in memory, for tests of what is built on [`Firewall`].

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use matchlock_model::id::{InstallId, Mark};
use matchlock_model::identity::ProcessIdentity;

use super::{
    Firewall, FirewallError, FirewallHandle, FirewallSpec, Held, ObservedFirewall, ObservedTable,
    Obstacle, filter_table, is_alike, nat_table,
};
use crate::fault::{Fault, Faults, disturbed};

/// An operation of [`Firewall`], to be disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FirewallOp {
    /// [`Firewall::apply`].
    Apply,
    /// [`Firewall::release`].
    Release,
    /// [`Firewall::observe`].
    Observe,
    /// [`Firewall::list_marked`].
    ListMarked,
    /// [`Firewall::list_alike`].
    ListAlike,
    /// [`Firewall::remove`] and [`Firewall::remove_from`].
    Remove,
    /// [`Firewall::obstacles`].
    Obstacles,
}

/// How often a removal looks again whether the tables' owner has ended.
const OWNER_TRIES: usize = 20;

const OWNER_PAUSE: Duration = Duration::from_millis(10);

/// A host's tables in memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct FakeFirewall {
    state: Arc<Mutex<State>>,
    /// Whose sockets hold what is made here.
    process: Option<ProcessIdentity>,
}

#[derive(Debug, Default)]
struct State {
    tables: BTreeMap<String, Table>,
    last_owner: u64,
    plain: bool,
    obstacles: Vec<Obstacle>,
    ip_forward: bool,
    faults: Faults<FirewallOp>,
}

#[derive(Debug)]
struct Table {
    shown: ObservedTable,
    owner: Option<u64>,
    holder: Option<ProcessIdentity>,
    spec: Option<FirewallSpec>,
}

/// Stands for the netlink socket: its tables go with it.
#[derive(Debug)]
pub(super) struct Keeper {
    state: Arc<Mutex<State>>,
    owner: u64,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.tables.retain(|_, table| table.owner != Some(self.owner));
    }
}

/// The names of a TAP's tables, filter first.
fn names(tap: &str) -> [String; 2] {
    [format!("inet {}", filter_table(tap)), format!("ip {}", nat_table(tap))]
}

impl State {
    fn existing(&self, tap: &str) -> impl Iterator<Item = &Table> {
        names(tap).into_iter().filter_map(|name| self.tables.get(&name))
    }

    fn require_mark(&self, tap: &str, mark: &Mark) -> Result<(), FirewallError> {
        match self.existing(tap).find(|table| table.shown.mark.as_ref() != Some(mark)) {
            None => Ok(()),
            Some(Table { shown, .. }) => {
                let (table, comment) = (shown.name.clone(), shown.comment.clone());
                Err(FirewallError::NotOurs { table, comment, expected: mark.clone() })
            }
        }
    }

    /// `through` is the process whose socket is used.
    fn require_no_owner(
        &self,
        tap: &str,
        through: Option<&ProcessIdentity>,
    ) -> Result<(), FirewallError> {
        let stands_in_the_way = |table: &&Table| {
            table.owner.is_some() && (through.is_none() || table.holder.as_ref() != through)
        };
        match self.existing(tap).find(stands_in_the_way) {
            None => Ok(()),
            Some(table) => Err(FirewallError::OwnerLives { table: table.shown.name.clone() }),
        }
    }

    fn write(&mut self, spec: &FirewallSpec, owner: Option<u64>, holder: Option<&ProcessIdentity>) {
        for name in names(&spec.tap) {
            let shown = ObservedTable {
                name: name.clone(),
                comment: Some(spec.mark.to_string()),
                mark: Some(spec.mark.clone()),
                owned: owner.is_some(),
            };
            let (holder, spec) = (holder.cloned(), Some(spec.clone()));
            self.tables.insert(name, Table { shown, owner, holder, spec });
        }
    }

    fn apply(
        &mut self,
        spec: &FirewallSpec,
        holder: Option<&ProcessIdentity>,
    ) -> Result<Option<u64>, FirewallError> {
        self.require_mark(&spec.tap, &spec.mark)?;
        self.require_no_owner(&spec.tap, None)?;
        self.last_owner += 1;
        let owner = (!self.plain).then_some(self.last_owner);
        self.write(spec, owner, holder);
        Ok(owner)
    }

    fn remove(
        &mut self,
        tap: &str,
        mark: &Mark,
        through: Option<&ProcessIdentity>,
    ) -> Result<(), FirewallError> {
        self.require_mark(tap, mark)?;
        self.require_no_owner(tap, through)?;
        for name in names(tap) {
            self.tables.remove(&name);
        }
        Ok(())
    }
}

impl FakeFirewall {
    /// A host without tables, whose kernel knows the owner flag and does not forward.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same without the owner flag.
    #[must_use]
    pub fn with_plain_tables() -> Self {
        let fake = Self::default();
        fake.state().plain = true;
        fake
    }

    /// The same host, as another process sees it: what it makes, its sockets hold.
    #[must_use]
    pub fn in_process(&self, process: ProcessIdentity) -> Self {
        Self { process: Some(process), ..self.clone() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Disturbs an operation from now on, or (with `None`) no longer.
    pub fn set_fault(&self, op: FirewallOp, fault: Option<Fault>) {
        self.state().faults.set(op, fault);
    }

    /// The operations so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<FirewallOp> {
        self.state().faults.calls()
    }

    /// The names of the tables that exist, with their families.
    #[must_use]
    pub fn existing(&self) -> Vec<String> {
        self.state().tables.keys().cloned().collect()
    }

    /// What a TAP's tables were made of.
    #[must_use]
    pub fn applied(&self, tap: &str) -> Option<FirewallSpec> {
        self.state().existing(tap).find_map(|table| table.spec.clone())
    }

    /// The process that owns a TAP's tables has ended: they are gone, whoever still has the handle.
    /// Plain tables stay.
    pub fn end_owner(&self, tap: &str) {
        let mut state = self.state();
        for name in names(tap) {
            if state.tables.get(&name).is_some_and(|table| table.owner.is_some()) {
                state.tables.remove(&name);
            }
        }
    }

    /// Makes a table that nobody owns; `name` with its family.
    pub fn add_table(&self, name: &str, comment: Option<&str>) {
        let shown = ObservedTable {
            name: name.to_owned(),
            comment: comment.map(str::to_owned),
            mark: comment.and_then(Mark::parse),
            owned: false,
        };
        self.state()
            .tables
            .insert(name.to_owned(), Table { shown, owner: None, holder: None, spec: None });
    }

    /// Puts something in the guests' way.
    pub fn add_obstacle(&self, obstacle: Obstacle) {
        self.state().obstacles.push(obstacle);
    }

    async fn run<T>(
        &self,
        op: FirewallOp,
        work: impl FnOnce(&mut State) -> Result<T, FirewallError> + Send,
    ) -> Result<T, FirewallError> {
        let fault = self.state().faults.begin(op);
        let failed = |source: io::Error| FirewallError::of("work on the tables", source);
        disturbed(fault, || work(&mut self.state()), failed).await
    }

    fn handle(&self, spec: &FirewallSpec, owner: Option<u64>) -> FirewallHandle {
        let held = owner.map_or(Held::Nothing, |owner| Held::Fake {
            _keeper: Keeper { state: Arc::clone(&self.state), owner },
        });
        FirewallHandle { tap: spec.tap.clone(), mark: spec.mark.clone(), held }
    }
}

#[async_trait]
impl Firewall for FakeFirewall {
    async fn apply(&self, spec: &FirewallSpec) -> Result<FirewallHandle, FirewallError> {
        self.run(FirewallOp::Apply, |state| {
            state.apply(spec, self.process.as_ref()).map(|owner| self.handle(spec, owner))
        })
        .await
    }

    async fn release(&self, handle: FirewallHandle) -> Result<(), FirewallError> {
        let FirewallHandle { tap, mark, held } = handle;
        drop(held);
        self.run(FirewallOp::Release, |state| state.remove(&tap, &mark, None)).await
    }

    async fn observe(&self, tap: &str) -> Result<ObservedFirewall, FirewallError> {
        self.run(FirewallOp::Observe, |state| {
            let [filter, nat] = names(tap);
            let shown = |name| state.tables.get(&name).map(|table| table.shown.clone());
            Ok(ObservedFirewall { filter: shown(filter), nat: shown(nat) })
        })
        .await
    }

    async fn list_marked(&self, install: &InstallId) -> Result<Vec<ObservedTable>, FirewallError> {
        self.run(FirewallOp::ListMarked, |state| {
            let ours = |table: &&ObservedTable| {
                table.mark.as_ref().is_some_and(|mark| mark.install == *install)
            };
            Ok(state.tables.values().map(|table| &table.shown).filter(ours).cloned().collect())
        })
        .await
    }

    async fn list_alike(&self) -> Result<Vec<ObservedTable>, FirewallError> {
        self.run(FirewallOp::ListAlike, |state| {
            let tables = state.tables.values().map(|table| &table.shown);
            Ok(tables.filter(|table| is_alike(table)).cloned().collect())
        })
        .await
    }

    async fn remove(&self, tap: &str, mark: &Mark) -> Result<(), FirewallError> {
        // As the kernel does it: what a process held goes a moment after it.
        for _ in 0..OWNER_TRIES {
            match self.run(FirewallOp::Remove, |state| state.remove(tap, mark, None)).await {
                Err(FirewallError::OwnerLives { .. }) => tokio::time::sleep(OWNER_PAUSE).await,
                result => return result,
            }
        }
        self.run(FirewallOp::Remove, |state| state.remove(tap, mark, None)).await
    }

    async fn remove_from(
        &self,
        tap: &str,
        mark: &Mark,
        holder: &ProcessIdentity,
    ) -> Result<(), FirewallError> {
        match self.remove(tap, mark).await {
            Err(FirewallError::OwnerLives { .. }) => {}
            result => return result,
        }
        self.run(FirewallOp::Remove, |state| state.remove(tap, mark, Some(holder))).await
    }

    async fn obstacles(&self) -> Result<Vec<Obstacle>, FirewallError> {
        self.run(FirewallOp::Obstacles, |state| Ok(state.obstacles.clone())).await
    }

    fn ip_forward(&self) -> Result<bool, FirewallError> {
        Ok(self.state().ip_forward)
    }

    fn enable_ip_forward(&self) -> Result<bool, FirewallError> {
        Ok(!std::mem::replace(&mut self.state().ip_forward, true))
    }
}
