//! A flag that is set once and can be waited for, within one thread.

use std::cell::Cell;

use tokio::sync::Notify;

/// Something that happens at most once.
#[derive(Debug, Default)]
pub struct Latch {
    set: Cell<bool>,
    waiters: Notify,
}

impl Latch {
    /// It has happened. Setting it again changes nothing.
    pub fn set(&self) {
        if !self.set.replace(true) {
            self.waiters.notify_waiters();
        }
    }

    /// Whether it has happened.
    pub fn is_set(&self) -> bool {
        self.set.get()
    }

    /// Waits until it has happened.
    pub async fn wait(&self) {
        if !self.set.get() {
            // No await between look and wait: in one thread nothing is missed in between.
            self.waiters.notified().await;
        }
    }
}
