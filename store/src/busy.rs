//! Waiting for a lock that another process holds: short sleeps of random length, capped in sum.
//!
//! SQLite's own `busy_timeout` sleeps longer each time, so under contention whoever waited longest
//! looks least often and starves. Sleeps that stay short and differ let everybody through.
//!
//! # Invariants
//! * A wait ends after [`LOCK_WAIT`], by the monotonic clock, whatever the sleeps add up to.

use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

/// The longest wait for a lock.
pub const LOCK_WAIT: Duration = Duration::from_millis(LOCK_WAIT_MILLIS);

/// [`LOCK_WAIT`], as the parameter of [`handler`].
pub(crate) const LOCK_WAIT_MILLIS: u64 = 15_000;

const SHORTEST: Duration = Duration::from_micros(300);
const SPREAD_MICROS: u64 = 1_200;

thread_local! {
    /// When this thread's current wait began; SQLite tells only how often it has asked.
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
    static RANDOM: Cell<u64> = Cell::new(RandomState::new().hash_one(0_u8) | 1);
}

/// SQLite's busy handler: sleeps a little, and says whether to look again, for so many milliseconds.
/// SQLite takes a plain function, so the cap is a part of its type.
pub(crate) fn handler<const CAP_MILLIS: u64>(asked_before: i32) -> bool {
    let began = match BEGAN.get() {
        Some(began) if asked_before > 0 => began,
        _ => {
            let now = Instant::now();
            BEGAN.set(Some(now));
            now
        }
    };
    pause_within(began, Duration::from_millis(CAP_MILLIS))
}

/// Sleeps a little, unless the wait that began then has used up its time; says whether it slept.
pub(crate) fn pause_within(began: Instant, cap: Duration) -> bool {
    if began.elapsed() >= cap {
        return false;
    }
    pause(next_pause());
    true
}

fn next_pause() -> Duration {
    // xorshift64: the sleeps need to differ, nothing more.
    let mut x = RANDOM.get();
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    RANDOM.set(x);
    SHORTEST + Duration::from_micros(x % (SPREAD_MICROS + 1))
}

#[expect(
    clippy::disallowed_methods,
    reason = "neither SQLite nor flock offers an event to wait for when another process holds the lock"
)]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_differ_and_stay_within_their_bounds() {
        let pauses: Vec<_> = (0..1_000).map(|_| next_pause()).collect();
        let (low, high) = (Duration::from_micros(300), Duration::from_micros(1_500));
        assert!(pauses.iter().all(|p| (low..=high).contains(p)));
        let distinct: std::collections::HashSet<_> = pauses.iter().collect();
        assert!(distinct.len() > 300, "only {} differ", distinct.len());
    }

    #[test]
    fn a_wait_ends_at_its_cap() {
        let began = Instant::now();
        let cap = Duration::from_millis(20);
        let mut pauses = 0_u32;
        while pause_within(began, cap) {
            pauses += 1;
        }
        assert!(began.elapsed() >= cap);
        assert!((1..=80).contains(&pauses), "{pauses} pauses");
    }

    #[test]
    fn a_new_wait_starts_its_own_clock() {
        BEGAN.set(Instant::now().checked_sub(LOCK_WAIT));
        let handler = handler::<LOCK_WAIT_MILLIS>;
        assert!(!handler(7), "a used-up wait went on");
        assert!(handler(0), "a new wait inherited the clock of the last");
        assert!(handler(1));
        assert!(!super::handler::<0>(0), "its own cap was not used");
    }
}
