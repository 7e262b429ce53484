//! How often something may be restarted: so many times in a sliding window, each a while later than
//! the one before.
//!
//! Each service and each VM has a budget of its own, so that one that crashes in a loop takes no
//! other down.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// A budget of restarts.
#[derive(Debug, Clone)]
pub struct RestartBudget {
    max: usize,
    window: Duration,
    /// Before the second restart in a window; doubled before each further one.
    backoff: Duration,
    spent: VecDeque<Instant>,
}

impl RestartBudget {
    /// At most `max` restarts in `window`: the first at once, the second after `backoff`, each
    /// further one after twice the time.
    #[must_use]
    pub const fn new(max: usize, window: Duration, backoff: Duration) -> Self {
        Self { max, window, backoff, spent: VecDeque::new() }
    }

    /// For a service: a fault that comes back at once comes back for ever.
    #[must_use]
    pub const fn for_service() -> Self {
        Self::new(5, Duration::from_secs(60), Duration::from_millis(50))
    }

    /// For a VM's actor.
    #[must_use]
    pub const fn for_vm() -> Self {
        Self::new(3, Duration::from_secs(60), Duration::from_millis(100))
    }

    /// For the link to a guest.
    #[must_use]
    pub const fn for_link() -> Self {
        Self::new(5, Duration::from_secs(60), Duration::ZERO)
    }

    /// Spends one restart: how long to wait before it; `None` when there is none left.
    #[must_use]
    pub fn spend(&mut self, now: Instant) -> Option<Duration> {
        while self.spent.front().is_some_and(|first| now.duration_since(*first) > self.window) {
            self.spent.pop_front();
        }
        let before = self.spent.len();
        if before >= self.max {
            return None;
        }
        self.spent.push_back(now);
        let doublings = before.checked_sub(1).and_then(|n| u32::try_from(n).ok());
        Some(doublings.map_or(Duration::ZERO, |n| self.backoff.saturating_mul(1 << n.min(16))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_used_up_and_comes_back() {
        let ms = Duration::from_millis;
        let mut budget = RestartBudget::new(4, Duration::from_secs(10), ms(100));
        let start = Instant::now();
        for wait in [0, 100, 200, 400] {
            assert_eq!(budget.spend(start), Some(ms(wait)));
        }
        assert_eq!(budget.spend(start + Duration::from_secs(2)), None);
        assert_eq!(budget.spend(start + Duration::from_secs(11)), Some(Duration::ZERO));
    }
}
