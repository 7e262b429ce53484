//! Imports of image archives: what honest ones become, and what hostile ones may not do.
//!
//! The archives are made in memory, byte by byte where that is what makes them hostile. Each test has
//! its own cache below a temporary directory, with a tree of sentinels beside it that must not change.
//! The tests need root; without it they say so and pass.

#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]

mod archives;
mod broken;
mod hostile;
mod layers;
mod layouts;
mod oracle;
mod property;
mod several;
mod store;
mod view;
mod world;
