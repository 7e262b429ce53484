//! A failure in a form that may be stored, shown and sent between processes.

use std::any::Any;
use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of failure, as far as anybody decides by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The caller asked for something that cannot be.
    Input,
    /// Something that was asked for does not exist.
    NotFound,
    /// The host lacks something: a program, a kernel, memory, space, a right.
    Host,
    /// The guest or its hypervisor failed.
    Guest,
    /// It took too long.
    Timeout,
    /// It was cancelled by a stop.
    Cancelled,
    /// Another process kept something locked for too long.
    Busy,
    /// Another process owns the VM now.
    Fenced,
    /// A fault of our own.
    Internal,
}

/// A failure: its kind, and one line that says what went wrong and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure.
    pub kind: FailureKind,
    /// The whole chain of causes in one line, outermost first.
    pub message: String,
}

impl Failure {
    /// A failure with this text.
    #[must_use]
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A failure that tells an error and all its causes.
    #[must_use]
    pub fn from_error(kind: FailureKind, error: &(dyn Error + 'static)) -> Self {
        Self { kind, message: chain(error) }
    }

    /// The same failure, with what was being done before its text.
    #[must_use]
    pub fn context(self, doing: impl fmt::Display) -> Self {
        Self { kind: self.kind, message: format!("{doing}: {}", self.message) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {}

/// What a panic said, if it said anything.
#[must_use]
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

/// An error and its causes in one line: `outer: cause: root`.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
