//! Ids, specifications, the phase machine and plans. Pure: no I/O, no clock, no randomness, no
//! async. What needs the time or a random number is given it.
//!
//! Start reading at [`spec`] (what a VM is asked to be), then [`phase`] (the phases a VM can be
//! in), [`vm`] (what happens next: `step`), [`reconcile`] (what to do about what was left:
//! `plan`).

pub mod exec;
pub mod exit;
pub mod failure;
pub mod file;
pub mod guest;
pub mod id;
pub mod identity;
pub mod image;
pub mod phase;
pub mod platform;
pub mod reconcile;
pub mod record;
pub mod reference;
pub mod signal;
pub mod spec;
pub mod subnet;
pub mod view;
pub mod vm;
