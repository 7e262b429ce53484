//! How often something may be restarted: so many times in a sliding window.
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
    spent: VecDeque<Instant>,
}

impl RestartBudget {
    /// At most `max` restarts in `window`.
    #[must_use]
    pub const fn new(max: usize, window: Duration) -> Self {
        Self { max, window, spent: VecDeque::new() }
    }

    /// For a service: a fault that comes back at once comes back for ever.
    #[must_use]
    pub const fn for_service() -> Self {
        Self::new(5, Duration::from_secs(60))
    }

    /// For a VM's actor: its restarts finish a shutdown, which rarely fails twice for a new reason.
    #[must_use]
    pub const fn for_vm() -> Self {
        Self::new(3, Duration::from_secs(60))
    }

    /// Spends one restart; `false` when there is none left.
    #[must_use]
    pub fn spend(&mut self, now: Instant) -> bool {
        while self.spent.front().is_some_and(|first| now.duration_since(*first) > self.window) {
            self.spent.pop_front();
        }
        if self.spent.len() >= self.max {
            return false;
        }
        self.spent.push_back(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_used_up_and_comes_back() {
        let mut budget = RestartBudget::new(2, Duration::from_secs(10));
        let start = Instant::now();
        assert!(budget.spend(start));
        assert!(budget.spend(start + Duration::from_secs(1)));
        assert!(!budget.spend(start + Duration::from_secs(2)));
        assert!(budget.spend(start + Duration::from_secs(11)));
    }
}
