//! The requests in flight.
//!
//! ```text
//!   begin ─► running ──────────────────── finish ─► its result is sent
//!              ├─ commit ─► committed ──── finish ─► its result is sent; it is not cancelled any more
//!              ├─ cancel ─► cancelled ──── finish ─► "cancelled" is sent, whatever came of it
//!              └─ fail ───► cancelled ──── finish ─► what was wrong is sent
//! ```
//!
//! # Invariants
//! 1. A request is answered once. `cancel` says true exactly when the answer is "cancelled".
//! 2. At most [`MAX_CALLS`] at once; an id is in use until its answer is on its way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use super::input::Input;
use super::protocol::{Code, Id, RpcError, RpcResult};

/// How many requests of a session may be in flight.
pub(super) const MAX_CALLS: usize = 256;

/// The requests in flight.
#[derive(Debug, Clone, Default)]
pub(super) struct Calls(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    calls: HashMap<Key, Call>,
    /// How many had no id: nobody can name them.
    unnamed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Id(Id),
    Unnamed(u64),
}

#[derive(Debug)]
struct Call {
    cancel: CancellationToken,
    /// What it has made stays: it is too late to cancel it.
    is_committed: bool,
    /// What it fails with, whatever comes of it.
    failure: Option<RpcError>,
    /// Where its input goes, if it takes any.
    input: Option<Input>,
}

/// A request that was begun.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) key: Key,
    /// Cancelled when somebody asks for it, or the session ends.
    pub(super) cancel: CancellationToken,
}

impl Calls {
    // A poisoned lock holds whole entries.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a request.
    ///
    /// # Errors
    /// When there are too many, or its id is in use.
    pub(super) fn begin(&self, id: Option<&Id>, input: Option<Input>) -> Result<Begun, RpcError> {
        let mut state = self.state();
        if state.calls.len() >= MAX_CALLS {
            let text = format!("{MAX_CALLS} requests are in flight, the limit of a session");
            return Err(RpcError::new(Code::Busy, text));
        }
        let key = match id {
            Some(id) => Key::Id(id.clone()),
            None => {
                state.unnamed += 1;
                Key::Unnamed(state.unnamed)
            }
        };
        if state.calls.contains_key(&key) {
            let id = id.map(ToString::to_string).unwrap_or_default();
            let text = format!("id {id} is in use by a request in flight");
            return Err(RpcError::new(Code::InvalidRequest, text));
        }
        let cancel = CancellationToken::new();
        let call = Call { cancel: cancel.clone(), is_committed: false, failure: None, input };
        state.calls.insert(key.clone(), call);
        Ok(Begun { key, cancel })
    }

    /// Cancels a request; false when there is none in flight.
    pub(super) fn cancel(&self, id: &Id) -> bool {
        let state = self.state();
        let call = state
            .calls
            .get(&Key::Id(id.clone()))
            .filter(|call| !call.is_committed && call.failure.is_none());
        let Some(call) = call else { return false };
        call.cancel.cancel();
        true
    }

    /// Ends a request that takes input with this failure, unless it is cancelled or has failed already.
    pub(super) fn fail(&self, id: &Id, error: RpcError) {
        let mut state = self.state();
        let call = state.calls.get_mut(&Key::Id(id.clone()));
        if let Some(call) = call.filter(|call| call.input.is_some() && !call.cancel.is_cancelled())
        {
            call.failure = Some(error);
            call.cancel.cancel();
        }
    }

    /// From now on what the request has made stays, and it cannot be cancelled; false if it was.
    pub(super) fn commit(&self, key: &Key) -> bool {
        let mut state = self.state();
        let Some(call) = state.calls.get_mut(key) else { return false };
        call.is_committed = !call.cancel.is_cancelled();
        call.is_committed
    }

    /// Cancels all of them.
    pub(super) fn cancel_all(&self) {
        for call in self.state().calls.values() {
            call.cancel.cancel();
        }
    }

    /// Ends a request: what it is answered with.
    pub(super) fn finish(&self, key: &Key, result: RpcResult) -> RpcResult {
        match self.state().calls.remove(key) {
            Some(call) if call.cancel.is_cancelled() && !call.is_committed => {
                Err(call.failure.unwrap_or_else(RpcError::cancelled))
            }
            _ => result,
        }
    }

    /// Where the input of a request goes.
    pub(super) fn input(&self, id: &Id) -> Option<Input> {
        self.state().calls.get(&Key::Id(id.clone())).and_then(|call| call.input.clone())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_cancelled_request_is_answered_so_whatever_came_of_it() {
        let calls = Calls::default();
        let (one, two) = (Id::Number(1), Id::Text("1".into()));
        let begun = calls.begin(Some(&one), None).unwrap();
        let other = calls.begin(Some(&two), None).unwrap();
        assert!(!calls.cancel(&Id::Number(2)), "there is no such request");
        assert!(calls.cancel(&one) && begun.cancel.is_cancelled());
        assert!(!other.cancel.is_cancelled());
        assert_eq!(calls.finish(&begun.key, Ok(json!(1))), Err(RpcError::cancelled()));
        assert!(!calls.cancel(&one), "it has ended");
        assert_eq!(calls.finish(&other.key, Ok(json!(1))), Ok(json!(1)));
    }

    #[test]
    fn what_was_made_cannot_be_cancelled_any_more() {
        let calls = Calls::default();
        let (one, two) = (Id::Number(1), Id::Number(2));
        let (made, late) = (calls.begin(Some(&one), None), calls.begin(Some(&two), None));
        let (made, late) = (made.unwrap(), late.unwrap());
        assert!(calls.commit(&made.key) && !calls.cancel(&one));
        calls.cancel_all();
        assert_eq!(calls.finish(&made.key, Ok(json!(1))), Ok(json!(1)));
        assert!(!calls.commit(&late.key), "it was cancelled before");
        assert_eq!(calls.finish(&late.key, Ok(json!(1))), Err(RpcError::cancelled()));
    }

    #[test]
    fn an_id_is_free_again_once_its_request_has_ended() {
        let calls = Calls::default();
        let one = Id::Number(1);
        let begun = calls.begin(Some(&one), None).unwrap();
        assert_eq!(calls.begin(Some(&one), None).unwrap_err().code, Code::InvalidRequest);
        calls.begin(None, None).unwrap();
        calls.begin(None, None).unwrap();
        calls.finish(&begun.key, Ok(json!(null))).unwrap();
        calls.begin(Some(&one), None).unwrap();
    }

    #[test]
    fn there_are_only_so_many_at_once() {
        let calls = Calls::default();
        for _ in 0..MAX_CALLS {
            calls.begin(None, None).unwrap();
        }
        assert_eq!(calls.begin(Some(&Id::Number(1)), None).unwrap_err().code, Code::Busy);
        calls.cancel_all();
        assert!(calls.state().calls.values().all(|call| call.cancel.is_cancelled()));
    }
}
