//! Numbers that were measured, in the order of the rounds.

use std::time::Duration;

#[derive(Debug, Default, Clone)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(crate) fn push_ms(&mut self, time: Duration) {
        self.push(time.as_secs_f64() * 1e3);
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted
    }

    pub(crate) fn median(&self) -> f64 {
        let sorted = self.sorted();
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        f64::midpoint(at(sorted.len().saturating_sub(1) / 2), at(sorted.len() / 2))
    }

    fn least(&self) -> f64 {
        self.sorted().first().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn most(&self) -> f64 {
        self.sorted().last().copied().unwrap_or(f64::NAN)
    }

    /// The median, the median absolute deviation, and the extremes.
    pub(crate) fn spread(&self, digits: usize) -> String {
        let median = self.median();
        let deviation = Self(self.0.iter().map(|value| (value - median).abs()).collect()).median();
        let (least, most) = (self.least(), self.most());
        format!("{median:.digits$} ± {deviation:.digits$} ({least:.digits$} … {most:.digits$})")
    }

    /// Round by round; what slows one round slows both of its halves.
    pub(crate) fn combine(&self, other: &Self, with: impl Fn(f64, f64) -> f64) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| with(*a, *b)).collect())
    }
}
