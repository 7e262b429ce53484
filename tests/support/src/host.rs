//! What an installation has on the host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

/// What an installation has on the host besides its database.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Remains {
    /// Processes that carry its mark or work below its directory: pid and command line.
    pub processes: Vec<(i32, String)>,
    /// Whatever is below `vms/`.
    pub files: Vec<PathBuf>,
    /// Interfaces that are named as ours will be; this version makes none.
    pub links: Vec<String>,
    /// Mounts below its directory.
    pub mounts: Vec<String>,
}

impl Remains {
    /// Looks.
    ///
    /// # Errors
    /// When something could not be looked at.
    pub fn of(home: &Path) -> Result<Self> {
        let install = match fs::read_to_string(home.join("install-id")) {
            Ok(text) => Some(text.trim().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        };
        let home_text = home.to_string_lossy().into_owned();
        Ok(Self {
            processes: processes(home, install.as_deref())?,
            files: below(&home.join("vms"))?,
            links: links()?,
            mounts: fs::read_to_string("/proc/self/mounts")?
                .lines()
                .filter(|line| line.contains(&home_text))
                .map(str::to_owned)
                .collect(),
        })
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Ends the processes, by their ids.
    pub fn kill_processes(&self) {
        for (pid, _) in &self.processes {
            let Some(pid) = Pid::from_raw(*pid) else { continue };
            if let Err(errno) = kill_process(pid, Signal::KILL)
                && errno != Errno::SRCH
            {
                eprintln!("could not end process {pid:?}: {errno}");
            }
        }
    }
}

/// Hypervisors of this installation, and everything that works below its directory.
fn processes(home: &Path, install: Option<&str>) -> Result<Vec<(i32, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A process may end while we look at it.
        let Ok(cmdline) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        let mark = install.map(|install| format!("matchlock:{install}:"));
        let marked = mark.is_some_and(|mark| cmdline.contains(&mark));
        let inside =
            fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(home));
        if marked || inside {
            found.push((pid, cmdline));
        }
    }
    Ok(found)
}

fn below(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| dir.display().to_string())?,
    };
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn links() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/net")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("fc-") {
            found.push(name);
        }
    }
    Ok(found)
}
