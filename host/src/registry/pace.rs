//! How slowly a body may come. The limit of a single read says nothing of somebody who sends a byte
//! just before each ends.

use std::time::Duration;

/// How much waiting makes one look.
const WINDOW: Duration = Duration::from_secs(30);
/// How many bytes there must be in it: a modem is faster.
const LEAST: u64 = 30 * 1024;

/// What came in the window that goes on.
#[derive(Debug, Default)]
pub(super) struct Pace {
    waited: Duration,
    came: u64,
}

impl Pace {
    /// Counts bytes and how long they were waited for; only that, as this host may be slow as well.
    /// Whether it is fast enough.
    pub(super) fn keeps(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.came += bytes;
        if self.waited < WINDOW {
            return true;
        }
        std::mem::take(self).came >= LEAST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_drips_is_found_out() {
        let mut pace = Pace::default();
        let second = Duration::from_secs(1);
        assert!((0..29).all(|_| pace.keeps(second, 1)));
        assert!(!pace.keeps(second, 1));
        assert!((0..100).all(|_| pace.keeps(second, 1024)));
        // Once in a while nothing comes.
        let mut pace = Pace::default();
        assert!(pace.keeps(20 * second, 0) && pace.keeps(20 * second, LEAST));
    }
}
