//! Applies what the host says about name, names, DNS, clock, network and CPU; gives the machine an id.
//!
//! # Invariants
//! 1. A file is written beside its place and moved there, so a link in the image (a
//!    `resolv.conf` that points into `/run`, say) is replaced, never written through.
//! 2. Applying the same configuration again gives the same files and the same network.
//!
//! # Failure
//! The first part that fails ends it; the host decides whether the guest is of use.

use std::cell::OnceCell;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use matchlock_wire::message::Configure;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::agent::Machine;
use crate::cgroup::Cgroups;
use crate::network::{self, NetworkError};

/// Why a configuration was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    /// A text would end up as more than one line or word of a file.
    #[error("the {what} {text:?} has characters that it must not have")]
    Text {
        /// What it is.
        what: &'static str,
        /// The text.
        text: String,
    },
    /// The kernel refused the hostname.
    #[error("cannot set the hostname to {hostname:?}")]
    Hostname {
        /// The hostname.
        hostname: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused the time.
    #[error("cannot set the clock")]
    Clock(#[source] io::Error),
    /// A file could not be written.
    #[error("cannot write {path}")]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The machine got no id.
    #[error("cannot draw a machine id")]
    MachineId(#[source] io::Error),
    /// The network could not be set up.
    #[error("cannot set up the network")]
    Network(#[from] NetworkError),
    /// The CPU limit could not be set.
    #[error("cannot limit the CPU to {millis}/1000")]
    Cpu {
        /// The limit.
        millis: u32,
        /// Why.
        source: io::Error,
    },
}

/// The guest itself.
#[derive(Debug)]
pub struct GuestMachine {
    /// Its control groups, where the kernel has them.
    pub cgroups: Option<Cgroups>,
    /// Its id, once it has one.
    machine_id: OnceCell<String>,
}

impl Machine for GuestMachine {
    fn configure(&self, config: &Configure) -> Result<(), ConfigureError> {
        check(config)?;
        if config.clock_unix_ns != 0 {
            let now = TimeSpec::from(Duration::from_nanos(config.clock_unix_ns));
            clock_settime(ClockId::CLOCK_REALTIME, now)
                .map_err(|errno| ConfigureError::Clock(errno.into()))?;
        }
        nix::unistd::sethostname(&config.hostname).map_err(|errno| ConfigureError::Hostname {
            hostname: config.hostname.clone(),
            source: errno.into(),
        })?;
        write_files(Path::new("/etc"), config)?;
        self.renew_machine_id(Path::new("/etc"), Path::new(RANDOM_UUID))?;
        if let Some(network) = &config.network {
            network::set_up(network, network::PATIENCE)?;
        }
        self.limit_cpu(config.cpu_millis)
    }
}

/// Where the kernel draws a random UUID.
const RANDOM_UUID: &str = "/proc/sys/kernel/random/uuid";

impl GuestMachine {
    /// A machine with these control groups.
    #[must_use]
    pub fn new(cgroups: Option<Cgroups>) -> Self {
        Self { cgroups, machine_id: OnceCell::new() }
    }

    /// Writes an id of this machine's own over the one of the image, which is that of all its machines;
    /// also where it is empty, which means that one is to be drawn. An image without one has none.
    fn renew_machine_id(&self, etc: &Path, uuid: &Path) -> Result<(), ConfigureError> {
        const NAME: &str = "machine-id";
        let path = etc.join(NAME);
        match fs::symlink_metadata(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(ConfigureError::File { path, source }),
        }
        let id = match self.machine_id.get() {
            Some(id) => id,
            None => {
                let drawn = fs::read_to_string(uuid).map_err(ConfigureError::MachineId)?;
                self.machine_id.get_or_init(|| drawn.replace('-', ""))
            }
        };
        replace(etc, NAME, id).map_err(|source| ConfigureError::File { path, source })
    }

    fn limit_cpu(&self, millis: u32) -> Result<(), ConfigureError> {
        let result = match &self.cgroups {
            Some(cgroups) => cgroups.limit_cpu(millis),
            None if millis == 0 => Ok(()),
            None => {
                Err(io::Error::new(io::ErrorKind::Unsupported, "the guest has no control groups"))
            }
        };
        match result {
            // No CPU controller, and no limit asked for.
            Err(error) if millis == 0 && error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(|source| ConfigureError::Cpu { millis, source }),
        }
    }
}

fn check(config: &Configure) -> Result<(), ConfigureError> {
    let one = |what, text: &str| {
        let bad = |c: char| c.is_control() || c.is_whitespace() || c == '#';
        if text.is_empty() || text.contains(bad) {
            let text = text.to_owned();
            return Err(ConfigureError::Text { what, text });
        }
        Ok(())
    };
    one("hostname", &config.hostname)?;
    for (address, name) in &config.add_hosts {
        one("address", address)?;
        one("host name", name)?;
    }
    for server in &config.dns_servers {
        one("DNS server", server)?;
    }
    Ok(())
}

fn write_files(etc: &Path, config: &Configure) -> Result<(), ConfigureError> {
    make_directory(etc).map_err(|source| ConfigureError::File { path: etc.to_owned(), source })?;
    let files = [
        ("hostname", format!("{}\n", config.hostname)),
        ("hosts", hosts(config)),
        ("resolv.conf", resolv_conf(config)),
    ];
    for (name, text) in files {
        replace(etc, name, &text)
            .map_err(|source| ConfigureError::File { path: etc.join(name), source })?;
    }
    Ok(())
}

fn make_directory(path: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn replace(directory: &Path, name: &str, text: &str) -> io::Result<()> {
    let beside = directory.join(format!(".{name}.matchlock"));
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&beside)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&beside, directory.join(name))
}

fn hosts(config: &Configure) -> String {
    let mut text = format!("127.0.0.1\tlocalhost localhost.localdomain {}\n", config.hostname);
    for (address, name) in &config.add_hosts {
        text.push_str(address);
        text.push('\t');
        text.push_str(name);
        text.push('\n');
    }
    text.push_str("::1\tlocalhost ip6-localhost ip6-loopback\n");
    text.push_str("ff02::1\tip6-allnodes\n");
    text.push_str("ff02::2\tip6-allrouters\n");
    text
}

fn resolv_conf(config: &Configure) -> String {
    let lines = config.dns_servers.iter();
    lines.map(|server| format!("nameserver {server}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Configure {
        Configure {
            hostname: "box".into(),
            add_hosts: vec![("10.0.0.9".into(), "db".into())],
            dns_servers: vec!["1.1.1.1".into(), "2606:4700::1111".into()],
            clock_unix_ns: 0,
            cpu_millis: 0,
            network: None,
        }
    }

    #[test]
    fn files_are_written_into_an_image_without_etc() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        write_files(&etc, &config()).unwrap();
        let read = |name: &str| fs::read_to_string(etc.join(name)).unwrap();
        assert_eq!(read("hostname"), "box\n");
        assert!(read("hosts").starts_with("127.0.0.1\tlocalhost localhost.localdomain box\n"));
        assert!(read("hosts").contains("\n10.0.0.9\tdb\n"));
        assert_eq!(read("resolv.conf"), "nameserver 1.1.1.1\nnameserver 2606:4700::1111\n");
        assert_eq!(fs::read_dir(&etc).unwrap().count(), 3, "nothing else is left");
    }

    #[test]
    fn a_link_is_replaced_and_what_it_points_to_is_not_touched() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs::create_dir(&etc).unwrap();
        fs::write(root.path().join("stub"), "theirs").unwrap();
        std::os::unix::fs::symlink("../stub", etc.join("resolv.conf")).unwrap();
        std::os::unix::fs::symlink("/nowhere/at/all", etc.join("hosts")).unwrap();
        fs::write(etc.join(".hosts.matchlock"), "left over").unwrap();
        for _ in 0..2 {
            write_files(&etc, &config()).unwrap();
        }
        assert!(fs::symlink_metadata(etc.join("resolv.conf")).unwrap().is_file());
        assert!(fs::symlink_metadata(etc.join("hosts")).unwrap().is_file());
        assert_eq!(fs::read_to_string(root.path().join("stub")).unwrap(), "theirs");
    }

    #[test]
    fn a_machine_has_one_id_where_its_image_has_one() {
        let root = tempfile::tempdir().unwrap();
        let (etc, uuid) = (root.path().join("etc"), root.path().join("uuid"));
        fs::create_dir(&etc).unwrap();
        fs::write(&uuid, "0b1c-2d\n").unwrap();
        let machine = GuestMachine::new(None);
        machine.renew_machine_id(&etc, &uuid).unwrap();
        assert_eq!(fs::read_dir(&etc).unwrap().count(), 0, "the image has none");
        fs::write(root.path().join("shared"), "of all\n").unwrap();
        std::os::unix::fs::symlink("../shared", etc.join("machine-id")).unwrap();
        for _ in 0..2 {
            machine.renew_machine_id(&etc, &uuid).unwrap();
            assert_eq!(fs::read_to_string(etc.join("machine-id")).unwrap(), "0b1c2d\n");
            // Applied again it stays.
            fs::write(&uuid, "another\n").unwrap();
        }
        assert_eq!(fs::read_to_string(root.path().join("shared")).unwrap(), "of all\n");
    }

    #[test]
    fn texts_that_would_make_lines_of_their_own_are_refused() {
        for bad in ["", "a b", "a\nnameserver 6.6.6.6", "a#", "a\0"] {
            let mut hostname = config();
            hostname.hostname = bad.into();
            assert!(check(&hostname).is_err(), "{bad:?}");
            let mut hosts = config();
            hosts.add_hosts[0].1 = bad.into();
            assert!(check(&hosts).is_err(), "{bad:?}");
            let mut dns = config();
            dns.dns_servers[0] = bad.into();
            assert!(check(&dns).is_err(), "{bad:?}");
        }
        assert!(check(&config()).is_ok());
    }

    #[test]
    fn a_limit_without_control_groups_is_refused_and_no_limit_is_not() {
        let machine = GuestMachine::new(None);
        assert!(machine.limit_cpu(0).is_ok());
        assert!(machine.limit_cpu(500).is_err());
    }
}
