//! A network namespace for one try, which goes with its thread.

use std::io;

use nix::sched::{CloneFlags, unshare};

/// Does this in a network namespace of its own, on a thread of its own.
///
/// # Errors
/// When no namespace can be made here (that wants CAP_SYS_ADMIN), or the work panicked.
pub(super) fn in_own_network<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let thread = std::thread::Builder::new().name("throwaway".into()).spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(work())
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the try panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_try_sees_no_link_of_ours() {
        let names = || std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let seen = in_own_network(names).unwrap();
        assert_eq!(seen.lines().skip(2).count(), 1, "lo alone: {seen}");
    }
}
