//! Without the feature: nothing.

use std::fmt;
use std::io;

use crate::Area;

/// A failure that a test injected. Cannot exist in this build.
#[derive(Debug, Clone, Copy)]
pub enum Injected {}

impl fmt::Display for Injected {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}

impl std::error::Error for Injected {}

impl From<Injected> for io::Error {
    fn from(injected: Injected) -> Self {
        match injected {}
    }
}

#[inline]
#[expect(clippy::unnecessary_wraps, reason = "the other build can fail")]
pub(crate) const fn hit(_: &Area, _: &str, _: &str) -> Result<(), Injected> {
    Ok(())
}

#[inline]
pub(crate) const fn skips(_: &Area, _: &str) -> bool {
    false
}

#[inline]
pub(crate) const fn mutated(_: &str) -> bool {
    false
}
