//! Named points at which a test makes Matchlock fail, `area.step.before` and `area.step.after`, and
//! named mutations that break it on purpose.
//!
//! Without the feature `failpoints` every call here is an empty function that cannot fail, and the
//! crate `fail` is no dependency. With it, `FAILPOINTS=name=action;…` arms points, in the syntax of
//! `fail` (`1*off->return(kill)`, `sleep(500)`, …). Its `return(…)` means here:
//!
//! | action | what happens |
//! |---|---|
//! | `return(kill)` | SIGKILL to this process |
//! | `return(stop)` | SIGSTOP to this process; after a SIGCONT it goes on |
//! | `return(panic)` | a panic of whoever is there |
//! | `return(error)` | the step fails with [`Injected`] |
//!
//! `MATCHLOCK_FAILPOINTS_LOG=file` notes each point that is passed (`hit NAME`) and each that does
//! something (`fired NAME ACTION`, written before it does). `MATCHLOCK_MUTATION=NAME` turns one
//! mutation on, see [`mutated`].
//!
//! # Invariants
//! 1. Each area lists its steps in an [`Area`] beside the code. A step that is not listed panics in
//!    the feature build when it is passed; one that is listed and never passed fails the crash suite.
//! 2. `before` is passed before anything of the step is done, `after` once all of it is done and
//!    nobody was told yet.

#[cfg(not(feature = "failpoints"))]
mod absent;
#[cfg(feature = "failpoints")]
mod armed;

#[cfg(not(feature = "failpoints"))]
use absent as build;
#[cfg(feature = "failpoints")]
use armed as build;

#[cfg(feature = "failpoints")]
pub use armed::arm;
pub use build::Injected;

/// The steps of one part of the program.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    name: &'static str,
    steps: &'static [&'static str],
    has_after: bool,
}

impl Area {
    /// Steps with a point before and one after each.
    #[must_use]
    pub const fn new(name: &'static str, steps: &'static [&'static str]) -> Self {
        Self { name, steps, has_after: true }
    }

    /// Steps with a point before each only.
    #[must_use]
    pub const fn before_only(name: &'static str, steps: &'static [&'static str]) -> Self {
        Self { name, steps, has_after: false }
    }

    /// Its steps.
    #[must_use]
    pub const fn steps(&self) -> &'static [&'static str] {
        self.steps
    }

    /// The names of its points.
    #[must_use]
    pub fn points(&self) -> Vec<String> {
        let of = |when: &'static str| move |step: &&str| format!("{}.{step}.{when}", self.name);
        let mut points: Vec<_> = self.steps.iter().map(of("before")).collect();
        if self.has_after {
            points.extend(self.steps.iter().map(of("after")));
        }
        points
    }

    /// The point before a step.
    ///
    /// # Errors
    /// When a test wants it to fail.
    #[inline]
    pub fn before(&self, step: &str) -> Result<(), Injected> {
        build::hit(self, step, "before")
    }

    /// The point after a step.
    ///
    /// # Errors
    /// When a test wants it to fail.
    #[inline]
    pub fn after(&self, step: &str) -> Result<(), Injected> {
        build::hit(self, step, "after")
    }

    /// Whether the mutation `skip:area.step` is on: the step is to be left out and told as done.
    #[inline]
    #[must_use]
    pub fn skips(&self, step: &str) -> bool {
        build::skips(self, step)
    }
}

/// Whether the mutation of this name is on. Always false without the feature.
#[inline]
#[must_use]
pub fn mutated(name: &str) -> bool {
    build::mutated(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREA: Area = Area::new("a", &["x", "y"]);

    #[test]
    fn points_are_named_after_area_step_and_side() {
        assert_eq!(AREA.points(), ["a.x.before", "a.y.before", "a.x.after", "a.y.after"]);
        assert_eq!(Area::before_only("b", &["z"]).points(), ["b.z.before"]);
    }

    /// The build that everybody gets: nothing fails, whatever the environment says.
    #[cfg(not(feature = "failpoints"))]
    #[test]
    fn without_the_feature_nothing_happens() {
        assert!(AREA.before("x").is_ok() && AREA.after("nosuch").is_ok());
        assert!(!AREA.skips("x") && !mutated("anything"));
        assert_eq!(size_of::<Injected>(), 0);
    }
}
