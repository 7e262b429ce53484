//! What of the guest's data was received and not yet read here, counted in frames.
//!
//! ```text
//!   guard ── arrived(stream) ──►┌────────┐◄── opened(stream) ──── driver
//!   guard ◄─ room? wait ────────│ Ledger │◄── consumed(stream) ── reader of the stream
//!                               └────────┘◄── closed(stream) ──── reader of the stream
//! ```
//!
//! yamux keeps each data frame that nobody has read as an allocation of its own, and its windows
//! count bytes only: a frame of one byte costs about 65. This is the count that yamux lacks.
//!
//! # Invariants
//! 1. `unread` is the number of data frames with a body that were received for open streams and
//!    not consumed; closing a stream takes its frames out of it.
//! 2. At [`MAX_UNREAD_FRAMES`] the guard stops reading the transport, so the frames cost at most
//!    about 1 MiB beyond their bytes. Nothing is cut: every reader in this module reads until its
//!    stream ends, so an honest guest waits for our scheduler at most, however small its frames.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// So many unread data frames make the guard wait for their readers. Honest bulk traffic on every
/// stream (64 windows of 256 KiB in frames of 16 KiB) has 1,024.
pub(super) const MAX_UNREAD_FRAMES: usize = 16 * 1024;

/// The counts of one session.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    books: Mutex<Books>,
}

#[derive(Debug, Default)]
struct Books {
    broken: bool,
    unread: usize,
    streams: HashMap<u32, usize>,
    guard: Option<Waker>,
}

impl Ledger {
    fn books(&self) -> MutexGuard<'_, Books> {
        // The books are numbers that are right after every statement: a panic elsewhere in the
        // process does not make them wrong.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream was opened here.
    pub(super) fn opened(&self, stream: u32) {
        self.books().streams.insert(stream, 0);
    }

    /// A data frame with a body comes in. False when this stream is not open.
    pub(super) fn arrived(&self, stream: u32) -> bool {
        let mut books = self.books();
        let Some(frames) = books.streams.get_mut(&stream) else {
            return false;
        };
        *frames += 1;
        books.unread += 1;
        true
    }

    /// The stream's reader has taken one frame.
    pub(super) fn consumed(&self, stream: u32) {
        let mut books = self.books();
        if let Some(frames) = books.streams.get_mut(&stream) {
            *frames = frames.saturating_sub(1);
            books.unread = books.unread.saturating_sub(1);
        }
        Self::wake(books);
    }

    /// The stream is gone here, with whatever it held.
    pub(super) fn closed(&self, stream: u32) {
        let mut books = self.books();
        if let Some(frames) = books.streams.remove(&stream) {
            books.unread = books.unread.saturating_sub(frames);
        }
        Self::wake(books);
    }

    /// Waits until there is room for another frame.
    pub(super) fn poll_room(&self, cx: &Context<'_>) -> Poll<()> {
        let mut books = self.books();
        if books.unread < MAX_UNREAD_FRAMES {
            return Poll::Ready(());
        }
        books.guard = Some(cx.waker().clone());
        Poll::Pending
    }

    /// The transport has ended: what the streams' readers meet from now on may be this end.
    pub(super) fn break_off(&self) {
        self.books().broken = true;
    }

    /// Whether the transport has ended. True before any stream ends because of that.
    pub(super) fn is_broken(&self) -> bool {
        self.books().broken
    }

    /// How many frames are unread.
    #[cfg(test)]
    pub(super) fn unread(&self) -> usize {
        self.books().unread
    }

    /// Half-empty is soon enough: a wake-up per frame would be as many as there are frames.
    fn wake(mut books: MutexGuard<'_, Books>) {
        if books.unread > MAX_UNREAD_FRAMES / 2 {
            return;
        }
        let guard = books.guard.take();
        drop(books);
        if let Some(guard) = guard {
            guard.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_streams_that_are_not_open_are_refused() {
        let ledger = Ledger::default();
        assert!(!ledger.arrived(1));
        ledger.opened(1);
        assert!(ledger.arrived(1));
        ledger.closed(1);
        assert!(!ledger.arrived(1));
        assert_eq!(ledger.unread(), 0);
    }

    #[test]
    fn room_ends_at_the_limit_and_returns_when_half_is_read() {
        let ledger = Ledger::default();
        let woken = std::sync::Arc::new(Flag::default());
        let waker = Waker::from(woken.clone());
        let cx = Context::from_waker(&waker);
        ledger.opened(1);
        for _ in 0..MAX_UNREAD_FRAMES {
            assert!(ledger.poll_room(&cx).is_ready());
            assert!(ledger.arrived(1));
        }
        assert!(ledger.poll_room(&cx).is_pending());
        for _ in 1..MAX_UNREAD_FRAMES / 2 {
            ledger.consumed(1);
        }
        assert!(!woken.is_up(), "woken too early");
        ledger.consumed(1);
        assert!(woken.is_up());
        assert!(ledger.poll_room(&cx).is_ready());
    }

    #[test]
    fn closing_a_stream_makes_room_too() {
        let ledger = Ledger::default();
        let woken = std::sync::Arc::new(Flag::default());
        let waker = Waker::from(woken.clone());
        let cx = Context::from_waker(&waker);
        ledger.opened(1);
        ledger.opened(3);
        assert!(ledger.arrived(3));
        for _ in 0..MAX_UNREAD_FRAMES {
            assert!(ledger.arrived(1));
        }
        assert!(ledger.poll_room(&cx).is_pending());
        ledger.closed(1);
        assert!(woken.is_up());
        assert_eq!(ledger.unread(), 1);
    }

    #[derive(Default)]
    struct Flag(std::sync::atomic::AtomicBool);

    impl Flag {
        fn is_up(&self) -> bool {
            self.0.load(std::sync::atomic::Ordering::SeqCst)
        }
    }

    impl std::task::Wake for Flag {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }
}
