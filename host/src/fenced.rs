//! Blocking work on a thread of its own that ends with the future that waits for it.

use std::io;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

enum State<W, T> {
    Waiting(W),
    Done(T),
    /// Begun and not done (it panicked), cancelled, or its result was taken.
    Over,
}

struct Slot<W, T>(Mutex<State<W, T>>);

impl<W, T> Slot<W, T> {
    fn state(&self) -> MutexGuard<'_, State<W, T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> State<W, T> {
        mem::replace(&mut *self.state(), State::Over)
    }
}

/// Cancels what was not begun; waits for what was, and drops its result.
struct CancelOnDrop<W, T>(Arc<Slot<W, T>>);

impl<W, T> Drop for CancelOnDrop<W, T> {
    fn drop(&mut self) {
        drop(self.0.take());
    }
}

/// Runs short blocking work (system calls that may wait for the kernel) on another thread.
///
/// When the future is dropped, the work was either never begun and never will be, or it has ended
/// and its result was dropped: what is done next never meets an old effect. The drop may therefore
/// take as long as the work.
///
/// # Errors
/// When the work panicked or the runtime is shutting down.
pub(crate) async fn fenced<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let slot = Arc::new(Slot(Mutex::new(State::Waiting(work))));
    let guard = CancelOnDrop(Arc::clone(&slot));
    let run = move || {
        // Locked while the work is done: who cancels waits here.
        let mut state = slot.state();
        if let State::Waiting(work) = mem::replace(&mut *state, State::Over) {
            *state = State::Done(work());
        }
    };
    tokio::task::spawn_blocking(run).await.map_err(io::Error::other)?;
    match guard.0.take() {
        State::Done(result) => Ok(result),
        State::Waiting(_) | State::Over => Err(io::Error::other("the work was not done")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;
    use std::task::{Context, Waker};

    use super::*;

    #[tokio::test]
    async fn work_is_done_and_panics_are_errors() {
        assert_eq!(fenced(|| 7).await.unwrap(), 7);
        assert!(fenced(|| panic!("as a test")).await.is_err());
    }

    #[tokio::test]
    async fn a_dropped_future_has_no_work_left() {
        static LIVING: AtomicU32 = AtomicU32::new(0);
        struct Thing;
        impl Drop for Thing {
            fn drop(&mut self) {
                LIVING.fetch_sub(1, Ordering::SeqCst);
            }
        }
        for wait_for_begin in [false, true] {
            let (begun, begins) = channel();
            let (go, goes) = channel::<()>();
            let mut future = Box::pin(fenced(move || {
                LIVING.fetch_add(1, Ordering::SeqCst);
                begun.send(()).unwrap();
                goes.recv().unwrap();
                Thing
            }));
            assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            if wait_for_begin {
                begins.recv().unwrap();
            }
            go.send(()).unwrap();
            drop(future);
            assert_eq!(LIVING.load(Ordering::SeqCst), 0);
        }
    }
}
