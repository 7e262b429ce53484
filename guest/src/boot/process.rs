//! Prepares the agent's own process.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

/// Enough for every job's pipes at once.
const OPEN_FILES: u64 = 65_536;

/// What a command may raise its own limit to, at least.
const COMMAND_FILES: u64 = 524_288;

/// Makes the agent the last that the kernel kills for memory, opaque to other processes, and lets
/// it open enough files.
///
/// # Errors
/// When the kernel refuses.
pub fn prepare_agent() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000")?;
    // No core dump, and its memory is nobody's to read: it holds other commands' output.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, COMMAND_FILES.max(hard))?;
    Ok(())
}
