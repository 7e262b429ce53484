//! A command to run in a guest, and how it can end.

use serde::{Deserialize, Serialize};

use crate::exit;

/// A command to run in a guest. Bytes, because arguments and environment need not be UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecSpec {
    /// The command and its arguments; never empty.
    pub argv: Vec<Vec<u8>>,
    /// The environment; later entries win.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// The working directory; `None` means `/`.
    pub cwd: Option<String>,
    /// The user, resolved in the guest; `None` means root.
    pub user: Option<String>,
    /// Whether stdin is sent. Without, it is `/dev/null`, or a terminal where nobody types.
    pub stdin: bool,
    /// A terminal for its stdin, stdout and stderr; `None` means pipes.
    pub terminal: Option<Terminal>,
    /// What it gets when it is to end by itself; `None` means SIGTERM.
    #[serde(default)]
    pub stop_signal: Option<u8>,
}

/// The terminal that a command gets in its guest. What it prints there is all stdout.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Terminal {
    /// Its size at the start.
    pub size: TerminalSize,
    /// `TERM`, where the environment does not say it; `None` leaves it to the guest.
    pub term: Option<String>,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// The number of lines.
    pub rows: u16,
    /// The number of columns.
    pub cols: u16,
}

impl Default for TerminalSize {
    /// What a terminal has whose size nobody knows.
    fn default() -> Self {
        Self { rows: 24, cols: 80 }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// By itself, with this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl ExitStatus {
    /// The exit code that a shell would report.
    #[must_use]
    pub const fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => exit::by_signal(signal),
        }
    }
}

/// Which of a command's streams bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Why a command did not start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRefusal {
    /// What kind of refusal.
    pub kind: ExecRefusalKind,
    /// One line that says why.
    pub message: String,
}

/// The kinds of [`ExecRefusal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecRefusalKind {
    /// There is no such file, or it is not in `PATH`.
    NotFound,
    /// The file is there, but it cannot be executed.
    NotExecutable,
    /// The user could not be resolved.
    User,
    /// The working directory could not be entered.
    WorkingDirectory,
    /// The request itself is wrong.
    Request,
    /// The guest cannot take it now.
    Unavailable,
    /// The file could not be opened: it is not there, is no regular file, or the like.
    File,
}

impl ExecRefusal {
    /// The exit code of `run` and `exec` for this refusal.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self.kind {
            ExecRefusalKind::NotFound => exit::NOT_FOUND,
            ExecRefusalKind::NotExecutable | ExecRefusalKind::WorkingDirectory => {
                exit::NOT_EXECUTABLE
            }
            ExecRefusalKind::User
            | ExecRefusalKind::Request
            | ExecRefusalKind::Unavailable
            | ExecRefusalKind::File => exit::MATCHLOCK_FAILED,
        }
    }
}
