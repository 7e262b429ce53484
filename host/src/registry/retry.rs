//! Which errors are tried again, how often and how soon.

use std::time::Duration;

use super::RegistryError;

/// How often something is tried again that fails each time without any progress.
const LIMIT: u32 = 5;
/// The same where there is no connection at all: a misspelt port is not worth a long wait.
const CONNECT_LIMIT: u32 = 2;
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(15);
/// How long is waited without a word.
const UNSAID: Duration = Duration::from_secs(2);
/// The longest wait that a registry may ask for; for longer ones the user is told.
const LONGEST_ASKED: Duration = Duration::from_secs(60);

/// Whether an error may pass by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It will not.
    No,
    /// It may, soon.
    Soon,
    /// It may, and is not worth waiting for long.
    Briefly,
    /// The registry has said after how long.
    After(Duration),
}

/// Counts the tries of one thing.
#[derive(Debug, Default)]
pub struct Attempts {
    failed: u32,
}

impl Attempts {
    /// There was progress: the count begins anew.
    pub fn progressed(&mut self) {
        self.failed = 0;
    }

    /// Waits until the next try.
    ///
    /// # Errors
    /// The same error, when there is to be no other try.
    pub async fn again(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        let Some(wait) = self.wait(error.retry()) else {
            return Err(error);
        };
        // Nobody shall wonder for long what is waited for.
        if wait > UNSAID {
            tracing::warn!(%error, ?wait, "trying again");
        } else {
            tracing::info!(%error, ?wait, "trying again");
        }
        tokio::time::sleep(wait).await;
        Ok(())
    }

    fn wait(&mut self, retry: Retry) -> Option<Duration> {
        let limit = if retry == Retry::Briefly { CONNECT_LIMIT } else { LIMIT };
        if self.failed >= limit {
            return None;
        }
        let backoff = FIRST.saturating_mul(1 << self.failed).min(LONGEST);
        self.failed += 1;
        match retry {
            Retry::No => None,
            Retry::Soon | Retry::Briefly => Some(backoff),
            Retry::After(asked) if asked > LONGEST_ASKED => None,
            Retry::After(asked) => Some(asked.max(FIRST)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_have_an_end_and_waits_grow() {
        let mut attempts = Attempts::default();
        let waits: Vec<_> = std::iter::from_fn(|| attempts.wait(Retry::Soon)).collect();
        assert_eq!(waits.len(), 5);
        assert!(waits.is_sorted() && waits.iter().all(|wait| *wait <= LONGEST), "{waits:?}");
        attempts.progressed();
        assert_eq!(attempts.wait(Retry::Soon), Some(FIRST));
        assert_eq!(Attempts::default().wait(Retry::No), None);
    }

    #[test]
    fn a_registry_may_say_when_but_not_any_time() {
        let mut attempts = Attempts::default();
        let seconds = |n| Retry::After(Duration::from_secs(n));
        assert_eq!(attempts.wait(seconds(7)), Some(Duration::from_secs(7)));
        assert_eq!(attempts.wait(seconds(0)), Some(FIRST));
        assert_eq!(attempts.wait(seconds(3600)), None);
    }

    #[test]
    fn who_does_not_answer_at_all_is_given_up_early() {
        let mut attempts = Attempts::default();
        assert_eq!(std::iter::from_fn(|| attempts.wait(Retry::Briefly)).count(), 2);
    }
}
