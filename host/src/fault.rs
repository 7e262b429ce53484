//! What a test can make a fake do to an operation.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::time::Duration;

/// What happens to an operation of a fake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails and changes nothing.
    Fails,
    /// It is done, and then says that it failed.
    FailsAfterwards,
    /// It takes this long before it is done.
    Late(Duration),
    /// It never returns and changes nothing.
    Never,
}

/// The faults and the calls of one fake; `Op` names its operations.
#[derive(Debug)]
pub(crate) struct Faults<Op> {
    set: BTreeMap<Op, Fault>,
    calls: Vec<Op>,
}

impl<Op> Default for Faults<Op> {
    fn default() -> Self {
        Self { set: BTreeMap::new(), calls: Vec::new() }
    }
}

impl<Op: Copy + Ord> Faults<Op> {
    pub(crate) fn set(&mut self, op: Op, fault: Option<Fault>) {
        match fault {
            Some(fault) => self.set.insert(op, fault),
            None => self.set.remove(&op),
        };
    }

    pub(crate) fn calls(&self) -> Vec<Op> {
        self.calls.clone()
    }

    /// Notes a call and says what disturbs it.
    pub(crate) fn begin(&mut self, op: Op) -> Option<Fault> {
        self.calls.push(op);
        self.set.get(&op).copied()
    }
}

/// Does an operation's work as its fault allows; `failed` makes the error of a fault.
pub(crate) async fn disturbed<T, E>(
    fault: Option<Fault>,
    work: impl FnOnce() -> Result<T, E> + Send,
    failed: impl FnOnce(io::Error) -> E + Send,
) -> Result<T, E> {
    let injected = || io::Error::other("injected fault");
    match fault {
        None => work(),
        Some(Fault::Fails) => Err(failed(injected())),
        Some(Fault::FailsAfterwards) => {
            work()?;
            Err(failed(injected()))
        }
        Some(Fault::Late(delay)) => {
            tokio::time::sleep(delay).await;
            work()
        }
        Some(Fault::Never) => never().await,
    }
}

fn never<T>() -> impl Future<Output = T> {
    std::future::pending()
}
