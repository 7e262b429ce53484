//! Whether a network namespace is still there: what is in it or keeps it, of all processes.
//!
//! Not looked at: a socket alone keeps a namespace too, without anything that `/proc` shows. What a
//! VM has in its namespace does not outlive its hypervisor, which is a process there; tables without
//! an owner (kernels before 5.12) would.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::{NamespaceSighting, ProcessError};

/// Looks for the namespace `device:inode` at every process that can be seen from here.
pub(super) fn look_for(
    namespace: &str,
    pids: impl IntoIterator<Item = i32>,
) -> Result<NamespaceSighting, ProcessError> {
    let mut search = Search::new(namespace);
    for pid in pids {
        if search.found_at(pid) {
            return Ok(NamespaceSighting::There);
        }
    }
    Ok(if search.all_seen { NamespaceSighting::Gone } else { NamespaceSighting::Unseen })
}

/// `device:inode` of a namespace.
pub(super) fn device_and_inode(found: &fs::Metadata) -> String {
    format!("{}:{}", found.dev(), found.ino())
}

struct Search<'a> {
    namespace: &'a str,
    /// What a link to it, and a mount of it, is called.
    link: String,
    /// Mount namespaces whose mounts were looked at.
    seen_mounts: HashSet<String>,
    /// Whether nothing was kept from us.
    all_seen: bool,
}

impl<'a> Search<'a> {
    fn new(namespace: &'a str) -> Self {
        let inode = namespace.split_once(':').map_or(namespace, |(_, inode)| inode);
        let link = format!("net:[{inode}]");
        Self { namespace, link, seen_mounts: HashSet::new(), all_seen: true }
    }

    /// Whether the process, a thread of it, a file that it sees or one that it has open keeps the
    /// namespace.
    fn found_at(&mut self, pid: i32) -> bool {
        let process = format!("/proc/{pid}");
        let threads = self.entries(&format!("{process}/task"));
        threads.iter().any(|thread| self.thread_is_in_it(thread) || self.thread_sees_it(thread))
            || self.entries(&format!("{process}/fd")).iter().any(|open| {
                let target = self.look(fs::read_link(open));
                target.is_some_and(|target| target.as_os_str() == self.link.as_str())
            })
    }

    fn thread_is_in_it(&mut self, thread: &Path) -> bool {
        let found = self.look(fs::metadata(thread.join("ns/net")));
        found.is_some_and(|found| device_and_inode(&found) == self.namespace)
    }

    /// Whether a file keeps it, as `ip netns add` makes one, in the thread's mount namespace.
    fn thread_sees_it(&mut self, thread: &Path) -> bool {
        let Some(found) = self.look(fs::metadata(thread.join("ns/mnt"))) else { return false };
        if !self.seen_mounts.insert(device_and_inode(&found)) {
            return false;
        }
        let Some(mounts) = self.look(fs::read(thread.join("mountinfo"))) else { return false };
        let root = format!(" {} ", self.link);
        // Names of files need not be text.
        String::from_utf8_lossy(&mounts).lines().any(|line| line.contains(&root))
    }

    fn entries(&mut self, directory: &str) -> Vec<std::path::PathBuf> {
        let read = fs::read_dir(directory)
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect());
        self.look(read).unwrap_or_default()
    }

    /// What was looked at; `None` if it has ended meanwhile, or was kept from us.
    fn look<T>(&mut self, looked: io::Result<T>) -> Option<T> {
        match looked {
            Ok(found) => Some(found),
            Err(error) => {
                // The kernel says EINVAL for the mounts of a process that has ended.
                let ended = [libc::ENOENT, libc::ESRCH, libc::EINVAL];
                self.all_seen &= error.raw_os_error().is_some_and(|code| ended.contains(&code));
                None
            }
        }
    }
}
