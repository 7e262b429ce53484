//! How many bytes requests and answers may hold together, in all sessions of a process.
//!
//! # Invariants
//! 1. Nobody waits: what does not fit is refused, so that a session always sees the next line.
//! 2. What was taken is given back when its holder is dropped, however it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::protocol::{Code, RpcError};

/// What all of them may hold.
pub const BUDGET_BYTES: usize = 512 * 1024 * 1024;

/// The bytes that are left.
#[derive(Debug, Clone)]
pub struct Budget(Arc<AtomicUsize>);

impl Budget {
    /// So many bytes.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(bytes)))
    }

    /// Takes nothing yet.
    pub(super) fn hold(&self) -> Held {
        Held { budget: self.clone(), bytes: 0 }
    }
}

/// A part of the budget.
#[derive(Debug)]
pub(super) struct Held {
    budget: Budget,
    bytes: usize,
}

impl Held {
    /// Takes so many more bytes.
    ///
    /// # Errors
    /// When there are not as many.
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), RpcError> {
        let left = &self.budget.0;
        let taken = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(bytes));
        match taken {
            Ok(_) => {
                self.bytes += bytes;
                Ok(())
            }
            Err(left) => Err(RpcError::new(
                Code::Busy,
                format!(
                    "requests and answers in flight hold too much: {bytes} bytes wanted, {left} left; wait for some, or use smaller pieces"
                ),
            )),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.0.fetch_add(self.bytes, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_comes_back() {
        let budget = Budget::new(10);
        let (mut one, mut other) = (budget.hold(), budget.hold());
        one.take(6).unwrap();
        assert_eq!(other.take(5).unwrap_err().code, Code::Busy);
        other.take(4).unwrap();
        drop(one);
        other.take(6).unwrap();
        drop(other);
        budget.hold().take(10).unwrap();
    }
}
