//! The control groups of a guest: one for the agent, one for all commands.
//!
//! ```text
//!  /sys/fs/cgroup ─┬─ init   the agent
//!                  └─ jobs   every command, with the guest's CPU limit
//! ```

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// The period of a CPU limit, in microseconds.
const PERIOD_US: u64 = 100_000;

/// The kernel's smallest quota, in microseconds.
const MIN_QUOTA_US: u64 = 1000;

/// The control groups, set up.
#[derive(Debug)]
pub struct Cgroups {
    jobs: PathBuf,
}

impl Cgroups {
    /// Moves the agent out of the way and makes the commands' group below `root`.
    ///
    /// # Errors
    /// When the groups cannot be made. A controller that cannot be enabled is handed to `warn`.
    pub fn set_up(root: &Path, mut warn: impl FnMut(&str, &io::Error)) -> io::Result<()> {
        let init = root.join("init");
        let jobs = root.join("jobs");
        for directory in [&init, &jobs] {
            match fs::create_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        fs::write(init.join("cgroup.procs"), "0")?;
        let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
        for controller in controllers.split_whitespace() {
            // One by one: a controller that refuses does not take the others with it.
            if let Err(error) =
                fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))
            {
                warn(controller, &error);
            }
        }
        Ok(())
    }

    /// The groups that were set up; `None` when there are none.
    ///
    /// # Errors
    /// When they cannot be looked for.
    pub fn find(root: &Path) -> io::Result<Option<Self>> {
        let jobs = root.join("jobs");
        Ok(jobs.try_exists()?.then_some(Self { jobs }))
    }

    /// The commands' group, to clone processes into.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_jobs(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&self.jobs, flags, Mode::empty())?)
    }

    /// Limits all commands together to thousandths of one CPU; 0 takes the limit away.
    ///
    /// # Errors
    /// When the kernel has no CPU controller or refuses.
    pub fn limit_cpu(&self, millis: u32) -> io::Result<()> {
        fs::write(self.jobs.join("cpu.max"), cpu_max(millis))
    }
}

fn cpu_max(millis: u32) -> String {
    if millis == 0 {
        return format!("max {PERIOD_US}");
    }
    let quota = (u64::from(millis) * PERIOD_US / 1000).max(MIN_QUOTA_US);
    format!("{quota} {PERIOD_US}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_limits_are_quotas_of_the_period() {
        assert_eq!(cpu_max(0), "max 100000");
        assert_eq!(cpu_max(1000), "100000 100000");
        assert_eq!(cpu_max(2500), "250000 100000");
        assert_eq!(cpu_max(1), "1000 100000");
        assert_eq!(cpu_max(u32::MAX), "429496729500 100000");
    }
}
