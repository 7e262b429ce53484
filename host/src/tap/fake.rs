//! TAPs in memory, for tests of what is built on [`Taps`].
//!
//! The dead-man's switch is real: a TAP's descriptor is the end of a pipe, and the TAP is gone as
//! soon as the last copy of it is closed, in whatever process.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use matchlock_model::id::{InstallId, Mark};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use super::{HostSubnet, ObservedTap, SubnetUse, TapError, TapHandle, TapSpec, Taps, is_alike};
use crate::fault::{Fault, Faults, disturbed};

/// An operation of [`Taps`], to be disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TapOp {
    /// [`Taps::create`].
    Create,
    /// [`Taps::observe`].
    Observe,
    /// [`Taps::list_marked`].
    ListMarked,
    /// [`Taps::list_alike`].
    ListAlike,
    /// [`Taps::remove`].
    Remove,
    /// [`Taps::host_subnets`].
    HostSubnets,
}

/// A host's links in memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct FakeTaps {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    links: BTreeMap<String, Link>,
    host: Vec<HostSubnet>,
    last_index: u32,
    faults: Faults<TapOp>,
}

#[derive(Debug)]
struct Link {
    shown: ObservedTap,
    /// Our end of the pipe; a link that nobody holds open has none.
    alive: Option<OwnedFd>,
}

impl Link {
    fn is_gone(&self) -> bool {
        self.alive.as_ref().is_some_and(|end| {
            let mut polled = [PollFd::new(end, PollFlags::empty())];
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
        })
    }
}

impl State {
    fn next_index(&mut self) -> u32 {
        self.last_index += 1;
        self.last_index
    }

    fn create(&mut self, spec: &TapSpec) -> Result<TapHandle, TapError> {
        let name = spec.name();
        if let Some(there) = self.links.get(&name) {
            return Err(TapError::AlreadyExists { name, alias: there.shown.alias.clone() });
        }
        let made = pipe_with(PipeFlags::CLOEXEC);
        let (alive, fd) = made.map_err(|errno| TapError::of("make a pipe", errno.into()))?;
        let index = self.next_index();
        let shown = ObservedTap {
            name: name.clone(),
            index,
            alias: Some(spec.mark.to_string()),
            mark: Some(spec.mark.clone()),
            mtu: spec.mtu,
            addresses: vec![(spec.gateway, spec.prefix)],
            up: true,
            arp: false,
        };
        self.links.insert(name.clone(), Link { shown, alive: Some(alive) });
        Ok(TapHandle { name, index, fd })
    }

    fn remove(&mut self, name: &str, mark: &Mark) -> Result<(), TapError> {
        let Some(link) = self.links.get(name) else { return Ok(()) };
        if link.shown.mark.as_ref() != Some(mark) {
            let (name, alias) = (name.to_owned(), link.shown.alias.clone());
            return Err(TapError::NotOurs { name, alias, expected: mark.clone() });
        }
        self.links.remove(name);
        Ok(())
    }

    fn subnets(&self) -> Vec<HostSubnet> {
        let of_link = |link: &Link| {
            let name = link.shown.name.clone();
            let used = [SubnetUse::Address, SubnetUse::Route];
            let addresses = link.shown.addresses.clone();
            addresses.into_iter().flat_map(move |(address, prefix)| {
                used.map(|used| HostSubnet::of(address, prefix, used, Some(name.clone())))
            })
        };
        let mut subnets: Vec<_> = self.links.values().flat_map(of_link).collect();
        subnets.extend(self.host.iter().cloned());
        subnets.sort();
        subnets.dedup();
        subnets
    }
}

impl FakeTaps {
    /// A host without links, addresses and routes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The state, without what nobody holds open any more.
    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.links.retain(|_, link| !link.is_gone());
        state
    }

    /// Disturbs an operation from now on, or (with `None`) no longer.
    pub fn set_fault(&self, op: TapOp, fault: Option<Fault>) {
        self.state().faults.set(op, fault);
    }

    /// The operations so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<TapOp> {
        self.state().faults.calls()
    }

    /// The names of the links that exist.
    #[must_use]
    pub fn existing(&self) -> Vec<String> {
        self.state().links.keys().cloned().collect()
    }

    /// Whoever holds a TAP open has ended: it is gone, whoever still has its descriptor here.
    pub fn close(&self, name: &str) {
        let mut state = self.state();
        if state.links.get(name).is_some_and(|link| link.alive.is_some()) {
            state.links.remove(name);
        }
    }

    /// From now on the link stays although nobody holds it open, as a persistent one would.
    pub fn set_persistent(&self, name: &str) {
        if let Some(link) = self.state().links.get_mut(name) {
            link.alive = None;
        }
    }

    /// Makes a link that nobody holds open, as somebody else or a persistent TAP would be.
    pub fn add_link(&self, name: &str, alias: Option<&str>, addresses: &[(Ipv4Addr, u8)]) {
        let mut state = self.state();
        let shown = ObservedTap {
            name: name.to_owned(),
            index: state.next_index(),
            alias: alias.map(str::to_owned),
            mark: alias.and_then(Mark::parse),
            mtu: 1500,
            addresses: addresses.to_vec(),
            up: true,
            arp: true,
        };
        state.links.insert(name.to_owned(), Link { shown, alive: None });
    }

    /// Adds a route of the host.
    pub fn add_route(&self, network: Ipv4Addr, prefix: u8, link: &str) {
        let subnet = HostSubnet::of(network, prefix, SubnetUse::Route, Some(link.to_owned()));
        self.state().host.push(subnet);
    }

    async fn run<T>(
        &self,
        op: TapOp,
        name: &str,
        work: impl FnOnce(&mut State) -> Result<T, TapError> + Send,
    ) -> Result<T, TapError> {
        let fault = self.state().faults.begin(op);
        let failed = |source: io::Error| TapError::of(format!("work on {name}"), source);
        disturbed(fault, || work(&mut self.state()), failed).await
    }
}

#[async_trait]
impl Taps for FakeTaps {
    async fn create(&self, spec: &TapSpec) -> Result<TapHandle, TapError> {
        self.run(TapOp::Create, &spec.name(), |state| state.create(spec)).await
    }

    async fn observe(&self, name: &str) -> Result<Option<ObservedTap>, TapError> {
        self.run(TapOp::Observe, name, |state| {
            Ok(state.links.get(name).map(|link| link.shown.clone()))
        })
        .await
    }

    async fn list_marked(&self, install: &InstallId) -> Result<Vec<ObservedTap>, TapError> {
        self.run(TapOp::ListMarked, "the links", |state| {
            let ours =
                |tap: &&ObservedTap| tap.mark.as_ref().is_some_and(|mark| mark.install == *install);
            Ok(state.links.values().map(|link| &link.shown).filter(ours).cloned().collect())
        })
        .await
    }

    async fn list_alike(&self) -> Result<Vec<ObservedTap>, TapError> {
        self.run(TapOp::ListAlike, "the links", |state| {
            let links = state.links.values().map(|link| &link.shown);
            Ok(links.filter(|tap| is_alike(tap)).cloned().collect())
        })
        .await
    }

    async fn remove(&self, name: &str, mark: &Mark) -> Result<(), TapError> {
        self.run(TapOp::Remove, name, |state| state.remove(name, mark)).await
    }

    async fn host_subnets(&self) -> Result<Vec<HostSubnet>, TapError> {
        self.run(TapOp::HostSubnets, "the host", |state| Ok(state.subnets())).await
    }
}
